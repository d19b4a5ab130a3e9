"""
Attention of a decode step: one query token per sequence over its pages of the KV cache, as one Triton kernel.

Called by utils/inference/engine/attention.py. The kernel reads only the filled tokens of a sequence, so sequences of
unequal length share one CUDA graph; torch's attention needs a mask, and keys that lie side by side. flashinfer has a
maintained kernel, but the host plans it again at each step; here a graph replays without the host, which overwrites
the page table in between.

Softmax is computed online (Milakov and Gimelshein, arXiv:1805.02867), in powers of 2. A small batch would leave most
of a GPU idle, so several programs share the tokens of a sequence (as in Flash-Decoding), and the last one combines
their results.

Shapes: B sequences, H query heads, K key/value heads, G = H / K, D head size, P pages of a sequence at most.

Triton's interpreter runs it from version 3.7.1 on; that of 3.6 cannot loop up to a value that a kernel has loaded
("only 0-dimensional arrays can be converted to Python scalars").
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from utils.kernels.triton_utils import (
    MAX_COUNTERS,
    MIN_TILE_ROWS,
    TARGET_PROGRAMS,
    arrival_counters,
    early_launch,
    is_last_program,
    launch_next_and_wait,
)
from utils.kernels.tuning import tuned

MAX_SPLITS = 16  # programs per sequence and key/value head
LOG2_E = 1.4426950408889634


@triton.jit
def _decode_attention_kernel(
    query_ptr,  # (B, K, G, D)
    key_ptr,  # (pages, K, BLOCK, D)
    value_ptr,  # (pages, K, BLOCK, D)
    table_ptr,  # (B, P) int32, page of each BLOCK tokens of a sequence
    last_ptr,  # (B,) int64, index of the last filled token
    output_ptr,  # (B, K, G, D)
    partial_ptr,  # (B * K, SPLITS, G, D) float32, normalised outputs
    log_ptr,  # (B * K, SPLITS, G) float32, log2 of their softmax denominators
    count_ptr,  # (B * K,) int32, see `arrival_counters`
    P,
    scaling,  # times log2(e), because the kernel takes powers of 2
    G: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,  # G, padded to what `tl.dot` takes
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        launch_next_and_wait()
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)  # head of B * K
    g, d, s = tl.arange(0, TILE), tl.arange(0, D), tl.arange(0, BLOCK)
    row, kv_head = head // KV_HEADS, head % KV_HEADS
    length = tl.load(last_ptr + row).to(tl.int32) + 1
    tokens_per_split = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    first = split * tokens_per_split
    end = min(length, first + tokens_per_split)
    table = table_ptr + row * P
    token = s[:, None] * D + d[None, :]  # place of a page's tokens
    in_group = g[:, None] < G
    query = tl.load(query_ptr + (head * G + g[:, None]) * D + d[None, :], mask=in_group, other=0.0)
    highest = tl.full((TILE,), -1e30, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    output = tl.zeros((TILE, D), tl.float32)
    for start in range(first, end, BLOCK):
        filled = (start + s) < end
        page = tl.load(table + start // BLOCK).to(tl.int64)
        offset = (page * KV_HEADS + kv_head) * BLOCK * D + token
        key = tl.load(key_ptr + offset, mask=filled[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(key)) * scaling
        scores = tl.where(filled[None, :], scores, -1e30)
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.where(filled[None, :], tl.exp2(scores - new_highest[:, None]), 0.0)
        shrink = tl.exp2(highest - new_highest)
        value = tl.load(value_ptr + offset, mask=filled[:, None], other=0.0)
        output = output * shrink[:, None] + tl.dot(weights.to(value.dtype), value)
        total = total * shrink + tl.sum(weights, 1)
        highest = new_highest
    result = output_ptr + (head * G + g[:, None]) * D + d[None, :]
    if SPLITS == 1:
        tl.store(result, (output / total[:, None]).to(output_ptr.dtype.element_ty), mask=in_group)
    else:
        output = output / tl.maximum(total, 1e-30)[:, None]  # a split beyond the filled tokens has total 0
        log = tl.where(total > 0, highest + tl.log2(total), -1e30)
        offset = (head * SPLITS + split) * G + g
        tl.store(partial_ptr + offset[:, None] * D + d[None, :], output, mask=in_group)
        tl.store(log_ptr + offset, log, mask=g < G)
        if is_last_program(count_ptr + head, SPLITS):
            highest = tl.full((TILE,), -1e30, tl.float32)
            total = tl.zeros((TILE,), tl.float32)
            output = tl.zeros((TILE, D), tl.float32)
            for other in tl.static_range(SPLITS):
                offset = (head * SPLITS + other) * G + g
                # ".cg" loads from L2, where the stores of programs on other multiprocessors are.
                log = tl.load(log_ptr + offset, mask=g < G, other=-1e30, cache_modifier=".cg")
                partial = partial_ptr + offset[:, None] * D + d[None, :]
                values = tl.load(partial, mask=in_group, other=0.0, cache_modifier=".cg")
                new_highest = tl.maximum(highest, log)
                weight, shrink = tl.exp2(log - new_highest), tl.exp2(highest - new_highest)
                output = output * shrink[:, None] + values * weight[:, None]
                total = total * shrink + weight
                highest = new_highest
            tl.store(result, (output / total[:, None]).to(output_ptr.dtype.element_ty), mask=in_group)


@dataclass(frozen=True)
class Launch:
    """How attention is cut into programs."""

    splits: int  # of a sequence's tokens, a power of 2
    warps: int = 4
    stages: int = 3  # pages in flight


def launch_for(heads: int, P: int, device: torch.device) -> Launch:
    """Choose the launch for B K `heads` of at most P pages each."""
    launch = Launch(triton.next_power_of_2(min(triton.cdiv(TARGET_PROGRAMS, heads), MAX_SPLITS)))
    launch = tuned(launch, "decode_attention", work_name(heads), device)
    most = P if heads <= MAX_COUNTERS else 1
    return replace(launch, splits=min(launch.splits, triton.next_power_of_2(most)))


def work_name(heads: int) -> str:
    """Name the attention of B K heads in the table of tuning.py."""
    return f"{triton.next_power_of_2(heads)} heads"


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    last: torch.Tensor,
    scaling: float,
    launch: Launch | None = None,
) -> torch.Tensor:
    """
    Attention of one query token per sequence over its filled tokens.

    Args:
        query: (B, H, 1, D) float16 or bfloat16, D a power of 2.
        keys: (pages, K, page size, D), contiguous, in the dtype of `query`; the page size is a power of 2 from 16 on.
        values: as `keys`.
        page_table: (B, P) int32, contiguous; its row holds a sequence's pages in their order.
        last: (B,) int64, index of each sequence's last filled token.
        scaling: factor of the scores, usually D ** -0.5.
        launch: (default: `launch_for`).

    Returns:
        (B, 1, H, D) in the dtype of `query`.
    """
    B, H, _, D = query.shape
    K, P = keys.shape[1], page_table.shape[1]
    G = H // K
    launch = launch or launch_for(B * K, P, query.device)
    splits = launch.splits
    output = query.new_empty(B, 1, H, D)
    partial = query.new_empty(B * K, splits, G, D, dtype=torch.float32) if splits > 1 else output
    log = query.new_empty(B * K, splits, G, dtype=torch.float32)
    _decode_attention_kernel[(B * K, splits)](
        query.contiguous(),
        keys,
        values,
        page_table,
        last,
        output,
        partial,
        log,
        arrival_counters(query.device),
        P,
        scaling * LOG2_E,
        G=G,
        D=D,
        TILE=max(MIN_TILE_ROWS, triton.next_power_of_2(G)),
        SPLITS=splits,
        BLOCK=keys.shape[2],
        KV_HEADS=K,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **early_launch(query.device),
    )
    return output
