"""
Starts DeepSpeed: its process group, the classes that its checkpoints may hold, and locks of builds that were killed.

process_group.py and inference/placement.py call `init_deepspeed`. DeepSpeed compiles its extensions at their first use
through `torch.utils.cpp_extension`, which guards a build with a file named `lock` and removes it at the end. A killed
build leaves the file, and every later run would wait for it forever, silently.
"""

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_default_build_root

from utils.common.console import print_line
from utils.common.processes import local_rank, process_rank, world_size
from utils.distributed.collectives import backend, collective_timeout

LONGEST_BUILD = 600  # seconds that a build on another machine, which shares the home directory, may take


def remove_stale_build_locks(several_machines: bool = False) -> list[Path]:
    """
    Remove the locks whose build no longer runs; return their paths.

    A running build holds its lock open, which is visible on its own machine. With `several_machines`, which may share
    the home directory, a lock must also be older than LONGEST_BUILD.
    """
    root = _build_root()
    stale = [lock for pattern in ("*/lock", "*/*/lock") for lock in root.glob(pattern) if not _is_held(lock)]
    if stale:
        time.sleep(1)  # a lock that was being released is gone after that
    removed = []
    for lock in stale:
        try:
            if several_machines and time.time() - lock.stat().st_mtime < LONGEST_BUILD:
                continue
            lock.unlink()
            removed.append(lock)
        except FileNotFoundError:
            continue
    return removed


def announce_build(extension: str) -> None:
    """Print that DeepSpeed will compile an extension, unless it is there: nothing else says why a run waits."""
    if not any(any(_build_root().glob(f"{folder}{extension}/{extension}.so")) for folder in ("", "*/")):
        print_line(f"compiling DeepSpeed's {extension}, once, which can take minutes")


def _build_root() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Hold back what DeepSpeed prints about extensions that it builds and loads; after an error, print it."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            yield
        except BaseException:
            sys.stderr.write(printed.getvalue())
            raise


def _is_held(lock: Path) -> bool:
    return any(target == str(lock) for target in _open_files())


def _open_files() -> Iterator[str]:
    """Yield the paths of the files that this user's processes have open."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            yield os.readlink(descriptor)
        except OSError:  # a process of another user, or one that has ended
            continue


if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed asks once, at its first import


def init_deepspeed() -> None:
    """Let DeepSpeed join the process group, or make one."""
    import deepspeed

    # DeepSpeed's shared-memory reduction reads this variable of its own launcher, and crashes without it.
    processes_here = os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local_rank() == 0:
        for lock in remove_stale_build_locks(several_machines=int(processes_here) < world_size()):
            print(f"removed {lock}, left by a build that was killed", flush=True)
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # Its checkpoints hold these beside tensors; utils/__init__.py forbids loading any other class.
    torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])
    if backend() == "gloo":
        announce_build("deepspeed_shm_comm")
    with _quietly():
        deepspeed.init_distributed(dist_backend=backend(), **collective_timeout())
    if backend() == "gloo":
        _forget_shared_memory()


def _forget_shared_memory() -> None:
    """
    Remove the name of the shared memory in which DeepSpeed sums.

    On the CPU each process has 66 MiB of it, which would stay in memory after the process ends. Every process must
    have opened it before.
    """
    torch.distributed.barrier()
    owner = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{process_rank()}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{owner}").unlink(missing_ok=True)
