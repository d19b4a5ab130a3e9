"""
Skinny GEMMs of a decode step: few rows of activations times a weight in 16 bits or FP8, as one kernel.

Called by utils/layers/skinny_linear.py and, in FP8, by utils/layers/fp8.py. Memory bandwidth bounds such a GEMM, and
cuBLAS's kernels do not take part in programmatic dependent launch, which pays only if every kernel of a decode step
does. On Hopper hopper_gemm.py computes it, elsewhere the Triton kernel here. The epilogue computes SwiGLU, so gate and
up never go to memory.

Shapes: x (M, K), weight (N, K), y (M, N). A gated weight is (2 N, K), gate above up: y = silu(x gate^T) * (x up^T).
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from utils.kernels import HOPPER, load_hopper_gemm
from utils.kernels.triton_utils import (
    MIN_TILE_ROWS,
    arrival_counters,
    early_launch,
    is_last_program,
    sum_splits,
    wait_for_inputs,
)
from utils.kernels.tuning import tuned

MAX_ROWS = 64  # M up to which the kernels here are the fastest
MAX_HOPPER_FP8_ROWS = 128  # torch's FP8 GEMM takes 14 us for any weight
MAX_HOPPER_LONG_FP8_ROWS, LONG = 256, 8192  # and grows with K, which it does not split
K_MULTIPLE = 128  # elements of K in a tile of the weight in FP8; the kernel has no mask along K
MIN_WEIGHT_ELEMENTS = 1 << 20  # a smaller weight is not worth a kernel
SATURATING_PROGRAMS = 128  # about one per multiprocessor, enough to saturate memory bandwidth
CACHE_LINE = 128  # bytes of K in a tile
MAX_PIPELINE_SMEM = 147_456  # bytes of shared memory for in-flight tiles
MAX_STAGES = 8  # tiles in flight


@triton.jit
def _skinny_gemm_kernel(
    x_ptr,
    x_scale_ptr,  # (M,) float32
    weight_ptr,
    weight_scale_ptr,  # (N,) float32
    bias_ptr,  # (N,)
    y_ptr,
    partial_ptr,  # (SPLITS, M, N) float32
    count_ptr,  # (N / BLOCK_N,) int32, see `arrival_counters`
    M,
    N,
    K: tl.constexpr,
    GATED: tl.constexpr,  # then SPLITS is 1, and there is no bias
    SPLITS: tl.constexpr,  # of K
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait_for_inputs()
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    weight_rows = tl.minimum(n, N - 1).to(tl.int64)
    blocks: tl.constexpr = K // BLOCK_K
    blocks_per_split: tl.constexpr = (blocks + SPLITS - 1) // SPLITS
    first = split * blocks_per_split * BLOCK_K
    x = x_ptr + m[:, None] * K + k[None, :] + first
    weight = weight_ptr + weight_rows[:, None] * K + k[None, :] + first
    to_up = tl.cast(N, tl.int64) * K
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(min(blocks_per_split, blocks - split * blocks_per_split)):
        x_tile = tl.load(x, mask=m[:, None] < M, other=0.0)
        total = tl.dot(x_tile, tl.trans(tl.load(weight)), total)
        if GATED:
            up = tl.dot(x_tile, tl.trans(tl.load(weight + to_up)), up)
        x += BLOCK_K
        weight += BLOCK_K
    offset = m[:, None] * N + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    last = True
    if SPLITS > 1:
        tl.store(partial_ptr + split * M * N + offset, total, mask=inside)
        last = is_last_program(count_ptr + tile, SPLITS)
    if last:
        if SPLITS > 1:
            total = sum_splits(partial_ptr + offset, inside, M * N, SPLITS)
        if SCALED:
            x_scale = tl.load(x_scale_ptr + m, mask=m < M, other=0.0)[:, None]
            total *= x_scale * tl.load(weight_scale_ptr + weight_rows)[None, :]
            if GATED:
                up *= x_scale * tl.load(weight_scale_ptr + N + weight_rows)[None, :]
        if GATED:
            total = total * tl.sigmoid(total) * up
        if BIASED:
            total += tl.load(bias_ptr + weight_rows)[None, :].to(tl.float32)
        tl.store(y_ptr + offset, total.to(y_ptr.dtype.element_ty), mask=inside)


@cache
def pipeline_smem(device: torch.device) -> int:
    """Bytes of a multiprocessor's shared memory that in-flight tiles may take."""
    if device.type != "cuda":  # Triton's interpreter
        return MAX_PIPELINE_SMEM
    return min(MAX_PIPELINE_SMEM, torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    gated: bool,
    bias: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Choose the tiles and run the kernel.

    Args:
        x: (M, K) in the dtype of `weight`, M at most `max_rows`.
        weight: (N, K), or (2 N, K) where `gated`, in 16 bits, or e4m3 with scales; K a multiple of K_MULTIPLE.
        gated: whether the first half of the weight's rows gates the second.
        bias: (N,).
        x_scale: (M, 1) float32.
        weight_scale: (1, N) float32, or (1, 2 N) where `gated`.

    Returns:
        (M, N) in the dtype of `weight`, or bfloat16 where there are scales.
    """
    (M, K), weight_rows = x.shape, weight.shape[0]
    N = weight_rows // (1 + gated)
    y = x.new_empty(M, N, dtype=torch.bfloat16 if x_scale is not None else weight.dtype)
    hopper = load_hopper_gemm()
    if hopper is not None and hopper.supports_weight(weight, gated):
        hopper.hopper_gemm(x, weight, y, gated, bias, None if x_scale is None else (x_scale, weight_scale))
        return y
    splits = 2 if K >= 8192 > weight_rows and not gated else 1  # where N alone makes too few programs
    block_m = max(MIN_TILE_ROWS, triton.next_power_of_2(M))
    tile = next((rows for rows in (128, 64) if triton.cdiv(weight_rows, rows) * splits >= SATURATING_PROGRAMS), 32)
    block_n = tile // 2 if gated else tile
    partial = x.new_empty(splits, M, N, dtype=torch.float32) if splits > 1 else y
    _skinny_gemm_kernel[(triton.cdiv(N, block_n), splits)](
        x,
        x if x_scale is None else x_scale,
        weight,
        x if weight_scale is None else weight_scale,
        x if bias is None else bias,
        y,
        partial,
        arrival_counters(x.device),
        M,
        N,
        K=K,
        GATED=gated,
        SPLITS=splits,
        SCALED=x_scale is not None,
        BIASED=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=CACHE_LINE // weight.element_size(),
        num_warps=4,
        num_stages=min(MAX_STAGES, pipeline_smem(x.device) // ((block_m + tile) * CACHE_LINE)),
        **early_launch(x.device),
    )
    return y


@dataclass(frozen=True)
class Reach:
    """Up to how many rows of x the kernels here are the fastest; 0: nowhere."""

    max_rows: int


def max_rows(weight: torch.Tensor) -> int:
    """Return M up to which the kernels here are the fastest for a weight (N, K)."""
    return tuned(Reach(_usual_max_rows(weight)), "skinny_gemm", work_name(weight), weight.device).max_rows


def _usual_max_rows(weight: torch.Tensor) -> int:
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < HOPPER:
        return 0  # not measured
    if weight.element_size() == 2 or load_hopper_gemm() is None:
        return MAX_ROWS
    return MAX_HOPPER_LONG_FP8_ROWS if weight.shape[1] >= LONG else MAX_HOPPER_FP8_ROWS


def work_name(weight: torch.Tensor) -> str:
    """Name the GEMMs of a weight (N, K) in the table of tuning.py."""
    return f"{8 * weight.element_size()} bits {weight.shape[0]} x {weight.shape[1]}"


def supports_weight(weight: torch.Tensor) -> bool:
    """Whether a weight (N, K) has whole tiles along K, and is large enough to be worth it."""
    return weight.shape[1] % K_MULTIPLE == 0 and weight.numel() >= MIN_WEIGHT_ELEMENTS


@torch.library.custom_op("chatglm_family::fp8_skinny_gemm", mutates_args=())
def fp8_skinny_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    gated: bool = False,
) -> torch.Tensor:
    """
    (x * x_scale) (weight * weight_scale^T)^T + bias in FP8 with float32 sums.

    Args:
        x: (M, K) e4m3, M at most `max_rows`.
        x_scale: (M, 1) float32.
        weight: (N, K) e4m3 that `supports_weight`, or (2 N, K) where `gated`.
        weight_scale: (1, N) float32, or (1, 2 N) where `gated`.
        bias: (N,) bfloat16, None where `gated`.
        gated: whether the result is silu(gate) * up of the two halves.

    Returns:
        (M, N) bfloat16.
    """
    return _launch(x, weight, gated, bias, x_scale, weight_scale)


@fp8_skinny_gemm.register_fake
def _(x, x_scale, weight, weight_scale, bias, gated=False):
    return x.new_empty(x.shape[0], weight.shape[0] // (1 + gated), dtype=torch.bfloat16)


@torch.library.custom_op("chatglm_family::skinny_gemm", mutates_args=())
def skinny_gemm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool = False) -> torch.Tensor:
    """
    x weight^T + bias in 16 bits with float32 sums.

    Args:
        x: (M, K), M at most `max_rows`.
        weight: (N, K) that `supports_weight`, or (2 N, K) where `gated`, in the dtype of `x`.
        bias: (N,), None where `gated`.
        gated: whether the result is silu(gate) * up of the two halves.

    Returns:
        (M, N) in the dtype of `x`.
    """
    return _launch(x, weight, gated, bias=bias)


@skinny_gemm.register_fake
def _(x, weight, bias, gated=False):
    return x.new_empty(x.shape[0], weight.shape[0] // (1 + gated))
