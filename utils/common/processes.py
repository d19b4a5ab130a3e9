"""
What a process knows of its launcher: its rank, the number of processes, and who prints.

The launcher (torchrun, deepspeed, accelerate) says so in environment variables; without a launcher there is one
process of rank 0. No torch is needed.
"""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # an option of Linux's prctl


def process_rank() -> int:
    """Return this process's rank among all processes of the run."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's rank among the run's processes on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is rank 0."""
    return process_rank() == 0


def launched_by_accelerate_with_deepspeed() -> bool:
    """Whether `accelerate launch` started this process with a DeepSpeed configuration."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def launched_by_accelerate_with_fsdp() -> bool:
    """Whether `accelerate launch` started this process with an FSDP configuration."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send signal `number` to this process when its parent dies; otherwise it would live on unseen."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
