"""The errors that are ours to explain, and the exit codes of every script."""

import os
import sys
from collections.abc import Callable


class UsageError(Exception):
    """The request cannot be served as it stands. Its message is one line that names the value and the mend."""


class RunError(Exception):
    """The run failed for a reason that one line explains, such as a bad row under --strict."""


class RowError(ValueError):
    """A row that cannot be used; the message says why."""


def run(main: Callable[[], None]) -> None:
    """
    Runs a script's `main`. Exit code 0: done; 1: the run failed (traceback, or one line of a RunError); 2: the request
    was wrong (one line).

    Under a launcher only the first process of each machine prints the line.
    """
    try:
        main()
    except (UsageError, RunError) as error:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
