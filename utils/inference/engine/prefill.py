"""
Prompts packed for one prefill: a plan of the scheduler in, one `PrefillBatch` of named tensors out.

Prompts are packed without padding between them; on a GPU the packed batch is padded as a whole to one of a few
lengths, because each length is captured as a CUDA graph. A batch whose tokens attend to cached ones too is not padded:
its `past` says where those lie.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from utils.inference.engine.pages import PAGE_TOKENS, SCRATCH_PAGE
from utils.inference.engine.scheduler import PrefillPlan, TokenSequence

MIN_PREFILL_TOKENS = 128  # the shortest captured prefill
MAX_PREFILL_TOKENS = 4096  # of one prefill, with kernels: enough to keep a GPU busy
MAX_HOST_PREFILL_TOKENS = 1024  # where attention takes one sequence after another

PositionIdsOf = Callable[[TokenSequence, int, int], list[list[int]]]  # see `ServedModel.position_ids`


def padded_prefill_length(tokens: int) -> int:
    """Round a prefill length up to the next bucket (2^k or 1.5 * 2^k)."""
    size = MIN_PREFILL_TOKENS
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


@dataclass(frozen=True, eq=False)
class PastTokens:
    """
    The M cached tokens, those of this prefill among them, that R sequences attend to, sequence by sequence.

    A token attends to all of its sequence's up to itself; the prefilled ones are the last.
    """

    page: torch.Tensor  # (M,) int64
    offset: torch.Tensor  # (M,) int64, place in the page
    cu_seqlens: torch.Tensor  # (R + 1,) int32, where each sequence begins, and M
    longest: int  # tokens of a sequence

    def to(self, device: torch.device) -> "PastTokens":
        """Return a copy on `device`."""
        return PastTokens(*(_send(t, device) for t in (self.page, self.offset, self.cu_seqlens)), self.longest)


@dataclass(frozen=True, eq=False)
class PrefillBatch:
    """
    Chunks of R sequences packed into N tokens. The last token of a sequence is left for the first decode step.

    The tensors are int64 views of three `buffers`, so that a batch reaches the device in three copies.
    """

    slot: torch.Tensor  # (R,) slot of each sequence; the unused one for a sequence that does not decode yet
    next_token: torch.Tensor  # (R,) its last token
    cache_length: torch.Tensor  # (R,) its other tokens, which are in the cache after this prefill
    tokens_left: torch.Tensor  # (R,) that it may still answer
    sequence_id: torch.Tensor  # (R,)
    answer_length: torch.Tensor  # (R,) tokens of its answer so far
    adapter: torch.Tensor  # (R,)
    next_position: torch.Tensor  # (C, R) position of `next_token`; C = 2 for ChatGLM-6B, else 1
    token_ids: torch.Tensor  # (N,)
    token_page: torch.Tensor  # (N,) page of the cache
    token_offset: torch.Tensor  # (N,) place in the page
    token_adapter: torch.Tensor  # (N,)
    position_ids: torch.Tensor  # (C, N)
    cu_seqlens: torch.Tensor  # (R + 1,) int32, where each sequence begins, and N
    bidirectional_prefix: bool  # ChatGLM-6B's: tokens before `<sop>` attend to each other in both directions
    needs_mask: bool  # some prompt has tokens of both kinds, causal and bidirectional
    past: PastTokens | None  # None where every sequence begins in this prefill
    buffers: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    @classmethod
    def from_buffers(
        cls, buffers: tuple[torch.Tensor, torch.Tensor, torch.Tensor], **others: bool | PastTokens | None
    ) -> "PrefillBatch":
        """
        Return a batch whose tensors are views of `buffers`.

        Args:
            buffers: (7 + C, R) int64, (4 + C, N) int64 and (R + 1,) int32: the tensors above in their order.
        """
        per_sequence, per_token, cu_seqlens = buffers
        slot, next_token, cache_length, tokens_left, sequence_id, answer_length, adapter = per_sequence[:7]
        token_ids, token_page, token_offset, token_adapter = per_token[:4]
        return cls(
            slot=slot,
            next_token=next_token,
            cache_length=cache_length,
            tokens_left=tokens_left,
            sequence_id=sequence_id,
            answer_length=answer_length,
            adapter=adapter,
            next_position=per_sequence[7:],
            token_ids=token_ids,
            token_page=token_page,
            token_offset=token_offset,
            token_adapter=token_adapter,
            position_ids=per_token[4:],
            cu_seqlens=cu_seqlens,
            buffers=buffers,
            **others,
        )

    @property
    def tokens(self) -> int:
        """N, the number of packed tokens."""
        return len(self.token_ids)

    def prefix_lengths(self) -> torch.Tensor:
        """(R,) int64 tokens of each sequence's prefix, which all of it attends to; ChatGLM-6B's, else 0."""
        lengths = torch.zeros(len(self.slot), dtype=torch.int64)
        if self.bidirectional_prefix:
            sequence = torch.bucketize(torch.arange(self.tokens), self.cu_seqlens, right=True) - 1
            # The second coordinate counts from `<sop>` on; padding belongs to no sequence.
            in_prefix = (self.position_ids[1] == 0) & (sequence < len(self.slot))
            lengths.index_add_(0, sequence[in_prefix], torch.ones_like(sequence[in_prefix]))
        return lengths

    def padded(self, sequences: int, unused_slot: int) -> "PrefillBatch":
        """
        Return the batch with `sequences` sequences and a bucket's number of tokens.

        Padding goes to `unused_slot` and the scratch page; its tokens belong to no sequence.
        """
        per_sequence, per_token, cu_seqlens = self.buffers
        padding = torch.zeros(len(per_sequence), sequences - per_sequence.shape[1], dtype=torch.int64)
        padding[0] = unused_slot
        tokens = torch.zeros(len(per_token), padded_prefill_length(self.tokens) - self.tokens, dtype=torch.int64)
        tokens[1] = SCRATCH_PAGE
        buffers = (
            torch.cat((per_sequence, padding), dim=1),
            torch.cat((per_token, tokens), dim=1),
            torch.cat((cu_seqlens, cu_seqlens[-1:].expand(padding.shape[1]))),
        )
        return self._with_buffers(buffers, self.past)

    def to(self, device: torch.device) -> "PrefillBatch":
        """Return a copy on `device`."""
        buffers = tuple(_send(buffer, device) for buffer in self.buffers)
        return self._with_buffers(buffers, self.past and self.past.to(device))

    def _with_buffers(
        self, buffers: tuple[torch.Tensor, torch.Tensor, torch.Tensor], past: PastTokens | None
    ) -> "PrefillBatch":
        return PrefillBatch.from_buffers(
            buffers, bidirectional_prefix=self.bidirectional_prefix, needs_mask=self.needs_mask, past=past
        )

    def copy_from(self, batch: "PrefillBatch") -> None:
        """Overwrite the tensors of this batch, on the device, with those of another of the same shape on the host."""
        for target, source in zip(self.buffers, batch.buffers, strict=True):
            target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to `device`; to a GPU without waiting for it."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def pack_chunks(
    plan: PrefillPlan, position_ids_of: PositionIdsOf, unused_slot: int, bidirectional_prefix: bool = False
) -> PrefillBatch:
    """
    Return the chunks of a plan as a batch on the host, not padded.

    Args:
        unused_slot: for chunks that are not the last of their sequence.
        bidirectional_prefix: see `PrefillBatch`.
    """
    per_sequence: list[list[int]] = []
    token_ids, token_page, token_offset, token_adapter = [], [], [], []
    position_ids: list[list[int]] = [[] for _ in range(2 if bidirectional_prefix else 1)]
    cu_seqlens, needs_mask = [0], False
    for chunk in plan.chunks:
        sequence, tokens = chunk.sequence, chunk.sequence.token_ids
        coordinates = position_ids_of(sequence, chunk.start, chunk.stop + 1)
        next_position = [positions.pop() for positions in coordinates]
        for packed, positions in zip(position_ids, coordinates, strict=True):
            packed.extend(positions)
        token_ids.extend(tokens[chunk.start : chunk.stop])
        token_page.extend(chunk.pages[index // PAGE_TOKENS] for index in range(chunk.start, chunk.stop))
        token_offset.extend(index % PAGE_TOKENS for index in range(chunk.start, chunk.stop))
        token_adapter.extend([sequence.adapter] * (chunk.stop - chunk.start))
        answered = len(sequence.answer_ids)
        limits = [sequence.max_new_tokens - answered, sequence.sequence_id, answered, sequence.adapter]
        slot = unused_slot if chunk.slot is None else chunk.slot
        per_sequence.append([slot, tokens[chunk.stop], chunk.stop, *limits, *next_position])
        cu_seqlens.append(len(token_ids))
        if bidirectional_prefix and chunk.stop and coordinates[1][-1] != 0:  # `<sop>` is not the last token
            needs_mask = True
    buffers = (
        torch.tensor(per_sequence).t().contiguous(),
        torch.tensor([token_ids, token_page, token_offset, token_adapter, *position_ids], dtype=torch.int64),
        torch.tensor(cu_seqlens, dtype=torch.int32),
    )
    past = _past_of(plan) if any(chunk.start for chunk in plan.chunks) else None
    return PrefillBatch.from_buffers(
        buffers, bidirectional_prefix=bidirectional_prefix, needs_mask=needs_mask, past=past
    )


def _past_of(plan: PrefillPlan) -> PastTokens:
    lengths = torch.tensor([0, *(chunk.stop for chunk in plan.chunks)])
    pages = [
        torch.tensor(chunk.pages, dtype=torch.int64).repeat_interleave(PAGE_TOKENS)[: chunk.stop]
        for chunk in plan.chunks
    ]
    offsets = [torch.arange(chunk.stop) % PAGE_TOKENS for chunk in plan.chunks]
    return PastTokens(torch.cat(pages), torch.cat(offsets), lengths.cumsum(0).int(), int(lengths.max()))
