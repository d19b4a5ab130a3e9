"""
Triton kernels for a step of decoding, in which few rows meet all weights and their own cache. Here attention, which
reads of each slot what is filled; in utils/kernels/skinny_gemm.py products that read their weight once.

A kernel's programs that share a result each leave a part and count themselves; the last one puts the parts together.
On Hopper and newer a kernel is launched while the one before it ends (programmatic dependent launch, CUDA C++
Programming Guide) and waits before it reads.

Shapes: B rows, H query heads, K key/value heads, G = H / K, D head size, S columns of a slot.
"""

import torch
import triton
import triton.language as tl

from utils.kernels.triton_utils import (
    MIN_TILE_ROWS,
    TARGET_PROGRAMS,
    arrival_counters,
    is_last_program,
    supports_pdl,
    wait_for_inputs,
)

KV_BLOCK = 64  # of a slot, at a time


@triton.jit
def _attention_kernel(
    query_ptr,  # (B, K, G, D)
    key_ptr,  # (slots, K, S, D)
    value_ptr,
    last_ptr,  # (B,) int64: the last column that is filled
    output_ptr,  # (B, K, G, D)
    part_ptr,  # (B * K, SPLITS, G, D) float32
    log_ptr,  # (B * K, SPLITS, G) float32
    count_ptr,  # (B * K,) int32, see `arrival_counters`
    S,
    scaling,  # with log2(e) in it
    G: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,  # G, at least what a product takes
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait_for_inputs()
    row_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, d, s = tl.arange(0, TILE), tl.arange(0, D), tl.arange(0, BLOCK)
    columns = tl.load(last_ptr + row_head // KV_HEADS).to(tl.int32) + 1
    share = tl.cdiv(tl.cdiv(columns, SPLITS), BLOCK) * BLOCK
    first = part * share
    end = min(columns, first + share)
    slot = row_head * S * D
    heads = g[:, None] < G
    query = tl.load(query_ptr + (row_head * G + g[:, None]) * D + d[None, :], mask=heads, other=0.0)
    best = tl.full((TILE,), -1e30, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    output = tl.zeros((TILE, D), tl.float32)
    for start in range(first, end, BLOCK):
        known = (start + s) < end
        place = slot + (start + s[:, None]) * D + d[None, :]
        key = tl.load(key_ptr + place, mask=known[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(key)) * scaling
        scores = tl.where(known[None, :], scores, -1e30)
        higher = tl.maximum(best, tl.max(scores, 1))
        weights = tl.where(known[None, :], tl.exp2(scores - higher[:, None]), 0.0)
        shrink = tl.exp2(best - higher)
        value = tl.load(value_ptr + place, mask=known[:, None], other=0.0)
        output = output * shrink[:, None] + tl.dot(weights.to(value.dtype), value)
        total = total * shrink + tl.sum(weights, 1)
        best = higher
    whole = output_ptr + (row_head * G + g[:, None]) * D + d[None, :]
    if SPLITS == 1:
        tl.store(whole, (output / total[:, None]).to(output_ptr.dtype.element_ty), mask=heads)
    else:
        output = output / tl.maximum(total, 1e-30)[:, None]
        log = tl.where(total > 0, best + tl.log2(total), -1e30)
        place = (row_head * SPLITS + part) * G + g
        tl.store(part_ptr + place[:, None] * D + d[None, :], output, mask=heads)
        tl.store(log_ptr + place, log, mask=g < G)
        if is_last_program(count_ptr + row_head, SPLITS):
            best = tl.full((TILE,), -1e30, tl.float32)
            total = tl.zeros((TILE,), tl.float32)
            output = tl.zeros((TILE, D), tl.float32)
            for other in tl.static_range(SPLITS):
                place = (row_head * SPLITS + other) * G + g
                log = tl.load(log_ptr + place, mask=g < G, other=-1e30, cache_modifier=".cg")
                there = part_ptr + place[:, None] * D + d[None, :]
                values = tl.load(there, mask=heads, other=0.0, cache_modifier=".cg")
                higher = tl.maximum(best, log)
                weight, shrink = tl.exp2(log - higher), tl.exp2(best - higher)
                output = output * shrink[:, None] + values * weight[:, None]
                total = total * shrink + weight
                best = higher
            tl.store(whole, (output / total[:, None]).to(output_ptr.dtype.element_ty), mask=heads)


def decode_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, last: torch.Tensor, scaling: float
) -> torch.Tensor:
    """
    Args:
        query: (B, H, 1, D) in 16 bits, D a power of 2.
        keys, values: (slots, K, S, D); the first B slots are read.
        last: (B,) int64, the last column of each slot that is filled.

    Returns:
        (B, 1, H, D).
    """
    B, H, _, D = query.shape
    heads, S = keys.shape[1], keys.shape[2]
    G = H // heads
    parts = triton.next_power_of_2(min(triton.cdiv(TARGET_PROGRAMS, B * heads), triton.cdiv(S, KV_BLOCK), 16))
    output = query.new_empty(B, 1, H, D)
    part = query.new_empty(B * heads, parts, G, D, dtype=torch.float32) if parts > 1 else output
    log = query.new_empty(B * heads, parts, G, dtype=torch.float32)
    pdl = supports_pdl(query.device)
    _attention_kernel[(B * heads, parts)](
        query.contiguous(),
        keys,
        values,
        last,
        output,
        part,
        log,
        arrival_counters(query.device),
        S,
        scaling * 1.4426950408889634,
        G=G,
        D=D,
        TILE=max(MIN_TILE_ROWS, triton.next_power_of_2(G)),
        SPLITS=parts,
        BLOCK=KV_BLOCK,
        KV_HEADS=heads,
        PDL=pdl,
        num_warps=4,
        num_stages=3,
        **({"launch_pdl": True} if pdl else {}),
    )
    return output
