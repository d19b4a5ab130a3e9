"""
Prompts packed for one prefill: token sequences and their slots in, one `PrefillBatch` of named tensors out.

Prompts are packed without padding between them; on a GPU the packed batch is padded as a whole to one of a few
lengths, because each length is captured as a CUDA graph.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from utils.inference.engine.scheduler import TokenSequence

MIN_PREFILL_TOKENS = 128  # the shortest captured prefill
MAX_PREFILL_TOKENS = 4096  # of one prefill, with kernels: enough to keep a GPU busy; a longer prompt goes alone
MAX_MASKED_PREFILL_TOKENS = 1024  # where a mask of tokens x tokens separates the prompts


def padded_prefill_length(tokens: int) -> int:
    """Round a prefill length up to the next bucket (2^k or 1.5 * 2^k)."""
    size = MIN_PREFILL_TOKENS
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


@dataclass(frozen=True, eq=False)
class PrefillBatch:
    """
    R prompts packed into N tokens. The last token of each prompt is left for the first decode step.

    The tensors are int64 views of three `buffers`, so that a batch reaches the device in three copies.
    """

    slot: torch.Tensor  # (R,) cache slot of each sequence
    next_token: torch.Tensor  # (R,) last token of its prompt
    cache_length: torch.Tensor  # (R,) its other tokens, which this prefill puts into the cache
    max_new_tokens: torch.Tensor  # (R,)
    sequence_id: torch.Tensor  # (R,)
    adapter: torch.Tensor  # (R,)
    next_position: torch.Tensor  # (C, R) position of `next_token`; C = 2 for ChatGLM-6B, else 1
    token_ids: torch.Tensor  # (N,)
    token_slot: torch.Tensor  # (N,)
    token_index: torch.Tensor  # (N,) place in the slot
    token_adapter: torch.Tensor  # (N,)
    position_ids: torch.Tensor  # (C, N)
    cu_seqlens: torch.Tensor  # (R + 1,) int32, where each sequence begins, and N
    bidirectional_prefix: bool  # ChatGLM-6B's: tokens before `<sop>` attend to each other in both directions
    needs_mask: bool  # some prompt has tokens of both kinds, causal and bidirectional
    buffers: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    @classmethod
    def from_buffers(
        cls, buffers: tuple[torch.Tensor, torch.Tensor, torch.Tensor], bidirectional_prefix: bool, needs_mask: bool
    ) -> "PrefillBatch":
        """
        Return a batch whose tensors are views of `buffers`.

        Args:
            buffers: (6 + C, R) int64, (4 + C, N) int64 and (R + 1,) int32: the tensors above in their order.
        """
        per_sequence, per_token, cu_seqlens = buffers
        slot, next_token, cache_length, max_new_tokens, sequence_id, adapter = per_sequence[:6]
        token_ids, token_slot, token_index, token_adapter = per_token[:4]
        return cls(
            slot=slot,
            next_token=next_token,
            cache_length=cache_length,
            max_new_tokens=max_new_tokens,
            sequence_id=sequence_id,
            adapter=adapter,
            next_position=per_sequence[6:],
            token_ids=token_ids,
            token_slot=token_slot,
            token_index=token_index,
            token_adapter=token_adapter,
            position_ids=per_token[4:],
            cu_seqlens=cu_seqlens,
            bidirectional_prefix=bidirectional_prefix,
            needs_mask=needs_mask,
            buffers=buffers,
        )

    @property
    def tokens(self) -> int:
        """N, the number of packed tokens."""
        return len(self.token_ids)

    def mask(self) -> torch.Tensor:
        """(1, 1, N, N) bool, what each token attends to: its sequence's tokens up to itself, and its prefix."""
        sequence = torch.bucketize(torch.arange(self.tokens), self.cu_seqlens, right=True)
        visible = torch.ones(self.tokens, self.tokens, dtype=torch.bool).tril_()
        if self.bidirectional_prefix:
            visible |= self.position_ids[1] == 0  # ChatGLM-6B's second coordinate counts from `<sop>` on
        visible &= sequence[:, None] == sequence
        return visible[None, None]

    def padded(self, sequences: int, token_index: int) -> "PrefillBatch":
        """
        Return the batch with `sequences` sequences and a bucket's number of tokens.

        The first sequence is repeated without its tokens. Padding tokens belong to no sequence; their keys and values
        go to `token_index` of the first sequence's slot, which no answer may reach.
        """
        per_sequence, per_token, cu_seqlens = self.buffers
        missing = sequences - per_sequence.shape[1]
        first_slot, first_token = self.slot[0].item(), self.next_token[0].item()
        padding = torch.tensor([first_token, first_slot, token_index, *[0] * (len(per_token) - 3)])[:, None]
        missing_tokens = padded_prefill_length(self.tokens) - self.tokens
        buffers = (
            torch.cat((per_sequence, per_sequence[:, :1].expand(-1, missing)), dim=1),
            torch.cat((per_token, padding.expand(-1, missing_tokens)), dim=1),
            torch.cat((cu_seqlens, cu_seqlens[-1:].expand(missing))),
        )
        return PrefillBatch.from_buffers(buffers, self.bidirectional_prefix, self.needs_mask)

    def to(self, device: torch.device) -> "PrefillBatch":
        """Return a copy on `device`."""
        buffers = tuple(buffer.to(device) for buffer in self.buffers)
        return PrefillBatch.from_buffers(buffers, self.bidirectional_prefix, self.needs_mask)

    def copy_from(self, batch: "PrefillBatch") -> None:
        """Overwrite the tensors of this batch, on the device, with those of another of the same shape on the host."""
        for target, source in zip(self.buffers, batch.buffers, strict=True):
            target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)


def pack_prompts(
    sequences: Sequence[TokenSequence],
    slots: Sequence[int],
    position_ids_of: Callable[[Sequence[int]], list[list[int]]],
    bidirectional_prefix: bool,
) -> PrefillBatch:
    """
    Return prompts as a batch on the host, not padded.

    Args:
        slots: of each sequence.
        position_ids_of: a prompt's tokens -> their positions, one list per coordinate.
        bidirectional_prefix: see `PrefillBatch`.
    """
    per_sequence: list[list[int]] = []
    token_ids, token_slot, token_index, token_adapter = [], [], [], []
    position_ids: list[list[int]] = [[] for _ in range(2 if bidirectional_prefix else 1)]
    cu_seqlens, needs_mask = [0], False
    for slot, sequence in zip(slots, sequences, strict=True):
        *prompt, last = sequence.input_ids
        coordinates = position_ids_of(sequence.input_ids)
        next_position = [positions.pop() for positions in coordinates]
        for packed, positions in zip(position_ids, coordinates, strict=True):
            packed.extend(positions)
        token_ids.extend(prompt)
        token_slot.extend([slot] * len(prompt))
        token_index.extend(range(len(prompt)))
        token_adapter.extend([sequence.adapter] * len(prompt))
        limits = [sequence.max_new_tokens, sequence.sequence_id, sequence.adapter]
        per_sequence.append([slot, last, len(prompt), *limits, *next_position])
        cu_seqlens.append(len(token_ids))
        if bidirectional_prefix and prompt and coordinates[1][-1] != 0:  # `<sop>` is not the last token
            needs_mask = True
    buffers = (
        torch.tensor(per_sequence).t().contiguous(),
        torch.tensor([token_ids, token_slot, token_index, token_adapter, *position_ids], dtype=torch.int64),
        torch.tensor(cu_seqlens, dtype=torch.int32),
    )
    return PrefillBatch.from_buffers(buffers, bidirectional_prefix, needs_mask)
