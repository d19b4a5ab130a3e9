"""
Prompts packed for one prefill: a plan of the scheduler in, one `PrefillBatch` of named tensors out.

Prompts are packed without padding between them; for a CUDA graph the packed batch is padded as a whole to one of a few
lengths. Whether a prompt is whole, the rest of one whose beginning is cached, or a chunk of a long one, is the same to
attention: its kernel reads `PromptTiles`, and where there is none, attention by masks reads `PromptBounds`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from utils.common.numbers import ceil_div
from utils.inference.engine.pages import PAGE_TOKENS, SCRATCH_PAGE
from utils.inference.engine.scheduler import PrefillPlan, TokenSequence

MIN_PREFILL_TOKENS = 128  # the shortest captured prefill
MAX_PREFILL_TOKENS = 4096  # of one prefill, with kernels: enough to keep a GPU busy
MAX_HOST_PREFILL_TOKENS = 1024  # where attention takes one sequence after another
FINE_LENGTHS_FROM = 1024  # tokens, from which on padding would cost more than another graph
MIN_SEQUENCE_TOKENS = 8  # on average, of a padded batch: its number of tiles is fixed
TILE_TOKENS = 64  # as the kernel takes them

PositionIdsOf = Callable[[TokenSequence, int, int], list[list[int]]]  # see `ServedModel.position_ids`


def padded_prefill_length(tokens: int) -> int:
    """Round a prefill length up to the next bucket: 2 in an octave, and 4 for long ones."""
    size = MIN_PREFILL_TOKENS
    while 2 * size <= tokens:
        size *= 2
    step = size // (4 if size >= FINE_LENGTHS_FROM else 2)
    return ceil_div(max(tokens, size), step) * step


@dataclass(frozen=True, eq=False)
class PromptTiles:
    """
    What the attention kernel reads, see `prefill_attention`.

    The first of `pages` is the scratch page, for padding.
    """

    tiles: torch.Tensor  # (T, 5) int32
    pages: torch.Tensor  # (P,) int32

    @classmethod
    def of(cls, plan: PrefillPlan, prefixes: list[int]) -> "PromptTiles":
        """Return the tiles of a plan's chunks, each with its prefix."""
        tiles, pages, packed = [], [SCRATCH_PAGE], 0
        for chunk, prefix in zip(plan.chunks, prefixes, strict=True):
            for start in range(chunk.start, chunk.stop, TILE_TOKENS):
                count = min(TILE_TOKENS, chunk.stop - start)
                tiles.append((packed, count, start, len(pages), prefix))
                packed += count
            pages.extend(chunk.pages[: ceil_div(chunk.stop, PAGE_TOKENS)])
        return cls(torch.tensor(tiles, dtype=torch.int32).view(-1, 5), torch.tensor(pages, dtype=torch.int32))

    def padded(self, first: int, tokens: int, pages: int) -> "PromptTiles":
        """
        Return them with a fixed number of tiles and pages.

        Args:
            first: the first token of the padding, which gets tiles that attend to the scratch page.
            tokens: of the padded batch.
            pages: at least as many as there are.
        """
        padding = [(start, min(TILE_TOKENS, tokens - start), 0, 0, 0) for start in range(first, tokens, TILE_TOKENS)]
        tiles = torch.zeros(tokens // MIN_SEQUENCE_TOKENS + ceil_div(tokens, TILE_TOKENS) + 1, 5, dtype=torch.int32)
        used = len(self.tiles)
        tiles[:used] = self.tiles
        tiles[used : used + len(padding)] = torch.tensor(padding, dtype=torch.int32).view(-1, 5)
        return PromptTiles(
            tiles, torch.cat((self.pages, self.pages.new_full((pages - len(self.pages),), SCRATCH_PAGE)))
        )

    def to(self, device: torch.device) -> "PromptTiles":
        """Return a copy on `device`."""
        return PromptTiles(_send(self.tiles, device), _send(self.pages, device))


@dataclass(frozen=True, eq=False)
class PromptBounds:
    """
    What attention by masks reads: where each of R sequences begins, on the host.

    Where some are cached in part, M cached tokens, those of this prefill among them, are gathered, sequence by
    sequence.
    """

    starts: torch.Tensor  # (R + 1,) int32, of each sequence's tokens, and N
    key_starts: torch.Tensor  # (R + 1,) int32, of the tokens that it attends to, and M
    prefixes: torch.Tensor  # (R,) int64, see `packed_attention`
    gathered: tuple[torch.Tensor, torch.Tensor] | None  # (M,) int64, page and place in it; None: nothing is cached

    @classmethod
    def of(cls, plan: PrefillPlan, prefixes: list[int]) -> "PromptBounds":
        """Return the bounds of a plan's chunks, each with its prefix."""
        starts = torch.tensor([0, *(chunk.stop - chunk.start for chunk in plan.chunks)]).cumsum(0).int()
        key_starts = torch.tensor([0, *(chunk.stop for chunk in plan.chunks)]).cumsum(0).int()
        gathered = None
        if any(chunk.start for chunk in plan.chunks):
            pages = [
                torch.tensor(chunk.pages, dtype=torch.int64).repeat_interleave(PAGE_TOKENS)[: chunk.stop]
                for chunk in plan.chunks
            ]
            gathered = torch.cat(pages), torch.cat([torch.arange(chunk.stop) % PAGE_TOKENS for chunk in plan.chunks])
        return cls(starts, key_starts, torch.tensor(prefixes), gathered)

    def to(self, device: torch.device) -> "PromptBounds":
        """Return a copy whose `gathered` is on `device`."""
        return replace(self, gathered=self.gathered and tuple(_send(tensor, device) for tensor in self.gathered))


@dataclass(frozen=True, eq=False)
class PrefillBatch:
    """
    Chunks of R sequences packed into N tokens. The last token of a sequence is left for the first decode step.

    The tensors are int64 views of two `buffers`, so that a batch reaches the device in few copies.
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
    attention: PromptTiles | PromptBounds
    buffers: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def from_buffers(
        cls, buffers: tuple[torch.Tensor, torch.Tensor], attention: PromptTiles | PromptBounds
    ) -> "PrefillBatch":
        """
        Return a batch whose tensors are views of `buffers`.

        Args:
            buffers: (7 + C, R) and (4 + C, N) int64: the tensors above in their order.
        """
        per_sequence, per_token = buffers
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
            attention=attention,
            buffers=buffers,
        )

    @property
    def tokens(self) -> int:
        """N, the number of packed tokens."""
        return len(self.token_ids)

    @property
    def padded_length(self) -> int:
        """Tokens of the batch once `padded`."""
        return padded_prefill_length(max(self.tokens, MIN_SEQUENCE_TOKENS * len(self.slot)))

    def padded(self, sequences: int, pages: int, unused_slot: int) -> "PrefillBatch":
        """
        Return the batch, which has tiles, with `sequences` sequences, `pages` pages and a bucket's number of tokens.

        Padding goes to `unused_slot` and the scratch page.
        """
        (per_sequence, per_token), length = self.buffers, self.padded_length
        padding = torch.zeros(len(per_sequence), sequences - per_sequence.shape[1], dtype=torch.int64)
        padding[0] = unused_slot
        tokens = torch.zeros(len(per_token), length - self.tokens, dtype=torch.int64)
        tokens[1] = SCRATCH_PAGE
        buffers = torch.cat((per_sequence, padding), dim=1), torch.cat((per_token, tokens), dim=1)
        return PrefillBatch.from_buffers(buffers, self.attention.padded(self.tokens, length, pages))

    def to(self, device: torch.device) -> "PrefillBatch":
        """Return a copy on `device`."""
        per_sequence, per_token = (_send(buffer, device) for buffer in self.buffers)
        return PrefillBatch.from_buffers((per_sequence, per_token), self.attention.to(device))

    def copy_from(self, batch: "PrefillBatch") -> None:
        """Overwrite this padded batch, on the device, with another of the same shape on the host."""
        targets, sources = ((*each.buffers, each.attention.tiles, each.attention.pages) for each in (self, batch))
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to `device`; to a GPU without waiting for it."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def pack_chunks(
    plan: PrefillPlan,
    position_ids_of: PositionIdsOf,
    unused_slot: int,
    tiled: bool,
    bidirectional_prefix: bool = False,
) -> PrefillBatch:
    """
    Return the chunks of a plan as a batch on the host, not padded.

    Args:
        unused_slot: for chunks that are not the last of their sequence.
        tiled: whether attention runs by the kernel.
        bidirectional_prefix: whether tokens before `<sop>` attend to each other in both directions, as ChatGLM-6B's.
    """
    per_sequence: list[list[int]] = []
    token_ids, token_page, token_offset, token_adapter = [], [], [], []
    position_ids: list[list[int]] = [[] for _ in range(2 if bidirectional_prefix else 1)]
    prefixes = []
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
        # The second coordinate counts from `<sop>` on.
        prefixes.append(coordinates[1].count(0) if bidirectional_prefix else 0)
    buffers = (
        torch.tensor(per_sequence).t().contiguous(),
        torch.tensor([token_ids, token_page, token_offset, token_adapter, *position_ids], dtype=torch.int64),
    )
    return PrefillBatch.from_buffers(buffers, (PromptTiles if tiled else PromptBounds).of(plan, prefixes))
