"""
Keys and values of the engine's rows: every row has a slot of fixed size, in which its tokens lie from the start.

Shapes: B rows that compute, T tokens, H query heads, K key/value heads, D head size, S columns that may be filled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from utils.kernels import load_decode_attention
from utils.layers.varlen_attention import varlen_attention_forward

SLOTS = "slots"  # its name in transformers' attention interface


@dataclass
class LayerSlots:
    """One layer's slots, in the place of transformers' cache: keys and values (slots, K, columns, D)."""

    keys: torch.Tensor
    values: torch.Tensor
    columns: torch.Tensor  # (B,) int64: where the token of each of the first B slots goes

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, **kwargs):
        """One token a row, (B, K, 1, D), into the first B slots -> all slots."""
        rows = torch.arange(key.shape[0], device=key.device)
        self.keys[rows, :, self.columns] = key[:, :, 0]
        self.values[rows, :, self.columns] = value[:, :, 0]
        return self.keys, self.values


@dataclass
class PromptRecorder:
    """Takes the cache's place while prompts are read: keeps what each layer makes of them, (1, K, N, D)."""

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, **kwargs):
        self.keys, self.values = key, value
        return key, value


@torch.library.custom_op("chatglm_family::slot_attention", mutates_args=())
def slot_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """
    Attention of one token a row to its slot. An operator of its own, so that compiled layers do not depend on S.

    Args:
        query: (B, H, 1, D); of the slots (slots, K, columns, D) the first B rows and S columns are read.
        mask: (B, 1, 1, S), 0 or -inf, in the dtype of `query`; or (B,) int64, the last column of each slot that is
            filled, for the kernel, which reads no further.

    Returns:
        (B, 1, H, D).
    """
    if mask.ndim == 1:
        return load_decode_attention().decode_attention(query, keys, values, mask, scaling)
    B, H, _, D = query.shape
    S = mask.shape[-1]
    heads = keys.shape[1]
    grouped = query.reshape(B, heads, H // heads, D)  # the query heads of a key head as if they were its tokens
    shape = (B, heads, H // heads, S)
    output = scaled_dot_product_attention(
        grouped, keys[:B, :, :S], values[:B, :, :S], attn_mask=mask.expand(shape), scale=scaling
    )
    return output.reshape(B, 1, H, D).contiguous()


@slot_attention.register_fake
def _(query, keys, values, mask, scaling):
    B, H, _, D = query.shape
    return query.new_empty(B, 1, H, D)


def slot_attention_forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Prompts, more tokens than one, as `varlen` or with a mask as `sdpa`; single tokens by `slot_attention`."""
    if "cu_seq_lens_q" in kwargs:
        return varlen_attention_forward(module, query, key, value, None, scaling=scaling, **kwargs)
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return slot_attention(query, key, value, attention_mask, scaling), None


AttentionInterface.register(SLOTS, slot_attention_forward)
AttentionMaskInterface.register(SLOTS, lambda *args, **kwargs: None)


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
