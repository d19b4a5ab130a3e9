"""
Triton kernels for a step of decoding, in which few rows meet all weights and their own cache: attention that reads of
each slot what is filled, and the product with FP8 weights that reads them once.

Shapes: B rows, H query heads, K key/value heads, G = H / K, D head size, S columns of a slot.
"""

import torch
import triton
import triton.language as tl

ROWS = 64  # up to here the product is bound by reading the weight
LEAST = 16  # rows of the smallest tile of a product
PROGRAMS = 512  # that keep a GPU busy with reading
COLUMNS = 64  # of a slot, at a time


@triton.jit
def _attention_kernel(
    query_ptr,  # (B, K, G, D)
    key_ptr,  # (slots, K, S, D)
    value_ptr,
    last_ptr,  # (B,) int64: the last column that is filled
    part_ptr,  # (B * K, PARTS, G, D) float32
    log_ptr,  # (B * K, PARTS, G) float32
    S,
    scaling,  # with log2(e) in it
    G: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,  # G, at least what a product takes
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    KV_HEADS: tl.constexpr,
):
    row_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, d, s = tl.arange(0, TILE), tl.arange(0, D), tl.arange(0, BLOCK)
    columns = tl.load(last_ptr + row_head // KV_HEADS).to(tl.int32) + 1
    share = tl.cdiv(tl.cdiv(columns, PARTS), BLOCK) * BLOCK
    first = part * share
    end = min(columns, first + share)
    slot = row_head * S * D
    query = tl.load(query_ptr + (row_head * G + g[:, None]) * D + d[None, :], mask=g[:, None] < G, other=0.0)
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
    place = (row_head * PARTS + part) * G + g
    output = output / tl.maximum(total, 1e-30)[:, None]
    tl.store(part_ptr + place[:, None] * D + d[None, :], output.to(part_ptr.dtype.element_ty), mask=g[:, None] < G)
    tl.store(log_ptr + place, tl.where(total > 0, best + tl.log2(total), -1e30), mask=g < G)


@triton.jit
def _join_kernel(
    part_ptr,  # (B * K, PARTS, G, D) float32
    log_ptr,  # (B * K, PARTS, G) float32
    output_ptr,  # (B, K, G, D)
    G: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
):
    row_head, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p, d = tl.arange(0, PARTS), tl.arange(0, D)
    place = (row_head * PARTS + p) * G + g
    log = tl.load(log_ptr + place)
    weights = tl.exp2(log - tl.max(log, 0))
    parts = tl.load(part_ptr + place[:, None] * D + d[None, :])
    output = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(output_ptr + (row_head * G + g) * D + d, output.to(output_ptr.dtype.element_ty))


def attend(
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
    wanted = min(triton.cdiv(PROGRAMS, B * heads), triton.cdiv(S, COLUMNS), 16)
    parts = triton.next_power_of_2(wanted)
    output = query.new_empty(B, 1, H, D)
    part = output if parts == 1 else query.new_empty(B * heads, parts, G, D, dtype=torch.float32)
    log = query.new_empty(B * heads, parts, G, dtype=torch.float32)
    _attention_kernel[(B * heads, parts)](
        query.contiguous(),
        keys,
        values,
        last,
        part,
        log,
        S,
        scaling * 1.4426950408889634,
        G=G,
        D=D,
        TILE=max(LEAST, triton.next_power_of_2(G)),
        PARTS=parts,
        BLOCK=COLUMNS,
        KV_HEADS=heads,
        num_warps=4,
        num_stages=3,
    )
    if parts > 1:
        _join_kernel[(B * heads, G)](part, log, output, G=G, D=D, PARTS=parts, num_warps=1)
    return output


@triton.jit
def _fp8_kernel(
    x_ptr,  # (M, K) e4m3
    x_scale_ptr,  # (M,) float32
    weight_ptr,  # (N, K) e4m3
    weight_scale_ptr,  # (N,) float32
    y_ptr,  # (PARTS, M, N)
    M,
    N,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m, k, part = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.program_id(1)
    steps: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    share: tl.constexpr = (steps + PARTS - 1) // PARTS
    x = x_ptr + m[:, None] * K + k[None, :] + part * share * BLOCK_K
    weight = weight_ptr + n[:, None].to(tl.int64) * K + k[None, :] + part * share * BLOCK_K
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(min(share, steps - part * share)):
        x_tile = tl.load(x, mask=m[:, None] < M, other=0.0)
        weight_tile = tl.load(weight, mask=n[:, None] < N, other=0.0)
        total = tl.dot(x_tile, tl.trans(weight_tile), total)
        x += BLOCK_K
        weight += BLOCK_K
    x_scale = tl.load(x_scale_ptr + m, mask=m < M, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + n, mask=n < N, other=0.0)
    total *= x_scale[:, None] * weight_scale[None, :]
    y = y_ptr + (part * M + m[:, None]) * N + n[None, :]
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def _sum_kernel(y_ptr, output_ptr, SIZE, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(y_ptr + part * SIZE + i, mask=i < SIZE, other=0.0)
    tl.store(output_ptr + i, total.to(output_ptr.dtype.element_ty), mask=i < SIZE)


def fits_fp8_product(weight: torch.Tensor) -> bool:
    """Whether the (N, K) weight can be read in whole tiles along K."""
    return weight.shape[1] % 128 == 0


@torch.library.custom_op("chatglm_family::fp8_product", mutates_args=())
def fp8_product(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """
    Args:
        x: (M, K) e4m3, M at most ROWS.
        x_scale: (M, 1) float32, weight_scale: (1, N) float32.
        weight: (N, K) e4m3, see `fits_fp8_product`.

    Returns:
        (M, N) bfloat16.
    """
    (M, K), N = x.shape, weight.shape[0]
    parts = 1 if N * K >= 1 << 26 else 4  # where the rows of the weight alone do not occupy a GPU
    y = x.new_empty(parts, M, N, dtype=torch.bfloat16 if parts == 1 else torch.float32)
    rows = 64
    _fp8_kernel[(triton.cdiv(N, rows), parts)](
        x,
        x_scale,
        weight,
        weight_scale,
        y,
        M,
        N,
        K=K,
        PARTS=parts,
        BLOCK_M=max(LEAST, triton.next_power_of_2(M)),
        BLOCK_N=rows,
        BLOCK_K=128,
        num_warps=4,
        num_stages=6 if parts == 1 else 4,
    )
    if parts == 1:
        return y[0]
    output = x.new_empty(M, N, dtype=torch.bfloat16)
    _sum_kernel[(triton.cdiv(M * N, 1024),)](y, output, M * N, PARTS=parts, BLOCK=1024, num_warps=4)
    return output


@fp8_product.register_fake
def _(x, x_scale, weight, weight_scale):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16)
