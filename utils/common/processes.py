"""Processes that must not outlive the one that started them."""

import ctypes
import os
import signal

from utils.common.terminal import escape_controls

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with_parent(number: signal.Signals) -> None:
    """Has the signal sent to this process when its parent dies; it would go on unseen, beside what replaces it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def process_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_by_accelerate_with_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def is_main_process() -> bool:
    return process_rank() == 0


def print_once(message: str) -> None:
    """Prints on rank 0 alone."""
    if is_main_process():
        print(escape_controls(message), flush=True)


def launched_by_accelerate_with_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
