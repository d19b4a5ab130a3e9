"""
Outputs that appear complete or not at all, and never in the place of an input.

Every script writes its results with `atomic_writer`; `check_output_path` refuses a bad path before the work starts.
"""

import contextlib
import glob
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from utils.common.errors import UsageError
from utils.common.machine_faults import FULL_DISK

UNENCODABLE = "backslashreplace"  # a byte of a file name that is not UTF-8 becomes \\udcff, which JSON can read back


def check_output_path(path: str | os.PathLike, inputs: Iterable[str | os.PathLike] = (), flag: str = "") -> None:
    """
    Refuse an output that `atomic_writer` could not write or that would destroy an input.

    Args:
        path: the output file.
        inputs: files and directories that the command reads.
        flag: the flag that names `path`, for the message.

    Raises:
        UsageError: `path` is a directory, a device or a pipe; or one of `inputs`, under any name or link; or in a
            directory that cannot be written to.
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
    Open a text file that replaces `path` when the block ends without an error.

    After an error `path` is unchanged. The file is UTF-8, unencodable characters are written as in UNENCODABLE.
    Leftovers of killed runs of this machine are removed.

    Raises:
        UsageError: the directory cannot be created or written to, or `path` is not a plain file.
    """
    check_output_path(path)
    path = Path(path)
    temporary = _temporary_path(path)
    with _usage_error_if_unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        file = temporary.open("w", encoding="utf-8", errors=UNENCODABLE, newline="\n")
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
    """
    Create a directory beside `path` for intermediate files; it is removed when the block ends.

    Raises:
        UsageError: the directory cannot be created.
    """
    path = Path(path)
    directory = _temporary_path(path)
    with _usage_error_if_unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def apply_umask(directory: str | os.PathLike) -> None:
    """
    Give the files in `directory` and below the permissions that the umask grants new files.

    safetensors makes its files readable by their owner alone, whatever the umask says.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    umask = int(re.search(r"^Umask:\s*([0-7]+)", status, flags=re.MULTILINE)[1], 8)  # os.umask would change it
    for path in Path(directory).rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o666 & ~umask)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files and directories of `path` whose process no longer runs on this machine."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        process_id = leftover.name.split(".")[-2]
        if process_id.isdigit() and not Path(f"/proc/{process_id}").exists():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def _temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def _usage_error_if_unwritable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
