"""
Gathers and reduces values over all processes; every process must call each function.

gloo carries them, which needs no device and waits for none; `mean_over_processes` alone uses the default group.
Training and inference call it.
"""

from datetime import timedelta
from functools import cache
from typing import Any

import torch

from utils.common.processes import is_main_process, world_size

GLOO_TIMEOUT = timedelta(days=7)  # longer than any difference in work and any suspension


def backend() -> str:
    """
    Return the backend of the default process group.

    It is "nccl" with GPUs, else "gloo".
    """
    return "nccl" if torch.cuda.is_available() else "gloo"


def collective_timeout() -> dict[str, timedelta]:
    """
    Return the timeout argument of `init_process_group`.

    gloo's is practically endless, as `Watchdog` notices a process that is gone. NCCL keeps its default, which ends
    what hangs on a device.
    """
    return {"timeout": GLOO_TIMEOUT} if backend() == "gloo" else {}


def mean_over_processes(value: float) -> float:
    """Return the mean of every process's value, over the default group."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    torch.distributed.all_reduce(total)
    return total.item() / world_size()


@cache
def cpu_group() -> torch.distributed.ProcessGroup:
    """Return a process group over gloo, made once."""
    return torch.distributed.new_group(backend="gloo", timeout=GLOO_TIMEOUT)


def barrier() -> None:
    """Return once every process has called it."""
    if world_size() > 1:
        torch.distributed.barrier(group=cpu_group())


def gather_from_all(value: Any) -> list:
    """Return every process's value, in the order of ranks, on every process."""
    if world_size() == 1:
        return [value]
    gathered = [None] * world_size()
    torch.distributed.all_gather_object(gathered, value, group=cpu_group())
    return gathered


def any_process(flag: bool) -> bool:
    """
    Return whether the flag is set on any process.

    This does not wait for a GPU.
    """
    return bool(max_over_processes(int(flag)))


def max_over_processes(number: int) -> int:
    """
    Return the largest of every process's number.

    This does not wait for a GPU.
    """
    if world_size() == 1:
        return number
    numbers = torch.tensor(number)
    torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX, group=cpu_group())
    return int(numbers)


def gather_lists(values: list) -> list:
    """
    Return every process's list, concatenated by rank, on the main process.

    Other processes get []. It waits for processes that are days apart.
    """
    if world_size() == 1:
        return values
    gathered = [None] * world_size() if is_main_process() else None
    torch.distributed.gather_object(values, gathered, group=cpu_group())
    return [value for values_of_rank in gathered for value in values_of_rank] if is_main_process() else []
