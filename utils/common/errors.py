"""The errors that are ours to explain, and the exit codes of every script."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from types import TracebackType

from utils.common.interrupts import print_to_stderr
from utils.common.terminal import one_line

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
GONE = (errno.ENOENT, errno.ESTALE)
DISK_FAULTS = (errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG)
FREE_SPACE = "free some space and run the command again"
# Libraries report a failed write or allocation as a RuntimeError, or as an error of their own, with a text alone.
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # of Rust, in which safetensors is written
FAILED_WRITE = re.compile("PytorchStreamWriter failed|unexpected pos [0-9]+ vs|iostream error|No space left on device")
NO_DIRECTORY = re.compile("Parent directory .* does not exist")
NO_MEMORY = re.compile("allocate memory|bad_alloc|out of memory|can't start new thread|failed to map segment")


class UsageError(Exception):
    """
    The request cannot be served as it stands. Each argument is one fault: one line that names the value and the mend.
    """

    def __str__(self) -> str:
        return "\n".join(self.args)


class RunError(Exception):
    """The run failed for a reason that one line explains, such as a bad row under --strict."""


class RankError(RunError):
    """A RunError of this process, not of all: it is printed whichever process it is."""


class RowError(ValueError):
    """A row that cannot be used; the message says why."""


class Faults:
    """Collects what is wrong with a request, so that a user hears of all of it at once."""

    def __init__(self):
        self.found: list[str] = []

    def add(self, fault: str) -> None:
        self.found.append(fault)

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Keeps the UsageError that ends the block, and goes on behind it."""
        try:
            yield
        except UsageError as error:
            self.found += error.args

    def report(self) -> None:
        """
        Raises:
            UsageError: with every fault that was found.
        """
        if self.found:
            raise UsageError(*self.found)


def explain_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For `sys.excepthook`: one line where an import ran out of memory, which `run` does not see."""
    line = explain_machine_fault(error)
    if line is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print_to_stderr(f"error: {one_line(line)}")


def explain_machine_fault(error: BaseException) -> str | None:
    """One line on a disk that is full or fails, or on memory that ran out; None for any other error."""
    if isinstance(error, (UsageError, RunError, KeyboardInterrupt)):
        return None
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)  # a writer that fails again while it is closed hides the cause
    return next(filter(None, map(_explain_shortage, reversed(chain))), None) or _explain_disk(error)


def _explain_shortage(error: BaseException) -> str | None:
    text, number = " ".join(str(error).split()), _number_of(error)
    if number in FULL_DISK:
        return f"{_place_of(error)}{os.strerror(number)}: {FREE_SPACE}"
    by_text = isinstance(error, (RuntimeError, ImportError)) and NO_MEMORY.search(text)
    if by_text or number == errno.ENOMEM or isinstance(error, MemoryError):
        what = text.partition(". ")[0] if text else type(error).__name__
        return f"memory ran out ({what}): give smaller batches or fewer processes, or raise the limit"
    if isinstance(error, RuntimeError) and FAILED_WRITE.search(text):
        return f"a file could not be written, as on a full disk or at a quota: {FREE_SPACE}"
    return None


def _explain_disk(error: BaseException) -> str | None:
    number = _number_of(error)
    if number in GONE or NO_DIRECTORY.search(str(error)):
        what = f"{_place_of(error)}{os.strerror(number)}" if isinstance(error, OSError) else str(error).rstrip(".")
        return f"{what}: was it removed?"
    return f"{_place_of(error)}{os.strerror(number)}" if number in DISK_FAULTS else None


def _number_of(error: BaseException) -> int | None:
    match = OS_ERROR.search(str(error))
    return int(match[1]) if match else getattr(error, "errno", None)


def _place_of(error: BaseException) -> str:
    return f"{error.filename}: " if getattr(error, "filename", None) else ""


def error_message(error: BaseException) -> str:
    """What went wrong, for a person."""
    return explain_machine_fault(error) or str(error)
