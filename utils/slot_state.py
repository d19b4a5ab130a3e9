"""What the device knows of the engine's slots: where the row in each stands, and what it chose last."""

from collections.abc import Sequence

import torch


class SlotState:
    """
    Args:
        slots: rows at once.
        coordinates: of a position, 1 or ChatGLM-6B's 2, of which the first stays where the answer began.
        steps: whose tokens `history` keeps.
        stop_ids: tokens that end an answer.
        vocabulary: tokens that are remembered of each row for a repetition penalty; 0 without one.

    Of each slot, int64: `tokens`, the last one, which is not read yet; `lengths`, the column it goes to; `left`, how
    many tokens may still come, 0 behind one that stops; `numbers` of the rows; `counts`, tokens of the answer;
    `adapters`; `positions`, (slots, coordinates). `history` is (steps, slots), `clock` the row that is written next.
    """

    def __init__(
        self, slots: int, coordinates: int, steps: int, stop_ids: Sequence[int], vocabulary: int, device: torch.device
    ):
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        self.tokens, self.lengths, self.left = zeros(slots), zeros(slots), zeros(slots)
        self.numbers, self.counts, self.adapters = zeros(slots), zeros(slots), zeros(slots)
        self.positions = zeros(slots, coordinates)
        self.history, self.clock, self.steps = zeros(steps, slots), zeros(1), steps
        self.seen = torch.zeros(slots, vocabulary, dtype=torch.bool, device=device) if vocabulary else None
        self.stops = torch.tensor(sorted(set(stop_ids)), device=device)
        self.advances = torch.tensor([0, 1] if coordinates == 2 else [1], device=device)

    def of_slots(self) -> list[torch.Tensor]:
        """All that has a slot first."""
        state = [self.tokens, self.lengths, self.left, self.numbers, self.counts, self.adapters, self.positions]
        return state if self.seen is None else [*state, self.seen]

    def place(self, rows: torch.Tensor, ids: torch.Tensor, slot_of_ids: torch.Tensor) -> None:
        """Rows come into slots: `rows` of `PackedPrompts`, and each token of their prompts with its slot."""
        slots, following, lengths, left, numbers, adapters = rows[:6]
        for tensor, values in (
            (self.tokens, following),
            (self.lengths, lengths),
            (self.left, left),
            (self.numbers, numbers),
            (self.adapters, adapters),
            (self.positions, rows[6:].t()),
        ):
            tensor[slots] = values
        self.counts.index_fill_(0, slots, 0)
        if self.seen is not None:
            true = torch.ones((), dtype=torch.bool, device=self.seen.device)
            self.seen.index_fill_(0, slots, False)
            self.seen.index_put_((slot_of_ids, ids), true)
            self.seen.index_put_((slots, following), true)

    def advance(self, chosen: torch.Tensor) -> None:
        """(B,) tokens of the first B slots; rows that stopped stay where they are."""
        size = len(chosen)
        goes_on = (self.left[:size] > 0).long()
        if self.seen is not None:
            self.seen[:size].scatter_(1, chosen[:, None], True)
        self.tokens[:size] = chosen
        self.history[:, :size].index_copy_(0, self.clock, chosen[None])
        self.lengths[:size] += goes_on
        self.counts[:size] += goes_on
        self.positions[:size] += goes_on[:, None] * self.advances
        self.left[:size] = torch.where(torch.isin(chosen, self.stops), 0, self.left[:size] - goes_on)
        self.clock.copy_((self.clock + 1) % self.steps)
