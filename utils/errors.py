"""The errors that are ours to explain, and the exit codes of every script."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from utils.terminal_text import one_line

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG, errno.ENOENT)


failing: list[Callable[[BaseException], None]] = []  # called with the error that is about to end a script


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

    @contextmanager
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


def run(main: Callable[[], None]) -> None:
    """
    Runs a script's `main`. Exit code 0: done; 1: the run failed (traceback, or one line of a RunError or of a full or
    failing disk); 2: the request was wrong (one line a fault). With `--debug`, and nothing behind it, the traceback
    is shown in every case.

    Under a launcher only the first process of each machine prints the lines.
    """
    debug = take_debug_flag(sys.argv)
    try:
        main()
    except Exception as error:
        for call in failing if not isinstance(error, UsageError) else ():
            call(error)
        ours = isinstance(error, (UsageError, RunError)) or getattr(error, "errno", None) in DISK_FAULTS
        if debug or not ours:
            raise
        first = int(os.environ.get("LOCAL_RANK", "0")) == 0
        lines = error.args if isinstance(error, UsageError) else (describe(error),)
        for line in lines if first or isinstance(error, RankError) else ():
            print(f"{os.path.basename(sys.argv[0])}: error: {one_line(str(line))}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def describe(error: BaseException) -> str:
    """What went wrong, for a person."""
    if not isinstance(error, OSError):
        return str(error)
    mend = ": free some space and run the command again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{os.strerror(error.errno)}{mend}"


def take_debug_flag(argv: list[str]) -> bool:
    """Removes a bare `--debug` from `argv`; TrainingArguments has a flag of that name with a value, which stays."""
    for place, word in enumerate(argv):
        if word == "--debug" and (place + 1 == len(argv) or argv[place + 1].startswith("--")):
            del argv[place]
            return True
    return False
