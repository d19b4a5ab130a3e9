"""
The errors that this toolkit explains, and the exit codes of every script.

`utils.common.script.run` prints them as one line each: a UsageError ends a script with exit code 2, every other error
with 1. An error of any other class is a bug and shows its traceback, unless it is a fault of disk or memory
(`utils.common.machine_faults`).
"""

import contextlib
from collections.abc import Iterator

EXIT_FAILED = 1
EXIT_USAGE = 2


class UsageError(Exception):
    """
    The request cannot be served.

    Each argument is one fault, in one line that names the value and the fix.
    """

    def __str__(self) -> str:
        return "\n".join(self.args)


class RunError(Exception):
    """The run failed for a reason that one line explains, such as a bad row under --strict."""


class RankError(RunError):
    """A RunError of this process alone: every process that raises one prints it, not only the first."""


class RowError(ValueError):
    """A row that cannot be used; the message says why."""


class Faults:
    """Collects the faults of a request, so that a user sees all of them at once."""

    def __init__(self):
        self.messages: list[str] = []

    def add(self, fault: str) -> None:
        """Add one fault, a line that names the value and the fix."""
        self.messages.append(fault)

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Keep the faults of a UsageError that ends the block, and continue after the block."""
        try:
            yield
        except UsageError as error:
            self.messages += error.args

    def report(self) -> None:
        """
        Raise all collected faults as one error.

        Raises:
            UsageError: there is at least one fault.
        """
        if self.messages:
            raise UsageError(*self.messages)
