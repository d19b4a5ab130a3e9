"""
What the decode kernels share: tile sizes, results split over programs, and programmatic dependent launch (PDL).

Programs that share a result store partial results and count themselves; the last one combines them, which saves a
second kernel. With PDL a kernel starts while the one before it ends (CUDA C++ Programming Guide, "Programmatic
Dependent Launch and Synchronization").
"""

from functools import cache

import torch
import triton
import triton.language as tl

MIN_TILE_ROWS = 16  # `tl.dot` takes no fewer
TARGET_PROGRAMS = 512  # enough to saturate memory bandwidth
MAX_COUNTERS = 512  # results that are split over programs


@cache
def supports_pdl(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch: Hopper and newer GPUs."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def early_launch(device: torch.device) -> dict[str, bool]:
    """Keyword arguments of a kernel with a constant PDL, launched while the kernel before it ends where that works."""
    return {"PDL": True, "launch_pdl": True} if supports_pdl(device) else {"PDL": False}


@cache
def arrival_counters(device: torch.device) -> torch.Tensor:
    """
    Counters (MAX_COUNTERS,) int32 for `is_last_program`, all 0 between two kernels.

    All kernels of a device share them, which is right as long as one kernel runs at a time.
    """
    return torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)


@triton.jit
def wait_for_inputs():
    """PDL barrier: wait for prior kernels' writes, then let the next kernel launch."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def launch_next_and_wait():
    """PDL barrier: let the next kernel launch, which may load its weight already, then wait for prior writes."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


@triton.jit
def sum_splits(partial_ptrs, mask, stride, SPLITS: tl.constexpr):
    """Sum of the partial results of all splits, `stride` apart, in a fixed order whichever program came last."""
    total = tl.load(partial_ptrs, mask=mask, other=0.0, cache_modifier=".cg")  # from L2, where they were stored
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partial_ptrs + split * stride, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def is_last_program(count_ptr, SPLITS: tl.constexpr):
    """True in the last program to arrive; resets the counter. Store this program's partial result first."""
    tl.debug_barrier()  # every thread of the program has stored its share
    last = tl.atomic_add(count_ptr, 1, sem="acq_rel") == SPLITS - 1
    if last:
        tl.store(count_ptr, 0)
    return last
