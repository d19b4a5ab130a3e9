"""
Where libraries keep what they compile, and load again without looking who wrote it: directories of this user alone.

torch.compile's default is a name in /tmp that anybody can guess and make before. The others lie below the home
directory, which in a container may be /tmp, or another user's.
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
    """Sets the variables of caches of code that the user has not set, where the default is not the user's own."""
    defaults = {
        "TORCHINDUCTOR_CACHE_DIR": _cache_home() / "torchinductor",
        "TORCH_EXTENSIONS_DIR": _cache_home() / "torch_extensions",
        "TRITON_CACHE_DIR": Path(os.environ.get("TRITON_HOME") or _home()) / ".triton" / "cache",
    }
    others = {}
    for variable, path in defaults.items():
        if variable in os.environ:
            continue
        if not is_own(path):
            others[variable] = path
            os.environ[variable] = str(_private_directory() / path.name)
        elif variable == "TORCHINDUCTOR_CACHE_DIR":
            os.environ[variable] = str(path)
    if others and os.environ.get("RANK", "0") == "0":
        places = ", ".join(f"{path} ({variable})" for variable, path in others.items())
        print(f"not this user's alone, so compiled code is not kept: {places}", file=sys.stderr)


def own_cache(name: str) -> Path:
    """A directory for a library's cache, made if need be: in the user's cache, or for this process where none is."""
    path = _cache_home() / name
    directory = path if is_own(path) else _private_directory() / name
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def is_own(path: Path) -> bool:
    """
    Whether this user can write to `path`, or make it, and none but root besides: neither to it nor, on the way to it,
    to a directory whose entries they could replace. A group with the user's number is the user's own.
    """
    if not path.is_absolute():  # a user without a home directory: "~" stays
        return False
    path = Path(os.path.realpath(path))
    try:
        while not path.exists():
            path = path.parent
        for directory in (path, *path.parents):
            found = directory.stat()
            group = found.st_mode & stat.S_IWGRP and found.st_gid not in (os.geteuid(), 0)
            if found.st_uid not in (os.geteuid(), 0):
                return False
            if (group or found.st_mode & stat.S_IWOTH) and (directory == path or not found.st_mode & stat.S_ISVTX):
                return False
    except PermissionError:
        return False
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)


def _home() -> Path:
    return Path(os.path.expanduser("~"))


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache")


@cache
def _private_directory() -> Path:
    """One that goes with the process; no other user knows its name beforehand, or can write to it."""
    directory, process = Path(tempfile.mkdtemp(prefix="caches-")), os.getpid()

    def remove() -> None:
        if os.getpid() == process:  # no forked one
            shutil.rmtree(directory, ignore_errors=True)

    atexit.register(remove)
    return directory
