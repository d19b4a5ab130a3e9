"""
Products of few rows with a weight, in 16 bits or FP8: bound by reading the weight, which Triton's kernel reads once.

Shapes: x (M, K), weight (N, K), y (M, N). A gated weight is (2 N, K), gate and up: y = silu(x gate^T) * (x up^T).
"""

from functools import cache

import torch
import triton
import triton.language as tl

from utils.kernels.triton_utils import MIN_TILE_ROWS, arrival_counters, is_last_program, supports_pdl, wait_for_inputs

MAX_ROWS = 64  # up to here the kernel is the fastest
K_MULTIPLE = 128  # K is a multiple of it
MIN_WEIGHT_ELEMENTS = 1 << 20  # numbers in a weight that is not worth a kernel
SATURATING_PROGRAMS = 128  # programs that read as fast as the GPU can
MAX_PIPELINE_SMEM = 147_456  # that the tiles on their way take where there are so many
MAX_STAGES = 8  # tiles on their way


@triton.jit
def _product_kernel(
    x_ptr,
    x_scale_ptr,  # (M,) float32
    weight_ptr,
    weight_scale_ptr,  # (N,) float32
    bias_ptr,  # (N,)
    y_ptr,
    part_ptr,  # (SPLITS, M, N) float32
    count_ptr,  # (N / BLOCK_N,) int32, see `arrival_counters`
    M,
    N,
    K: tl.constexpr,
    GATED: tl.constexpr,  # in one part, without bias
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait_for_inputs()
    tile, part = tl.program_id(0), tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    steps: tl.constexpr = K // BLOCK_K
    share: tl.constexpr = (steps + SPLITS - 1) // SPLITS
    first = part * share * BLOCK_K
    x = x_ptr + m[:, None] * K + k[None, :] + first
    weight = weight_ptr + rows[:, None] * K + k[None, :] + first
    to_up = tl.cast(N, tl.int64) * K
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(min(share, steps - part * share)):
        x_tile = tl.load(x, mask=m[:, None] < M, other=0.0)
        total = tl.dot(x_tile, tl.trans(tl.load(weight)), total)
        if GATED:
            up = tl.dot(x_tile, tl.trans(tl.load(weight + to_up)), up)
        x += BLOCK_K
        weight += BLOCK_K
    place = m[:, None] * N + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    last = True
    if SPLITS > 1:
        tl.store(part_ptr + part * M * N + place, total, mask=inside)
        last = is_last_program(count_ptr + tile, SPLITS)
    if last:
        if SPLITS > 1:
            total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for other in tl.static_range(SPLITS):
                total += tl.load(part_ptr + other * M * N + place, mask=inside, other=0.0, cache_modifier=".cg")
        if SCALED:
            x_scale = tl.load(x_scale_ptr + m, mask=m < M, other=0.0)[:, None]
            total *= x_scale * tl.load(weight_scale_ptr + rows)[None, :]
            if GATED:
                up *= x_scale * tl.load(weight_scale_ptr + N + rows)[None, :]
        if GATED:
            total = total * tl.sigmoid(total) * up
        if BIASED:
            total += tl.load(bias_ptr + rows)[None, :].to(tl.float32)
        tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=inside)


@cache
def pipeline_smem(device: torch.device) -> int:
    """What the tiles on their way may take of a multiprocessor's shared memory."""
    return min(MAX_PIPELINE_SMEM, torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    gated: bool,
    bias: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Args:
        x: (M, K) in the dtype of `weight`, M at most MAX_ROWS.
        weight: (N, K) in 16 bits, or e4m3 with scales; K a multiple of K_MULTIPLE. (2 N, K) where it is gated.
        bias: (N,).
        x_scale: (M, 1) float32.
        weight_scale: (1, N) float32, or (1, 2 N).

    Returns:
        (M, N) in the weight's 16 bits, or bfloat16.
    """
    (M, K), rows = x.shape, weight.shape[0]
    parts = 2 if K >= 8192 > rows and not gated else 1  # where the weight's rows do not occupy a GPU and are long
    block_m = max(MIN_TILE_ROWS, triton.next_power_of_2(M))
    tile = next((most for most in (128, 64) if triton.cdiv(rows, most) * parts >= SATURATING_PROGRAMS), 32)
    N, block_n = (rows // 2, tile // 2) if gated else (rows, tile)
    columns = 128 // weight.element_size()  # a line of the cache
    y = x.new_empty(M, N, dtype=torch.bfloat16 if x_scale is not None else weight.dtype)
    part = x.new_empty(parts, M, N, dtype=torch.float32) if parts > 1 else y
    pdl = supports_pdl(x.device)
    _product_kernel[(triton.cdiv(N, block_n), parts)](
        x,
        x if x_scale is None else x_scale,
        weight,
        x if weight_scale is None else weight_scale,
        x if bias is None else bias,
        y,
        part,
        arrival_counters(x.device),
        M,
        N,
        K=K,
        GATED=gated,
        SPLITS=parts,
        SCALED=x_scale is not None,
        BIASED=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=columns,
        PDL=pdl,
        num_warps=4,
        num_stages=min(MAX_STAGES, pipeline_smem(x.device) // ((block_m + tile) * 128)),
        **({"launch_pdl": True} if pdl else {}),
    )
    return y


def supports_weight(weight: torch.Tensor) -> bool:
    """Whether the weight can be read in whole tiles along K, and is worth it."""
    return weight.shape[1] % K_MULTIPLE == 0 and weight.numel() >= MIN_WEIGHT_ELEMENTS


@torch.library.custom_op("chatglm_family::fp8_skinny_gemm", mutates_args=())
def fp8_skinny_gemm(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, gated: bool = False
) -> torch.Tensor:
    """
    Args:
        x: (M, K) e4m3, M at most MAX_ROWS.
        x_scale: (M, 1) float32.
        weight: (N, K) e4m3, see `supports_weight`; (2 N, K) where it is gated.
        weight_scale: (1, N) float32, or (1, 2 N).

    Returns:
        (M, N) bfloat16.
    """
    return _product(x, weight, gated, None, x_scale, weight_scale)


@fp8_skinny_gemm.register_fake
def _(x, x_scale, weight, weight_scale, gated=False):
    return x.new_empty(x.shape[0], weight.shape[0] // (1 + gated), dtype=torch.bfloat16)


@torch.library.custom_op("chatglm_family::skinny_gemm", mutates_args=())
def skinny_gemm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool = False) -> torch.Tensor:
    """(M, K), M at most MAX_ROWS, and (N, K), see `supports_weight`, or gated (2 N, K), in 16 bits -> (M, N)."""
    return _product(x, weight, gated, bias)


@skinny_gemm.register_fake
def _(x, weight, bias, gated=False):
    return x.new_empty(x.shape[0], weight.shape[0] // (1 + gated))
