"""
Triton kernels over INT8 and INT4 weights (utils/layers/quantization.py): a product for few rows, as in decoding, that
reads the integers once and never writes a weight; and the weight itself in 16 bits, in one pass, for many rows.

Both round integer times scale to float16, as `dequantize` does, and accumulate in float32.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit
def _product_kernel(
    x_ptr,  # (M, K) 16 bits; for 4 bits the even columns, then the odd ones
    weight_ptr,  # (N, COLUMNS) int8
    scale_ptr,  # (N,) float16
    y_ptr,  # (SPLITS, M, N) float32
    M,
    N,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
    weight_rows = weight_ptr + n[:, None].to(tl.int64) * COLUMNS
    x_rows = x_ptr + m[:, None] * (COLUMNS * 8 // BITS)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, COLUMNS, SPLITS * BLOCK_C):
        c = start + tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        packed = tl.load(weight_rows + c[None, :], mask=(n[:, None] < N) & (c[None, :] < COLUMNS), other=0)
        known = (m[:, None] < M) & (c[None, :] < COLUMNS)
        if BITS == 8:
            x = tl.load(x_rows + c[None, :], mask=known, other=0.0)
            weight = (packed.to(tl.float16) * scale).to(x.dtype)
            total = tl.dot(x, tl.trans(weight), total)
        else:
            even = tl.load(x_rows + c[None, :], mask=known, other=0.0)
            odd = tl.load(x_rows + COLUMNS + c[None, :], mask=known, other=0.0)
            high, low = packed >> 4, (packed << 4) >> 4
            total = tl.dot(even, tl.trans((high.to(tl.float16) * scale).to(even.dtype)), total)
            total = tl.dot(odd, tl.trans((low.to(tl.float16) * scale).to(odd.dtype)), total)
    y = y_ptr + (tl.program_id(1) * M + m[:, None]) * N + n[None, :]
    tl.store(y, total, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def _dequantize_kernel(
    weight_ptr,  # (N, COLUMNS) int8
    scale_ptr,  # (N,) float16
    y_ptr,  # (N, COLUMNS * 8 / BITS) 16 bits
    COLUMNS,
    BITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = tl.load(scale_ptr + n)
    packed = tl.load(weight_ptr + n * COLUMNS + c, mask=c < COLUMNS, other=0)
    if BITS == 8:
        weight = packed.to(tl.float16) * scale
        tl.store(y_ptr + n * COLUMNS + c, weight.to(y_ptr.dtype.element_ty), mask=c < COLUMNS)
    else:
        high, low = packed >> 4, (packed << 4) >> 4
        weight = tl.interleave(high.to(tl.float16) * scale, low.to(tl.float16) * scale)
        k = tl.program_id(1) * 2 * BLOCK_C + tl.arange(0, 2 * BLOCK_C)
        tl.store(y_ptr + n * 2 * COLUMNS + k, weight.to(y_ptr.dtype.element_ty), mask=k < 2 * COLUMNS)


@dataclass(frozen=True)
class Tiling:
    """How a product is cut: each of `parts` sums a share of the columns and writes it apart, so no order is chance."""

    parts: int
    rows: int  # of the weight, a program
    columns: int  # of them, a step
    warps: int
    stages: int


# The fastest of twenty on an H100, for the four shapes of weight of a 6B model.
FEW, SEVERAL = Tiling(4, 32, 128, 4, 4), Tiling(4, 64, 64, 4, 3)


@torch.library.custom_op("chatglm_family::int_weight_gemm", mutates_args=())
def int_weight_gemm(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """
    Args:
        x: (M, K) float16 or bfloat16, M at most utils.layers.quantization.FEW_ROWS.
        weight: int8 (N, K), or (N, K / 2) for 4 bits.
        scale: (N,) float16.

    Returns:
        (M, N) in the dtype of `x`.
    """
    M, (N, columns) = len(x), weight.shape
    x = x.unflatten(1, (columns, -1)).transpose(1, 2).contiguous()
    tiling = FEW if M <= 16 else SEVERAL
    y = x.new_empty(tiling.parts, M, N, dtype=torch.float32)
    _product_kernel[(triton.cdiv(N, tiling.rows), tiling.parts)](
        x,
        weight,
        scale,
        y,
        M,
        N,
        COLUMNS=columns,
        BITS=bits,
        SPLITS=tiling.parts,
        BLOCK_M=max(16, triton.next_power_of_2(M)),
        BLOCK_N=tiling.rows,
        BLOCK_C=tiling.columns,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return y.sum(0).to(x.dtype)


@int_weight_gemm.register_fake
def _(x, weight, scale, bits):
    return x.new_empty(x.shape[0], weight.shape[0])


def dequantize_with_triton(weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """int8 (N, K), or (N, K / 2) for 4 bits, and its scales (N,) float16 -> (N, K) in float16 or bfloat16."""
    rows, columns = weight.shape
    output = weight.new_empty(rows, columns * 8 // bits, dtype=dtype)
    block = 1024
    _dequantize_kernel[(rows, triton.cdiv(columns, block))](
        weight, scale, output, columns, BITS=bits, BLOCK_C=block, num_warps=4
    )
    return output
