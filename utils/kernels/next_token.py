"""
The end of a greedy decode step as two Triton kernels: the likeliest token, and what it changes in the decode state.

Called by utils/inference/engine/model_runner.py and kv_cache.py. torch's operations are some twenty launches, whose
time at each step is that of two or three blocks.

Shapes: B sequences, V vocabulary, C coordinates of a position.
"""

import torch
import triton
import triton.language as tl

from utils.kernels.triton_utils import early_launch, launch_next_and_wait

LOGITS_BLOCK = 8192


@triton.jit
def _argmax_kernel(
    logits_ptr,  # (B, V)
    token_ptr,  # (B,) int64
    V,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        launch_next_and_wait()
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    token = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        logits = tl.load(logits_ptr + row * V + start + v, mask=start + v < V, other=-float("inf")).to(tl.float32)
        is_larger = logits > largest
        largest = tl.where(is_larger, logits, largest)
        token = tl.where(is_larger, start + v, token)
    most = tl.max(largest)
    tl.store(token_ptr + row, tl.min(tl.where(largest == most, token, V)).to(tl.int64))  # the first of equals


@triton.jit
def _advance_kernel(
    chosen_ptr,  # (B,) int64, as all below
    next_token_ptr,  # (slots,)
    history_ptr,  # (steps, slots of the history)
    history_index_ptr,  # (1,)
    cache_length_ptr,  # (slots,)
    answer_length_ptr,  # (slots,)
    tokens_left_ptr,  # (slots,)
    position_ptr,  # (slots, C)
    stop_ptr,  # (stops,)
    B,
    steps,
    history_slots,
    stops,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        launch_next_and_wait()
    b = tl.arange(0, BLOCK)
    inside = b < B
    chosen = tl.load(chosen_ptr + b, mask=inside, other=0)
    left = tl.load(tokens_left_ptr + b, mask=inside, other=0)
    running = (left > 0).to(tl.int64)
    index = tl.load(history_index_ptr)
    tl.store(next_token_ptr + b, chosen, mask=inside)
    tl.store(history_ptr + index * history_slots + b, chosen, mask=inside)
    tl.store(cache_length_ptr + b, tl.load(cache_length_ptr + b, mask=inside, other=0) + running, mask=inside)
    tl.store(answer_length_ptr + b, tl.load(answer_length_ptr + b, mask=inside, other=0) + running, mask=inside)
    position = position_ptr + b * C + C - 1  # the last coordinate counts
    tl.store(position, tl.load(position, mask=inside, other=0) + running, mask=inside)
    left -= running
    for stop in range(stops):
        left = tl.where(chosen == tl.load(stop_ptr + stop), 0, left)
    tl.store(tokens_left_ptr + b, left, mask=inside)
    tl.debug_barrier()  # every thread has read the index
    tl.store(history_index_ptr, (index + 1) % steps)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """(B, V), contiguous -> (B,) int64, the first of the largest."""
    tokens = logits.new_empty(len(logits), dtype=torch.int64)
    _argmax_kernel[(len(logits),)](
        logits, tokens, logits.shape[1], BLOCK=LOGITS_BLOCK, num_warps=16, **early_launch(logits.device)
    )
    return tokens


def advance(
    chosen: torch.Tensor,
    next_token: torch.Tensor,
    history: torch.Tensor,
    history_index: torch.Tensor,
    cache_length: torch.Tensor,
    answer_length: torch.Tensor,
    tokens_left: torch.Tensor,
    position: torch.Tensor,
    stop_ids: torch.Tensor,
) -> None:
    """Append tokens to the sequences of the first B slots: `DecodeState.advance`, whose tensors these are."""
    _advance_kernel[(1,)](
        chosen,
        next_token,
        history,
        history_index,
        cache_length,
        answer_length,
        tokens_left,
        position,
        stop_ids,
        len(chosen),
        *history.shape,
        len(stop_ids),
        C=position.shape[1],
        BLOCK=triton.next_power_of_2(len(chosen)),
        num_warps=4,
        **early_launch(chosen.device),
    )
