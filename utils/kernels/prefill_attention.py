"""
Attention of packed prompts over the pages of the KV cache, as one Triton kernel.

Called by utils/inference/engine/attention.py. torch's varlen attention wants keys side by side, so cached ones would
be gathered first, and starts programs for the longest prompt times the number of prompts, most of them without work in
a CUDA graph, whose sizes are fixed. Here the host lists tiles of up to 64 tokens of one prompt each, so the programs
are as many as the tokens need, and a prompt, the rest of one whose beginning is cached, and a chunk of a long one are
the same to the kernel.

Softmax is computed online (Milakov and Gimelshein, arXiv:1805.02867), in powers of 2.

Shapes: N tokens, T tiles, H query heads, K key/value heads, G = H / K, D head size.
"""

import torch
import triton
import triton.language as tl

from utils.kernels.triton_utils import early_launch, launch_next_and_wait

TILE_TOKENS = 64
TILE_FIELDS = 5  # first token, tokens, position of the first, place of the first page in the list, prefix
WARPS_PER_HEAD, STAGES = 4, 2
LOG2_E = 1.4426950408889634


@triton.jit
def _prefill_attention_kernel(
    query_ptr,  # (N, H, D)
    key_ptr,  # (pages, K, BLOCK, D)
    value_ptr,  # (pages, K, BLOCK, D)
    tile_ptr,  # (T, FIELDS) int32
    page_ptr,  # int32
    output_ptr,  # (N, H, D)
    scaling,  # times log2(e), because the kernel takes powers of 2
    H: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    FIELDS: tl.constexpr,
    HEADS: tl.constexpr,  # query heads of a program, which have one key head
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        launch_next_and_wait()
    tile, first_head = tile_ptr + tl.program_id(0) * FIELDS, tl.program_id(1) * HEADS
    tokens = tl.load(tile + 1)
    if tokens == 0:
        return
    first, position = tl.load(tile), tl.load(tile + 2)
    pages, prefix = page_ptr + tl.load(tile + 3), tl.load(tile + 4)
    kv_head = first_head // (H // KV_HEADS)
    row, d, s = tl.arange(0, HEADS * TOKENS), tl.arange(0, D), tl.arange(0, BLOCK)
    token, head = row % TOKENS, first_head + row // TOKENS
    inside = token[:, None] < tokens
    place = ((first + token).to(tl.int64) * H + head)[:, None] * D + d[None, :]
    query = tl.load(query_ptr + place, mask=inside, other=0.0)
    visible = tl.maximum(position + token + 1, prefix)  # keys
    end = tl.maximum(position + tokens, prefix)
    highest = tl.full((HEADS * TOKENS,), -1e30, tl.float32)
    total = tl.zeros((HEADS * TOKENS,), tl.float32)
    output = tl.zeros((HEADS * TOKENS, D), tl.float32)
    for start in range(0, end, BLOCK):
        filled = (start + s)[:, None] < end
        page = tl.load(pages + start // BLOCK).to(tl.int64)
        offset = (page * KV_HEADS + kv_head) * BLOCK * D + s[:, None] * D + d[None, :]
        key = tl.load(key_ptr + offset, mask=filled, other=0.0)
        scores = tl.dot(query, tl.trans(key)) * scaling
        scores = tl.where((start + s)[None, :] < visible[:, None], scores, -1e30)
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        value = tl.load(value_ptr + offset, mask=filled, other=0.0)
        output = output * shrink[:, None] + tl.dot(weights.to(value.dtype), value)
        total = total * shrink + tl.sum(weights, 1)
        highest = new_highest
    tl.store(output_ptr + place, (output / total[:, None]).to(output_ptr.dtype.element_ty), mask=inside)


def prefill_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tiles: torch.Tensor,
    pages: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """
    Attention of packed tokens, each over the cached tokens of its sequence up to itself, and over its prefix.

    Args:
        query: (N, H, D) float16 or bfloat16, D a power of 2.
        keys: (pages, K, page size, D), contiguous, in the dtype of `query`; the page size is a power of 2 from 16 on.
            Those of the N tokens are in it.
        values: as `keys`.
        tiles: (T, 5) int32, contiguous: the first token, how many, at most 64 of one sequence; the position of the
            first in the sequence; where in `pages` the sequence's begin; how many of its first tokens all of it sees.
            Tiles without tokens are skipped.
        pages: (P,) int32, the pages of all sequences, those of one in their order.
        scaling: factor of the scores, usually D ** -0.5.

    Returns:
        (N, H, D) in the dtype of `query`; undefined for tokens of no tile.
    """
    _, H, D = query.shape
    K = keys.shape[1]
    heads = 2 if H // K % 2 == 0 else 1
    query = query.contiguous()
    output = torch.empty_like(query)
    _prefill_attention_kernel[(len(tiles), H // heads)](
        query,
        keys,
        values,
        tiles,
        pages,
        output,
        scaling * LOG2_E,
        H=H,
        KV_HEADS=K,
        D=D,
        TOKENS=TILE_TOKENS,
        FIELDS=TILE_FIELDS,
        HEADS=heads,
        BLOCK=keys.shape[2],
        num_warps=WARPS_PER_HEAD * heads,
        num_stages=STAGES,
        **early_launch(query.device),
    )
    return output
