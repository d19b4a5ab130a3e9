"""
Directories for compiled code that only this user can write to.

Libraries load compiled code again without checking who wrote it. torch.compile's default is a name in /tmp that
anybody can guess and create first; the others lie below the home directory, which in a container may be /tmp or
another user's. `utils` calls `use_private_caches` before any library is imported.
"""

import atexit
import os
import shutil
import stat
import sys
import tempfile
from functools import cache
from pathlib import Path


def use_private_caches() -> None:
    """
    Set the cache variables of torch and Triton where their defaults are not safe.

    A variable that the user has set stays. Where a default directory is writable by others, one for this process alone
    takes its place, and a line on stderr says so.
    """
    defaults = {
        "TORCHINDUCTOR_CACHE_DIR": _cache_home() / "torchinductor",
        "TORCH_EXTENSIONS_DIR": _cache_home() / "torch_extensions",
        "TRITON_CACHE_DIR": Path(os.environ.get("TRITON_HOME") or _home()) / ".triton" / "cache",
    }
    unsafe = {}
    for variable, path in defaults.items():
        if variable in os.environ:
            continue
        if not is_user_owned(path):
            unsafe[variable] = path
            os.environ[variable] = str(_process_directory() / path.name)
        elif variable == "TORCHINDUCTOR_CACHE_DIR":
            os.environ[variable] = str(path)
    if unsafe and os.environ.get("RANK", "0") == "0":
        directories = ", ".join(f"{path} ({variable})" for variable, path in unsafe.items())
        print(f"compiled code is not kept, because other users can write to {directories}", file=sys.stderr)


def user_cache(name: str) -> Path:
    """
    Create and return a library's cache directory.

    It lies in the user's cache directory, or, where other users can write to that, in one that this process removes.
    """
    path = _cache_home() / name
    directory = path if is_user_owned(path) else _process_directory() / name
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def is_user_owned(path: Path) -> bool:
    """
    Whether only this user (and root) can write to `path`, existing or not.

    False also if others could replace a directory on the way to it. A group with the user's number is the user's own.
    """
    if not path.is_absolute():  # a user without a home directory: "~" stays
        return False
    path = Path(os.path.realpath(path))
    users = (os.geteuid(), 0)
    try:
        while not path.exists():
            path = path.parent
        for directory in (path, *path.parents):
            status = directory.stat()
            if status.st_uid not in users:
                return False
            others_write = status.st_mode & stat.S_IWOTH or (
                status.st_mode & stat.S_IWGRP and status.st_gid not in users
            )
            # In a sticky directory such as /tmp, others can add entries but not replace this user's.
            if others_write and (directory == path or not status.st_mode & stat.S_ISVTX):
                return False
    except PermissionError:
        return False
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)


def _home() -> Path:
    return Path(os.path.expanduser("~"))


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache")


@cache
def _process_directory() -> Path:
    """A directory with a random name that is removed when this process ends."""
    directory, process = Path(tempfile.mkdtemp(prefix="caches-")), os.getpid()

    def remove() -> None:
        if os.getpid() == process:  # not a forked child
            shutil.rmtree(directory, ignore_errors=True)

    atexit.register(remove)
    return directory
