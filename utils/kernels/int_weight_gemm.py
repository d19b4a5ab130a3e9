"""
Triton kernels over INT8 and INT4 weights: a skinny GEMM that reads the integers once, and the weight in 16 bits.

Called by utils/layers/quantization.py, whose format of the integers and scales this reads: for up to 64 rows, as in
decoding, the GEMM, which never writes a weight in 16 bits; for more rows, and in training, `dequantize_with_triton`
and cuBLAS. Both round integer times scale to float16, as the GPU kernels of the released checkpoints do; libraries
(bitsandbytes, torchao) have other formats and other roundings.

Shapes: x (M, K), weight (N, C) bytes, scale (N,). C = K for 8 bits. For 4 bits C = K / 2, and the high half of a byte
is the even element.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from utils.kernels.triton_utils import MIN_TILE_ROWS

DEQUANTIZE_BLOCK = 1024  # bytes of a weight's row in a program


@triton.jit
def _int_weight_gemm_kernel(
    x_ptr,  # (M, K) 16 bits; for 4 bits the even elements of a row, then the odd ones
    weight_ptr,  # (N, C) int8
    scale_ptr,  # (N,) float16
    y_ptr,  # (SPLITS, M, N) float32
    M,
    N,
    C: tl.constexpr,
    BITS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
    weight_rows = weight_ptr + n[:, None].to(tl.int64) * C
    x_rows = x_ptr + m[:, None] * (C * 8 // BITS)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, C, SPLITS * BLOCK_C):
        c = start + tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        packed = tl.load(weight_rows + c[None, :], mask=(n[:, None] < N) & (c[None, :] < C), other=0)
        inside = (m[:, None] < M) & (c[None, :] < C)
        if BITS == 8:
            x = tl.load(x_rows + c[None, :], mask=inside, other=0.0)
            weight = (packed.to(tl.float16) * scale).to(x.dtype)
            total = tl.dot(x, tl.trans(weight), total)
        else:
            even = tl.load(x_rows + c[None, :], mask=inside, other=0.0)
            odd = tl.load(x_rows + C + c[None, :], mask=inside, other=0.0)
            high, low = packed >> 4, (packed << 4) >> 4  # signed shifts
            total = tl.dot(even, tl.trans((high.to(tl.float16) * scale).to(even.dtype)), total)
            total = tl.dot(odd, tl.trans((low.to(tl.float16) * scale).to(odd.dtype)), total)
    y = y_ptr + (tl.program_id(1) * M + m[:, None]) * N + n[None, :]
    tl.store(y, total, mask=(m[:, None] < M) & (n[None, :] < N))


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


# The fastest of twenty on an H100, for the four shapes of weight of a 6B model: up to 16 rows, and more.
TILING_16_ROWS, TILING_64_ROWS = Tiling(4, 32, 128, 4, 4), Tiling(4, 64, 64, 4, 3)


@torch.library.custom_op("chatglm_family::int_weight_gemm", mutates_args=())
def int_weight_gemm(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """
    x (weight * scale)^T over packed integers, with float32 sums.

    Args:
        x: (M, K) float16 or bfloat16, M at most 64 (utils.layers.quantization chooses where it pays).
        weight: int8 (N, K), or (N, K / 2) for 4 bits.
        scale: (N,) float16.
        bits: 8 or 4.

    Returns:
        (M, N) in the dtype of `x`.
    """
    M, (N, C) = len(x), weight.shape
    x = x.unflatten(1, (C, -1)).transpose(1, 2).contiguous()  # (M, 8 / bits, C)
    tiling = TILING_16_ROWS if M <= 16 else TILING_64_ROWS
    y = x.new_empty(tiling.splits, M, N, dtype=torch.float32)
    _int_weight_gemm_kernel[(triton.cdiv(N, tiling.block_n), tiling.splits)](
        x,
        weight,
        scale,
        y,
        M,
        N,
        C=C,
        BITS=bits,
        SPLITS=tiling.splits,
        BLOCK_M=max(MIN_TILE_ROWS, triton.next_power_of_2(M)),
        BLOCK_N=tiling.block_n,
        BLOCK_C=tiling.block_c,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return y.sum(0).to(x.dtype)


@int_weight_gemm.register_fake
def _(x, weight, scale, bits):
    return x.new_empty(x.shape[0], weight.shape[0])


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
