"""One kind of error for what the user can mend, and the exit codes of every script."""

import os
import sys
from collections.abc import Callable


class UsageError(Exception):
    """The request cannot be served as it stands. Its message is one line that names the value and the mend."""


def run(main: Callable[[], None]) -> None:
    """
    Runs a script's `main`. Exit code 0: done; 1: the run failed (traceback); 2: the request was wrong (one line).

    Under a launcher only the first process of each machine prints the line.
    """
    try:
        main()
    except UsageError as error:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
