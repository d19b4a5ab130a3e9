"""How every script runs its `main`: errors become one line and an exit code."""

import contextlib
import os
import sys
from collections.abc import Callable

from utils.common.errors import RankError, RunError, UsageError, explain_machine_fault
from utils.common.interrupts import drop_closed_outputs, end_answers_to_imports, on_signals, raise_interrupted
from utils.common.terminal import one_line

failing: list[Callable[[BaseException], None]] = []  # called with the error that is about to end a script


def run(main: Callable[[], None], go_on: str = "run the same command again: it goes on where this one was") -> None:
    """
    Runs a script's `main`. Exit code 0: done; 1: the run failed, or a signal stopped it (traceback, or one line of a
    RunError, of a signal, of a full or failing disk, or of memory that ran out); 2: the request was wrong (one line a
    fault). With `--debug`, and nothing behind it, the traceback is shown in every case. `go_on` tells a user what to
    do after a signal.

    Under a launcher only the first process of each machine prints the lines that all of them have.
    """
    debug = take_debug_flag(sys.argv)
    end_answers_to_imports()
    try:
        with on_signals(raise_interrupted()):
            main()
    except (Exception, KeyboardInterrupt) as error:
        with on_signals(lambda number: None):  # a launcher ends the others of a process that failed
            if not _report(error, go_on) or debug:
                raise
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _report(error: BaseException, go_on: str) -> bool:
    """Tells those in `failing` of an error, and prints its lines; False where it takes a traceback to explain it."""
    machine_fault = explain_machine_fault(error)
    explained = RankError(machine_fault) if machine_fault else error
    for call in failing if not isinstance(error, UsageError) else ():
        call(explained)
    if isinstance(error, KeyboardInterrupt):
        drop_closed_outputs()
        lines = [f"{str(error) or 'stopped by SIGINT'}: {go_on}"]
    elif isinstance(explained, (UsageError, RunError)):
        lines = explained.args
    else:
        return False
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    for line in lines if first or isinstance(explained, RankError) else ():
        with contextlib.suppress(OSError):  # the terminal, or what read this, may be gone
            print(f"{os.path.basename(sys.argv[0])}: error: {one_line(str(line))}", file=sys.stderr, flush=True)
    return True


def take_debug_flag(argv: list[str]) -> bool:
    """Removes a bare `--debug` from `argv`; TrainingArguments has a flag of that name with a value, which stays."""
    for place, word in enumerate(argv):
        if word == "--debug" and (place + 1 == len(argv) or argv[place + 1].startswith("--")):
            del argv[place]
            return True
    return False
