"""Values of every process, gathered and reduced over gloo, which needs no device."""

from datetime import timedelta
from functools import cache
from typing import Any

import torch

from utils.common.processes import is_main_process, world_size

LONG = timedelta(days=7)


def backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def collective_timeout() -> dict[str, timedelta]:
    """
    The timeout of a collective. gloo's outlasts any difference in work and any suspension, because `Watchdog` sees who
    is gone. NCCL keeps its own, which ends what hangs on a device.
    """
    return {"timeout": LONG} if backend() == "gloo" else {}


def mean_over_processes(value: float) -> float:
    """The mean of every process's value; all must call it."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    torch.distributed.all_reduce(total)
    return total.item() / world_size()


@cache
def cpu_group() -> torch.distributed.ProcessGroup:
    """Over gloo, which needs no device."""
    return torch.distributed.new_group(backend="gloo", timeout=LONG)


def barrier() -> None:
    if world_size() > 1:
        torch.distributed.barrier(group=cpu_group())


def gather_from_all(value: Any) -> list:
    """Every process's value, in the order of ranks, on every process; all must call it."""
    if world_size() == 1:
        return [value]
    gathered = [None] * world_size()
    torch.distributed.all_gather_object(gathered, value, group=cpu_group())
    return gathered


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process; all must call it. Does not wait for a GPU."""
    return bool(max_over_processes(int(flag)))


def max_over_processes(number: int) -> int:
    """The largest of every process's number; all must call it. Does not wait for a GPU."""
    if world_size() == 1:
        return number
    numbers = torch.tensor(number)
    torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX, group=cpu_group())
    return int(numbers)


def gather_lists(values: list) -> list:
    """Every process's list, one after the other, on the main process; all must call it, at any distance in time."""
    if world_size() == 1:
        return values
    gathered = [None] * world_size() if is_main_process() else None
    torch.distributed.gather_object(values, gathered, group=cpu_group())
    return [value for part in gathered for value in part] if is_main_process() else []
