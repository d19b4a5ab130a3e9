"""What the decode kernels share: programs that count themselves, and programmatic dependent launch."""

from functools import cache

import torch
import triton
import triton.language as tl

MIN_TILE_ROWS = 16  # rows of the smallest tile of a product
TARGET_PROGRAMS = 512  # that keep a GPU busy with reading


@cache
def supports_pdl(device: torch.device) -> bool:
    """Whether the GPU knows programmatic dependent launch."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def arrival_counters(device: torch.device) -> torch.Tensor:
    """(TARGET_PROGRAMS,) int32, zeros between two kernels: how many programs have left their part of a result."""
    return torch.zeros(TARGET_PROGRAMS, dtype=torch.int32, device=device)


@triton.jit
def wait_for_inputs():
    """Behind it what earlier kernels wrote is there; the next kernel may start, and wait in its turn."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def is_last_program(count_ptr, SPLITS: tl.constexpr):
    """Whether the parts of all programs are there, this one's, stored before, too; the last finds the count at 0."""
    tl.debug_barrier()
    last = tl.atomic_add(count_ptr, 1, sem="acq_rel") == SPLITS - 1
    if last:
        tl.store(count_ptr, 0)
    return last
