"""Files and directories that appear whole or not at all, in the place of no input."""

import contextlib
import glob
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from utils.common.errors import FULL_DISK, UsageError

UNENCODABLE = "backslashreplace"  # bytes of a file name that are not UTF-8: as \\udcff, which JSON reads back


def check_output_path(path: str | os.PathLike, inputs: Iterable[str | os.PathLike] = (), flag: str = "") -> None:
    """
    Refuses, before the work, an output that `atomic_writer` could not write or that would destroy something.

    Args:
        path: the file to be.
        inputs: files and directories that the command reads.
        flag: the flag that names `path`, for the message.

    Raises:
        UsageError: `path` is a directory, a device or a pipe; is one of `inputs`, also by another name or link; lies
            where nothing can be written.
    """
    name = f"{flag} {os.fspath(path)}".strip()
    absolute = os.path.abspath(path)
    parent = os.path.realpath(os.path.dirname(absolute))
    if os.path.isdir(absolute) or os.fspath(path).endswith("/"):
        raise UsageError(f"{name} is a directory: name a file")
    mode = os.stat(path).st_mode if os.path.exists(path) else stat.S_IFREG
    if not stat.S_ISREG(mode) or parent == "/dev" or parent.startswith("/proc/"):
        raise UsageError(f"{name} is a device or a pipe, which a finished file would replace: name a file")
    for source in inputs:
        if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            raise UsageError(f"{name} is an input ({os.fspath(source)}), which would be lost: name another file")
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise UsageError(f"{name} cannot be written: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{name} cannot be written: no permission to write in {parent}")


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike) -> Iterator[IO[str]]:
    """
    A text file (UTF-8, with UNENCODABLE) that replaces `path` when the block ends without an error, and leaves it
    untouched otherwise. What a killed run of this machine left behind is removed.

    Raises:
        UsageError: the directory cannot be made or written to, or `path` is no plain file.
    """
    check_output_path(path)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        file = temporary.open("w", encoding="utf-8", errors=UNENCODABLE, newline="\n")
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_directory(path: str | os.PathLike) -> Iterator[Path]:
    """A directory beside `path` for what is written on the way to it; it goes with the block."""
    path = Path(path)
    directory = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        directory.mkdir()
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def remove_leftovers(path: Path) -> None:
    """Removes temporary files and directories of `path` whose process, of this machine, runs no more."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        process_id = left.name.split(".")[-2]
        if process_id.isdigit() and not Path(f"/proc/{process_id}").exists():
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()
