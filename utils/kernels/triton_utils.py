"""What the decode kernels share: programs that count themselves, and programmatic dependent launch."""

from functools import cache

import torch
import triton
import triton.language as tl

LEAST = 16  # rows of the smallest tile of a product
PROGRAMS = 512  # that keep a GPU busy with reading


@cache
def starts_early(device: torch.device) -> bool:
    """Whether the GPU knows programmatic dependent launch."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def arrival_counts(device: torch.device) -> torch.Tensor:
    """(PROGRAMS,) int32, zeros between two kernels: how many programs have left their part of a result."""
    return torch.zeros(PROGRAMS, dtype=torch.int32, device=device)


@triton.jit
def wait_for_inputs():
    """Behind it what earlier kernels wrote is there; the next kernel may start, and wait in its turn."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def is_last_to_arrive(count_ptr, PARTS: tl.constexpr):
    """Whether the parts of all programs are there, this one's, stored before, too; the last finds the count at 0."""
    tl.debug_barrier()
    last = tl.atomic_add(count_ptr, 1, sem="acq_rel") == PARTS - 1
    if last:
        tl.store(count_ptr, 0)
    return last
