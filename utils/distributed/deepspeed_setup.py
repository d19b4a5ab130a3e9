"""
Locks of extension builds that were killed.

DeepSpeed compiles its extensions at their first use through `torch.utils.cpp_extension`, which guards a build with a
file named `lock` and removes it at the end. A build that is killed leaves the file behind, and every later run waits
for it without end and without a word.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_default_build_root

from utils.common.processes import local_rank, process_rank, world_size
from utils.distributed.collectives import backend, collective_timeout

ELSEWHERE = 600  # seconds for which a machine that shares the home directory may be building


def remove_stale_build_locks(several_machines: bool = False) -> list[Path]:
    """
    Removes the locks whose build no longer runs, and returns them.

    A running build holds its lock open, which is visible on its own machine; with `several_machines`, whose home
    directory may be shared, a lock must also be older than any build takes.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    stale = [lock for pattern in ("*/lock", "*/*/lock") for lock in root.glob(pattern) if not _is_held(lock)]
    if stale:
        time.sleep(1)  # one that was being released is gone now
    removed = []
    for lock in stale:
        try:
            if several_machines and time.time() - lock.stat().st_mtime < ELSEWHERE:
                continue
            lock.unlink()
            removed.append(lock)
        except FileNotFoundError:
            continue
    return removed


def _is_held(lock: Path) -> bool:
    return any(target == str(lock) for target in _open_files())


def _open_files() -> Iterator[str]:
    """What the processes of this user have open."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            yield os.readlink(descriptor)
        except OSError:  # another user's, or gone by now
            continue


if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed asks once, at its first import


def init_deepspeed() -> None:
    """Makes the process group known to DeepSpeed, or lets it make one of the launcher's processes."""
    import deepspeed

    # DeepSpeed's shared-memory reduction reads the name that its own launcher gives this, and crashes without it.
    processes_here = os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local_rank() == 0:
        for lock in remove_stale_build_locks(several_machines=int(processes_here) < world_size()):
            print(f"removed {lock}, left behind by a build that was killed", flush=True)
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # What its checkpoints hold beside tensors; utils/__init__.py lets nothing else be loaded.
    torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])
    deepspeed.init_distributed(dist_backend=backend(), **collective_timeout())
    if backend() == "gloo":
        _forget_shared_memory()


def _forget_shared_memory() -> None:
    """
    Removes the name of the shared memory that DeepSpeed sums over on the CPU, once every process has it open: 66 MiB a
    process, which would stay in memory for good when the process ends.
    """
    torch.distributed.barrier()
    owner = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{process_rank()}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{owner}").unlink(missing_ok=True)
