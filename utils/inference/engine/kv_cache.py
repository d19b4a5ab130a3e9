"""
The engine's memory on the device: pages of keys and values, and where the sequence in each slot stands.

`ModelRunner` writes both in prefill and in every decode step; nothing here moves or grows while the engine lives,
because CUDA graphs replay on the same addresses. Which page belongs to whom the host decides, see `pages.py`.

Shapes: B sequences of a decode step, K key/value heads, D head size, R sequences and N tokens of a prefill.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from utils.inference.engine.pages import PAGE_TOKENS, SCRATCH_PAGE
from utils.inference.engine.prefill import PrefillBatch
from utils.kernels import load_next_token


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes that one token of one sequence takes in the KV cache, over all layers."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize


@dataclass
class LayerKVCache:
    """One layer's pages in place of transformers' cache: keys and values (pages, K, 64, D)."""

    keys: torch.Tensor
    values: torch.Tensor
    page_table: torch.Tensor  # (B, pages of a sequence) int32
    next_index: torch.Tensor  # (B,) int64: number of the next token in each of the first B slots

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, **kwargs):
        """Write one token per sequence, (B, K, 1, D); return the keys and values of all pages."""
        page = self.page_table.gather(1, self.next_index[:, None] // PAGE_TOKENS)[:, 0].long()
        self.write(page, self.next_index % PAGE_TOKENS, key[:, :, 0], value[:, :, 0])
        return self.keys, self.values

    def write(self, page: torch.Tensor, offset: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write tokens, (N, K, D), each to its page and its place there, (N,) int64."""
        self.keys[page, :, offset] = key
        self.values[page, :, offset] = value

    def gather(self, page: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values, (M, K, D), of the tokens at these pages and places, (M,) int64."""
        return self.keys[page, :, offset], self.values[page, :, offset]


@dataclass
class PromptPages:
    """Where the keys and values of a layer's prefill lie, and those that the tokens attend to."""

    cache: LayerKVCache
    token_page: torch.Tensor  # (N,) int64, of the tokens that are prefilled
    token_offset: torch.Tensor  # (N,)
    gathered: tuple[torch.Tensor, torch.Tensor] | None = None  # see `PromptBounds`

    def exchange(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Write the tokens' keys and values, (1, K, N, D), and return all that they attend to, (1, K, M, D).

        As they are written first, a sequence can share pages that another one fills in the same prefill. Without
        `gathered` the same are returned.
        """
        self.cache.write(self.token_page, self.token_offset, key[0].transpose(0, 1), value[0].transpose(0, 1))
        if self.gathered is None:
            return key, value
        keys, values = self.cache.gather(*self.gathered)
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None]


@dataclass
class PromptRecorder:
    """Takes the cache's place during prefill, where attention writes into it: keeps keys and values (1, K, N, D)."""

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, **kwargs):
        """Keep and return keys and values; attention calls it as a cache."""
        self.keys, self.values = key, value
        return key, value


@dataclass(frozen=True)
class DecodeStateShape:
    """
    Sizes of a `DecodeState`.

    Args:
        max_batch_size: slots.
        max_pages: of a sequence.
        coordinates: of a position: 2 for ChatGLM-6B, else 1.
        decode_steps: whose tokens `history` keeps.
        seen_tokens: size of the vocabulary if a repetition penalty needs each sequence's tokens, else 0.
    """

    max_batch_size: int
    max_pages: int
    coordinates: int
    decode_steps: int
    seen_tokens: int


class DecodeState:
    """
    Per-slot decode state on the device. One slot more than there are sequences takes what belongs to none.

    int64, one a slot:
        next_token: the last token of the sequence, which the next decode step computes.
        cache_length: tokens in the KV cache, so the number of that token.
        tokens_left: how many more may come; 0 once a stop token came.
        sequence_id, answer_length: with the seed they decide a sampled token.
        adapter: number of the adapter; 0 is none.
        position: (slots, coordinates). ChatGLM-6B's first coordinate stays where the answer began.

    `page_table` (slots, max_pages) int32 has the pages of each sequence, behind them the scratch page. `history`
    (decode_steps, max_batch_size) holds the chosen tokens, `history_index` (1,) the row that is written next; `seen`
    (slots, vocabulary) bool, the tokens of prompt and answer, or None.
    """

    def __init__(self, shape: DecodeStateShape, stop_ids: Collection[int], device: torch.device):
        def zeros(*sizes: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(*sizes, dtype=dtype, device=device)

        self.unused_slot = shape.max_batch_size
        slots = shape.max_batch_size + 1
        self.next_token, self.cache_length, self.tokens_left = zeros(slots), zeros(slots), zeros(slots)
        self.sequence_id, self.answer_length, self.adapter = zeros(slots), zeros(slots), zeros(slots)
        self.position = zeros(slots, shape.coordinates)
        self.page_table = zeros(slots, shape.max_pages, dtype=torch.int32)
        self.decode_steps = shape.decode_steps
        self.history, self.history_index = zeros(shape.decode_steps, shape.max_batch_size), zeros(1)
        self.seen = zeros(slots, shape.seen_tokens, dtype=torch.bool) if shape.seen_tokens else None
        self.stop_ids = torch.tensor(sorted(set(stop_ids)), device=device)
        self.position_step = torch.tensor([0, 1] if shape.coordinates == 2 else [1], device=device)

    def per_slot(self) -> list[torch.Tensor]:
        """Return every tensor whose first dimension is the slot."""
        state = [
            self.next_token,
            self.cache_length,
            self.tokens_left,
            self.sequence_id,
            self.answer_length,
            self.adapter,
            self.position,
            self.page_table,
        ]
        return state if self.seen is None else [*state, self.seen]

    def place(self, batch: PrefillBatch) -> None:
        """Put the sequences of a prefill into their slots."""
        for tensor, values in (
            (self.next_token, batch.next_token),
            (self.cache_length, batch.cache_length),
            (self.tokens_left, batch.tokens_left),
            (self.sequence_id, batch.sequence_id),
            (self.answer_length, batch.answer_length),
            (self.adapter, batch.adapter),
            (self.position, batch.next_position.t()),
        ):
            tensor[batch.slot] = values

    def clear(self, slots: torch.Tensor) -> None:
        """Let slots (R,) belong to no sequence, so that decode steps write their tokens to the scratch page."""
        self.cache_length.index_fill_(0, slots, 0)
        self.tokens_left.index_fill_(0, slots, 0)
        self.page_table.index_fill_(0, slots, SCRATCH_PAGE)
        if self.seen is not None:
            self.seen.index_fill_(0, slots, False)

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Move what is in slots `sources` (R,) to slots `targets` (R,)."""
        for tensor in self.per_slot():
            tensor[targets] = tensor[sources]
        self.clear(sources)

    def advance_by_kernel(self, chosen: torch.Tensor) -> None:
        """The same as `advance`, where the kernel runs."""
        if self.seen is not None:
            self.seen[: len(chosen)].scatter_(1, chosen[:, None], True)
        load_next_token().advance(
            chosen,
            self.next_token,
            self.history,
            self.history_index,
            self.cache_length,
            self.answer_length,
            self.tokens_left,
            self.position,
            self.stop_ids,
        )

    def advance(self, chosen: torch.Tensor) -> None:
        """Append `chosen` (B,), the tokens of the first B slots; sequences that have ended keep their state."""
        size = len(chosen)
        running = (self.tokens_left[:size] > 0).long()
        if self.seen is not None:
            self.seen[:size].scatter_(1, chosen[:, None], True)
        self.next_token[:size] = chosen
        self.history[:, :size].index_copy_(0, self.history_index, chosen[None])
        self.cache_length[:size] += running
        self.answer_length[:size] += running
        self.position[:size] += running[:, None] * self.position_step
        stopped = torch.isin(chosen, self.stop_ids)
        self.tokens_left[:size] = torch.where(stopped, 0, self.tokens_left[:size] - running)
        self.history_index.copy_((self.history_index + 1) % self.decode_steps)
