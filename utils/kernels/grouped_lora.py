"""
The LoRA term of several adapters in one batch, each row with its own adapter, as two Triton kernels.

Called by utils/layers/mixed_lora.py. The first kernel ("shrink") computes x A^T, the second ("expand") adds its result
times B^T to the base layer's output. A program has one adapter and a tile of rows, and computes with the rows of that
adapter; it ends at once where the tile has none. So each factor is read where a row needs it and only there, each row
is read once, and the batch needs no sorting. Which row has which adapter is read on the device: a CUDA graph serves
every mixture. The input's K elements are split over programs, or most of a GPU would be idle; their float32 results
are added in a fixed order.

Why no library: the grouped kernels of Punica (arXiv:2310.18547) and S-LoRA are extensions built for one torch. vLLM's
belong to its package, which pins a torch of its own, and sort the rows by adapter before each step.

Shapes: M rows, K inputs, L adapters, R rank, P projections that share the input (query, key, value; else 1), N the sum
of their outputs.
"""

import math

import torch
import triton
import triton.language as tl

from utils.kernels.triton_utils import MIN_TILE_ROWS, early_launch, wait_for_inputs

MAX_PROJECTIONS = 3
MAX_BLOCK_M = 64  # rows
MAX_BLOCK_N = 128  # outputs
MAX_SHRINK_R = 64  # ranks; with the two below at most 96 KiB of shared memory
EXPAND_R = 16  # with more, the results of all splits spill registers
BLOCK_K = 128
STAGES = 3  # tiles in flight
MAX_SPLITS = 16  # of K, divided by the tiles of rows: with 8 adapters 128 programs, one a multiprocessor


