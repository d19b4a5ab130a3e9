"""
Triton kernels over INT8 and INT4 weights: a skinny GEMM that reads the integers once, and the weight in 16 bits.

Called by utils/layers/quantization.py, whose format of the integers and scales this reads: for up to 64 rows, as in
decoding, the GEMM, which never writes a weight in 16 bits; for more rows, and in training, `dequantize_with_triton`
and cuBLAS. That one rounds integer times scale to float16, as the GPU kernels of the released checkpoints do. The
GEMM multiplies x by the integers, which are exact in 16 bits, and the float32 sums by the scale. Libraries
(bitsandbytes, torchao) have other formats and other roundings.

Shapes: x (M, K), weight (N, C) bytes, scale (N,), y (M, N). C = K for 8 bits. For 4 bits C = K / 2, and the high half
of a byte is the even element. A gated weight has 2 N rows, gate above up: y = silu(x gate^T) * (x up^T).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from utils.kernels.triton_utils import (
    MAX_COUNTERS,
    MIN_TILE_ROWS,
    arrival_counters,
    early_launch,
    is_last_program,
    sum_splits,
    wait_for_inputs,
)
from utils.kernels.tuning import tuned

MAX_ROWS = 64  # up to here loading the weight bounds a GEMM
DEQUANTIZE_BLOCK = 1024  # bytes of a weight's row in a program
TILE_ROWS = 64  # of the weight; the fewest that Hopper multiplies from registers
TILE_ELEMENTS = 128  # of K
SATURATING_PROGRAMS = 264  # two for each of 132 multiprocessors
MAX_SPLITS = 8  # of K
MAX_PIPELINE_SMEM = 98_304  # bytes of shared memory for tiles in flight, so that two programs share a multiprocessor
MAX_STAGES = 6  # tiles in flight


@triton.jit
def _unpack(packed, dtype: tl.constexpr):
    """Two signed 4-bit integers from each int8, the high half first, in 16 bits."""
    return (packed >> 4).to(dtype), ((packed << 4) >> 4).to(dtype)


@triton.jit
def _int_weight_gemm_kernel(
    x_ptr,  # (M, K) 16 bits; for 4 bits (M, C) int32, whose low half is the even element
    weight_ptr,  # (N, C) int8, or (2 N, C)
    scale_ptr,  # (N,) float16, or (2 N,)
    bias_ptr,  # (N,)
    y_ptr,  # (M, N) 16 bits
    partial_ptr,  # (SPLITS, M, N) float32
    count_ptr,  # (N / BLOCK_N,) int32, see `arrival_counters`
    M,
    N,
    C: tl.constexpr,
    BITS: tl.constexpr,
    GATED: tl.constexpr,  # then SPLITS is 1, and there is no bias
    BIASED: tl.constexpr,
    SPLITS: tl.constexpr,  # of C
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait_for_inputs()
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    weight_rows = tl.minimum(n, N - 1).to(tl.int64)
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    blocks_per_split: tl.constexpr = (blocks + SPLITS - 1) // SPLITS
    first = split * blocks_per_split
    to_up = tl.cast(N, tl.int64) * C
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)  # the weight's rows first, for tensor cores take 64 of them
    up = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for block in range(first, min(first + blocks_per_split, blocks)):
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        x = tl.load(x_ptr + m[:, None] * C + c[None, :], mask=(m[:, None] < M) & (c[None, :] < C), other=0)
        weight = weight_ptr + weight_rows[:, None] * C + c[None, :]
        inside = (c[None, :] < C) & (n[:, None] >= 0)
        packed = tl.load(weight) if C % BLOCK_C == 0 else tl.load(weight, mask=inside, other=0)
        if BITS == 8:
            total = tl.dot(packed.to(dtype), tl.trans(x), total)
        else:
            even = tl.trans(x.to(tl.int16).to(dtype, bitcast=True))
            odd = tl.trans((x >> 16).to(tl.int16).to(dtype, bitcast=True))
            high, low = _unpack(packed, dtype)
            total = tl.dot(low, odd, tl.dot(high, even, total))
        if GATED:
            weight += to_up
            packed = tl.load(weight) if C % BLOCK_C == 0 else tl.load(weight, mask=inside, other=0)
            if BITS == 8:
                up = tl.dot(packed.to(dtype), tl.trans(x), up)
            else:
                high, low = _unpack(packed, dtype)
                up = tl.dot(low, odd, tl.dot(high, even, up))
    offset = m[None, :] * N + n[:, None]
    stored = (m[None, :] < M) & (n[:, None] < N)
    last = True
    if SPLITS > 1:
        tl.store(partial_ptr + split * M * N + offset, total, mask=stored)
        last = is_last_program(count_ptr + tile, SPLITS)
    if last:
        if SPLITS > 1:
            total = sum_splits(partial_ptr + offset, stored, M * N, SPLITS)
        total *= tl.load(scale_ptr + weight_rows)[:, None].to(tl.float32)
        if GATED:
            up *= tl.load(scale_ptr + N + weight_rows)[:, None].to(tl.float32)
            total = total * tl.sigmoid(total) * up
        if BIASED:
            total += tl.load(bias_ptr + weight_rows)[:, None].to(tl.float32)
        tl.store(y_ptr + offset, total.to(dtype), mask=stored)


@triton.jit
def _dequantize_kernel(
    weight_ptr,  # (N, C) int8
    scale_ptr,  # (N,) float16
    y_ptr,  # (N, C * 8 / BITS) 16 bits
    C,
    BITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = tl.load(scale_ptr + n)
    packed = tl.load(weight_ptr + n * C + c, mask=c < C, other=0)
    if BITS == 8:
        weight = packed.to(tl.float16) * scale
        tl.store(y_ptr + n * C + c, weight.to(y_ptr.dtype.element_ty), mask=c < C)
    else:
        high, low = packed >> 4, (packed << 4) >> 4
        weight = tl.interleave(high.to(tl.float16) * scale, low.to(tl.float16) * scale)
        k = tl.program_id(1) * 2 * BLOCK_C + tl.arange(0, 2 * BLOCK_C)
        tl.store(y_ptr + n * 2 * C + k, weight.to(y_ptr.dtype.element_ty), mask=k < 2 * C)


@dataclass(frozen=True)
class Tiling:
    """
    How a GEMM is cut into programs.

    Each of `splits` programs sums a share of C and stores the sum by itself; these are added in a fixed order, so a
    result is the same at every run.
    """

    splits: int  # of C
    block_n: int  # rows of the weight in a program
    block_c: int  # bytes of such a row in a step of its loop
    warps: int
    stages: int


def tiling_for(M: int, weight: torch.Tensor, bits: int, gated: bool) -> Tiling:
    """Choose the tiles for x (M, K) and a weight (N, C), or (2 N, C) where `gated`: two programs a multiprocessor."""
    rows, C = weight.shape
    block_c = TILE_ELEMENTS * bits // 8
    programs = triton.cdiv(rows // (1 + gated), TILE_ROWS)
    splits = 1 if gated else max(1, min(SATURATING_PROGRAMS // programs, MAX_SPLITS, triton.cdiv(C, block_c)))
    stage_bytes = TILE_ROWS * (1 + gated) * block_c + padded_rows(M) * TILE_ELEMENTS * 2
    tiling = Tiling(splits, TILE_ROWS, block_c, 4, min(MAX_STAGES, MAX_PIPELINE_SMEM // stage_bytes))
    return tuned(tiling, "int_weight_gemm", work_name(M, weight, bits, gated), weight.device)


def work_name(M: int, weight: torch.Tensor, bits: int, gated: bool) -> str:
    """Name a GEMM in the table of tuning.py."""
    rows, C = weight.shape
    return f"{padded_rows(M)} rows, int{bits} {rows} x {C * 8 // bits}{', gated' if gated else ''}"


def padded_rows(M: int) -> int:
    """Rows of x in a tile."""
    return max(MIN_TILE_ROWS, triton.next_power_of_2(M))


@torch.library.custom_op("chatglm_family::int_weight_gemm", mutates_args=())
def int_weight_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    gated: bool = False,
) -> torch.Tensor:
    """
    x (weight * scale)^T + bias over packed integers, with float32 sums.

    Args:
        x: (M, K) float16 or bfloat16, M at most MAX_ROWS.
        weight: int8 (N, K), or (N, K / 2) for 4 bits; twice the rows where `gated`.
        scale: float16, one for each row of `weight`.
        bias: (N,), None where `gated`.
        bits: 8 or 4.
        gated: whether the result is silu(gate) * up of the two halves.

    Returns:
        (M, N) in the dtype of `x`.
    """
    return multiply(x, weight, scale, bias, bits, gated, tiling_for(len(x), weight, bits, gated))


@int_weight_gemm.register_fake
def _(x, weight, scale, bias, bits, gated=False):
    return x.new_empty(x.shape[0], weight.shape[0] // (1 + gated))


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    gated: bool,
    tiling: Tiling,
) -> torch.Tensor:
    """The same as `int_weight_gemm`, by these tiles; without splits where there are no counters for them."""
    M, N, C = len(x), weight.shape[0] // (1 + gated), weight.shape[1]
    x = x.contiguous()
    y, tiles = x.new_empty(M, N), triton.cdiv(N, tiling.block_n)
    splits = tiling.splits if tiles <= MAX_COUNTERS else 1
    partial = x.new_empty(splits, M, N, dtype=torch.float32) if splits > 1 else y
    _int_weight_gemm_kernel[(tiles, splits)](
        x if bits == 8 else x.view(torch.int32),
        weight,
        scale,
        x if bias is None else bias,
        y,
        partial,
        arrival_counters(x.device),
        M,
        N,
        C=C,
        BITS=bits,
        GATED=gated,
        BIASED=bias is not None,
        SPLITS=splits,
        BLOCK_M=padded_rows(M),
        BLOCK_N=tiling.block_n,
        BLOCK_C=tiling.block_c,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **early_launch(x.device),
    )
    return y


def dequantize_with_triton(weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """
    The weight in 16 bits, equal to `utils.layers.quantization.dequantize` to the bit.

    Args:
        weight: int8 (N, K), or (N, K / 2) for 4 bits.
        scale: (N,) float16.
        bits: 8 or 4.
        dtype: float16 or bfloat16.

    Returns:
        (N, K) in `dtype`.
    """
    N, C = weight.shape
    output = weight.new_empty(N, C * 8 // bits, dtype=dtype)
    _dequantize_kernel[(N, triton.cdiv(C, DEQUANTIZE_BLOCK))](
        weight, scale, output, C, BITS=bits, BLOCK_C=DEQUANTIZE_BLOCK, num_warps=4
    )
    return output
