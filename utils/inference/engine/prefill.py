"""The rows that the engine answers, and their prompts laid end to end, as it reads them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

LEAST_READ, MOST_READ = 128, 4096  # tokens of the prompts that are read at once; a longer one alone


@dataclass
class TokenSequence:
    """
    One row: its number (with the seed it decides a sampled answer), its prompt's tokens, how many an answer has at
    most, the number of its adapter among several, and the answer so far, up to and with the token that stopped it.
    """

    number: int
    input_ids: Sequence[int]
    max_new_tokens: int
    adapter: int = 0
    answer_ids: list[int] = field(default_factory=list)


def read_size(tokens: int) -> int:
    """What so many tokens are filled up to: a power of 2, or 1.5 times one."""
    size = LEAST_READ
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


@dataclass(frozen=True)
class PackedPrompts:
    """
    All tokens of R prompts but the last of each, N together; with C coordinates of a position, 1 or ChatGLM-6B's 2.

    Args:
        rows: (6 + C, R) int64: slot, last token, its column, tokens of the answer, number, adapter, position.
        tokens: (4 + C, N) int64: id, slot, column, adapter, position.
        starts: (R + 1,) int32, where each row begins and the last one ends.
        alike: whether in every row tokens see one way: what is before them, or, as in ChatGLM-6B's prompts that end
            with `<sop>`, all of their row.
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    starts: torch.Tensor
    alike: bool

    def mask(self) -> torch.Tensor:
        """(1, 1, N, N) bool, what each token sees: of its row what is before it, and in ChatGLM-6B's the prefix."""
        size = self.tokens.shape[1]
        own = torch.bucketize(torch.arange(size), self.starts, right=True)
        visible = torch.ones(size, size, dtype=torch.bool).tril_()
        if len(self.tokens) == 6:
            visible |= self.tokens[-1] == 0
        visible &= own[:, None] == own
        return visible[None, None]

    def filled_up(self, rows: int, column: int) -> "PackedPrompts":
        """
        With so many rows, the first repeated without its tokens, and `read_size` tokens, those added in no row; what
        they leave behind goes to a column of the first row's slot.
        """
        total = self.tokens.shape[1]
        slot, first = self.rows[:2, 0].tolist()
        filler = torch.tensor([first, slot, column, *[0] * (len(self.tokens) - 3)])[:, None]
        spare = rows - self.rows.shape[1]
        return PackedPrompts(
            torch.cat((self.rows, self.rows[:, :1].expand(-1, spare)), dim=1),
            torch.cat((self.tokens, filler.expand(-1, read_size(total) - total)), dim=1),
            torch.cat((self.starts, self.starts[-1:].expand(spare))),
            self.alike,
        )


def pack_prompts(
    batch: Sequence[TokenSequence],
    slots: Sequence[int],
    positions_of: Callable[[Sequence[int]], list[tuple[int, ...]]],
) -> PackedPrompts:
    """
    Args:
        slots: where each task's row goes.
        positions_of: a prompt's tokens -> the position of each, of one or two coordinates.
    """
    rows: list[tuple[int, ...]] = []
    tokens: list[tuple[int, ...]] = []
    starts, alike = [0], True
    for slot, task in zip(slots, batch, strict=True):
        *ids, last = task.input_ids
        *positions, last_position = positions_of(task.input_ids)
        rows.append((slot, last, len(ids), task.max_new_tokens, task.number, task.adapter, *last_position))
        for column, (token, position) in enumerate(zip(ids, positions, strict=True)):
            tokens.append((token, slot, column, task.adapter, *position))
        starts.append(len(tokens))
        alike &= len(last_position) == 1 or not positions or positions[-1][1] == 0
    width = 4 + len(last_position)
    laid_out = torch.tensor(tokens, dtype=torch.int64).view(-1, width).t().contiguous()
    return PackedPrompts(torch.tensor(rows).t().contiguous(), laid_out, torch.tensor(starts, dtype=torch.int32), alike)
