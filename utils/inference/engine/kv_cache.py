"""
The engine's memory on the device: keys and values of every slot, and where the sequence in each slot stands.

`ModelRunner` writes both in prefill and in every decode step; nothing here moves or grows while the engine lives,
because CUDA graphs replay on the same addresses.

Shapes: B sequences of a decode step, T tokens, K key/value heads, D head size, R sequences and N tokens of a prefill.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from utils.inference.engine.prefill import PrefillBatch


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes that one token of one sequence takes in the KV cache, over all layers."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize


@dataclass
class LayerKVCache:
    """One layer's slots in place of transformers' cache: keys and values (max_batch_size, K, max_seq_len, D)."""

    keys: torch.Tensor
    values: torch.Tensor
    next_index: torch.Tensor  # (B,) int64: where the next token of each of the first B slots goes

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, **kwargs):
        """Write one token per sequence, (B, K, 1, D), into the first B slots; return the keys and values of all."""
        slots = torch.arange(key.shape[0], device=key.device)
        self.keys[slots, :, self.next_index] = key[:, :, 0]
        self.values[slots, :, self.next_index] = value[:, :, 0]
        return self.keys, self.values


@dataclass
class PromptRecorder:
    """Takes the cache's place during prefill: keeps a layer's keys and values of the prompts, (1, K, N, D)."""

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
        coordinates: of a position: 2 for ChatGLM-6B, else 1.
        decode_steps: whose tokens `history` keeps.
        seen_tokens: size of the vocabulary if a repetition penalty needs each sequence's tokens, else 0.
    """

    max_batch_size: int
    coordinates: int
    decode_steps: int
    seen_tokens: int


class DecodeState:
    """
    Per-slot decode state on the device: last token, cache length, tokens left, position, adapter.

    int64, one a slot:
        next_token: the last token of the sequence, which the next decode step computes.
        cache_length: tokens in the KV cache, so the index where that token goes.
        tokens_left: how many more may come; 0 once a stop token came.
        sequence_id, answer_length: with the seed they decide a sampled token.
        adapter: number of the adapter; 0 is none.
        position: (max_batch_size, coordinates). ChatGLM-6B's first coordinate stays where the answer began.

    `history` (decode_steps, max_batch_size) holds the chosen tokens, `history_index` (1,) the row that is written
    next; `seen` (max_batch_size, vocabulary) bool, the tokens of prompt and answer, or None.
    """

    def __init__(self, shape: DecodeStateShape, stop_ids: Collection[int], device: torch.device):
        def zeros(*sizes: int) -> torch.Tensor:
            return torch.zeros(*sizes, dtype=torch.int64, device=device)

        slots = shape.max_batch_size
        self.next_token, self.cache_length, self.tokens_left = zeros(slots), zeros(slots), zeros(slots)
        self.sequence_id, self.answer_length, self.adapter = zeros(slots), zeros(slots), zeros(slots)
        self.position = zeros(slots, shape.coordinates)
        self.decode_steps = shape.decode_steps
        self.history, self.history_index = zeros(shape.decode_steps, slots), zeros(1)
        self.seen = None
        if shape.seen_tokens:
            self.seen = torch.zeros(slots, shape.seen_tokens, dtype=torch.bool, device=device)
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
        ]
        return state if self.seen is None else [*state, self.seen]

    def place(self, batch: PrefillBatch) -> None:
        """Put the sequences of a prefill into their slots."""
        for tensor, values in (
            (self.next_token, batch.next_token),
            (self.cache_length, batch.cache_length),
            (self.tokens_left, batch.max_new_tokens),
            (self.sequence_id, batch.sequence_id),
            (self.adapter, batch.adapter),
            (self.position, batch.next_position.t()),
        ):
            tensor[batch.slot] = values
        self.answer_length.index_fill_(0, batch.slot, 0)
        if self.seen is not None:
            true = torch.ones((), dtype=torch.bool, device=self.seen.device)
            self.seen.index_fill_(0, batch.slot, False)
            self.seen.index_put_((batch.token_slot, batch.token_ids), true)
            self.seen.index_put_((batch.slot, batch.next_token), true)

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
