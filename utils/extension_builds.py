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

from torch.utils.cpp_extension import get_default_build_root

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
