"""
Joins and leaves the process group that a launcher started: torchrun, deepspeed or accelerate, with GPUs or without.

The scripts call `init_process_group` once their request is checked, and `shut_down` at the end.
"""

import os
import signal
import socket
from collections.abc import Callable
from typing import TypeVar

import torch

from utils.common.errors import UsageError
from utils.common.processes import end_with_parent, local_rank, process_rank, world_size
from utils.distributed.collectives import backend, barrier, collective_timeout, gather_from_all
from utils.distributed.deepspeed_setup import init_deepspeed
from utils.distributed.watchdog import Watchdog

_watchdogs: list[Watchdog] = []  # one, if there are other processes
T = TypeVar("T")


def check_port() -> None:
    """
    Check that rank 0 can listen on the launcher's port.

    Raises:
        UsageError: another process listens there already.
    """
    hosts_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun listens, and fails there
    if world_size() == 1 or process_rank() != 0 or not hosts_store or "MASTER_PORT" not in os.environ:
        return
    port = int(os.environ["MASTER_PORT"])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            raise UsageError(
                f"port {port} is in use, by another run perhaps: give the launcher --master_port"
            ) from None


def init_process_group(use_deepspeed: bool, advice: str = "the same command resumes where this one stopped") -> None:
    """
    Join the processes that the launcher started: NCCL with GPUs, gloo without.

    A lone process joins nothing, unless DeepSpeed asks for a group of one.

    On the CPU this must come before `TrainingArguments`: accelerate would otherwise see a world of one process, two
    DDP processes would train two models, and `zero.Init` would fail on the batch size.

    Args:
        advice: what a user can do after a process is lost.
    """
    if "LOCAL_RANK" in os.environ:
        end_with_parent(signal.SIGTERM)  # the launcher
    if world_size() == 1:
        if not use_deepspeed:
            return
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
            os.environ.setdefault(name, value)
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = str(free_port())
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    if use_deepspeed:
        init_deepspeed()
    elif not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend(), **collective_timeout())
    if world_size() > 1:
        _watchdogs.append(Watchdog(process_rank(), world_size(), advice))


def on_all_processes(call: Callable[[], T]) -> list[T]:
    """
    Return what `call` returns on every process, in the order of ranks.

    Every process must call it.

    Raises:
        UsageError: `call` raised one on some process; the first one is raised on all, and all leave the group.
    """
    try:
        outcome = call(), ()
    except UsageError as error:
        outcome = None, error.args
    outcomes = gather_from_all(outcome)
    faults = [lines for _, lines in outcomes if lines]
    if faults:
        shut_down()
        raise UsageError(*faults[0])
    return [value for value, _ in outcomes]


def free_port() -> int:
    """Return a port of this machine on which no process listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def shut_down() -> None:
    """
    Leave the process group together with all other processes.

    No rank may end while another still talks to it. CUDA graphs that hold NCCL's reductions must be freed before: with
    an engine alive, this did not return.
    """
    if _watchdogs:
        barrier()
        _watchdogs.pop().close()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