@triton.jit
def _shrink_kernel(
    x_ptr,  # (M, K)
    A_ptr,  # (L, P R, K)
    adapter_ptr,  # (M,) int64
    hidden_ptr,  # (SPLITS, M, P R) float32
    M,
    K: tl.constexpr,
    RANKS: tl.constexpr,  # P R
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait_for_inputs()
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    adapter = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2) % SPLITS
    own = tl.load(adapter_ptr + m, mask=m < M, other=0) == adapter + 1
    if tl.max(own.to(tl.int32), 0) > 0:
        r = tl.program_id(2) // SPLITS * BLOCK_R + tl.arange(0, BLOCK_R)
        blocks_per_split: tl.constexpr = ((K + BLOCK_K - 1) // BLOCK_K + SPLITS - 1) // SPLITS
        k = split * blocks_per_split * BLOCK_K + tl.arange(0, BLOCK_K)
        x = x_ptr + m[:, None] * K
        A = A_ptr + (adapter * RANKS + r[:, None]) * K
        total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for _ in range(blocks_per_split):
            inside = k[None, :] < K
            x_tile = tl.load(x + k[None, :], mask=own[:, None] & inside, other=0.0)
            A_tile = tl.load(A + k[None, :], mask=(r[:, None] < RANKS) & inside, other=0.0)
            total = tl.dot(x_tile, tl.trans(A_tile), total)
            k += BLOCK_K
        hidden = hidden_ptr + (split * M + m[:, None]) * RANKS + r[None, :]
        tl.store(hidden, total, mask=own[:, None] & (r[None, :] < RANKS))


@triton.jit
def _expand_kernel(
    output_ptr,  # (M, N)
    hidden_ptr,  # (SPLITS, M, P R) float32
    B_ptr,  # (L, N, R)
    adapter_ptr,  # (M,) int64
    result_ptr,  # (M, N)
    M,
    N,
    FIRST_END,  # outputs of the first projection
    SECOND_END,  # and of the second
    R: tl.constexpr,
    RANKS: tl.constexpr,  # P R
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # divides the outputs of each projection
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait_for_inputs()
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    adapter = tl.program_id(1).to(tl.int64)  # from 1; 0 copies the rows of the base
    own = tl.load(adapter_ptr + m, mask=m < M, other=-1) == adapter
    if tl.max(own.to(tl.int32), 0) > 0:
        first_n = tl.program_id(2) * BLOCK_N
        projection = (first_n >= FIRST_END).to(tl.int32) + (first_n >= SECOND_END).to(tl.int32)
        n = first_n + tl.arange(0, BLOCK_N)
        offset = m[:, None] * N + n[None, :]
        total = tl.load(output_ptr + offset, mask=own[:, None], other=0.0).to(tl.float32)
        if adapter > 0:
            for first_r in range(0, R, BLOCK_R):
                r = first_r + tl.arange(0, BLOCK_R)
                in_rank = own[:, None] & (r[None, :] < R)
                hidden_row = hidden_ptr + m[:, None] * RANKS + projection * R + r[None, :]
                hidden = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
                for split in tl.static_range(SPLITS):
                    hidden += tl.load(hidden_row + split * M * RANKS, mask=in_rank, other=0.0)
                B = B_ptr + ((adapter - 1) * N + n[None, :]) * R + r[:, None]
                B_tile = tl.load(B, mask=r[:, None] < R, other=0.0)
                total = tl.dot(hidden.to(B_tile.dtype), B_tile, total)
        tl.store(result_ptr + offset, total.to(result_ptr.dtype.element_ty), mask=own[:, None])


def supports_widths(widths: list[int]) -> bool:
    """Whether projections with that many outputs each can be computed: at most 3, each a multiple of 16."""
    return len(widths) <= MAX_PROJECTIONS and all(width % MIN_TILE_ROWS == 0 for width in widths)


def _tile(size: int, largest: int) -> int:
    return min(largest, max(MIN_TILE_ROWS, triton.next_power_of_2(size)))


@torch.library.custom_op("chatglm_family::grouped_lora", mutates_args=())
def grouped_lora(
    x: torch.Tensor, output: torch.Tensor, A: torch.Tensor, B: torch.Tensor, adapters: torch.Tensor, widths: list[int]
) -> torch.Tensor:
    """
    output + (x A^T) B^T in 16 bits, in each row with the factors of its adapter, with float32 sums.

    Args:
        x: (M, K), like all tensors here contiguous, and in one dtype.
        output: (M, N), the base layer's.
        A: (L, P R, K), those of a projection after those of another.
        B: (L, N, R), with the scaling in it.
        adapters: (M,) int64, at most L: the adapter of each row, counted from 1; 0 is the base alone.
        widths: outputs of each projection, which `supports_widths`; their sum is N.

    Returns:
        (M, N).
    """
    (M, K), (L, ranks, _), (_, N, R) = x.shape, A.shape, B.shape
    block_m, block_n = _tile(M, MAX_BLOCK_M), math.gcd(MAX_BLOCK_N, *widths)
    block_r = _tile(ranks, MAX_SHRINK_R)
    row_tiles = triton.cdiv(M, block_m)
    splits = max(1, MAX_SPLITS // triton.next_power_of_2(row_tiles))
    hidden = x.new_empty(splits, M, ranks, dtype=torch.float32)
    result = torch.empty_like(output)
    launch = early_launch(x.device)
    with torch.cuda.device_of(x):  # layers may lie on several cards
        _shrink_kernel[(row_tiles, L, splits * triton.cdiv(ranks, block_r))](
            x,
            A,
            adapters,
            hidden,
            M,
            K=K,
            RANKS=ranks,
            SPLITS=splits,
            BLOCK_M=block_m,
            BLOCK_R=block_r,
            BLOCK_K=BLOCK_K,
            num_warps=4,
            num_stages=STAGES,
            **launch,
        )
        _expand_kernel[(row_tiles, L + 1, N // block_n)](
            output,
            hidden,
            B,
            adapters,
            result,
            M,
            N,
            widths[0],
            sum(widths[:2]),
            R=R,
            RANKS=ranks,
            SPLITS=splits,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_R=EXPAND_R,
            num_warps=4,
            num_stages=1,  # in flight, the results of all splits would exceed the shared memory
            **launch,
        )
    return result


@grouped_lora.register_fake
def _(x, output, A, B, adapters, widths):
    return torch.empty_like(output)
