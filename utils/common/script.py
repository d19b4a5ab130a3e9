"""
How every script runs its `main`: errors become one line and an exit code.

A script imports `run` before any other library: importing `utils` sets the environment variables that torch,
transformers and tqdm read when they are imported.
"""

import os
import sys
from collections.abc import Callable

from utils import __version__
from utils.common.console import print_line
from utils.common.errors import EXIT_FAILED, EXIT_USAGE, RankError, RunError, UsageError
from utils.common.launcher_report import print_lines, report_usage_error
from utils.common.machine_faults import explain_machine_fault, explain_missing_package
from utils.common.processes import local_rank
from utils.common.signals import on_signals, raise_interrupted, restore_default_handlers
from utils.common.terminal import drop_closed_outputs, one_line

_failure_callbacks: list[Callable[[BaseException], None]] = []


def run(
    main: Callable[[], None], after_signal: str = "run the same command again: it resumes where this one stopped"
) -> None:
    """
    Run a script's `main` and end the process by its result.

    Exit code 0: done. 1: the run failed or a signal stopped it, with one line for a RunError, a signal, a full or
    failing disk or exhausted memory, and a traceback for anything else. 2: the request is wrong, with one line for
    each fault. `--traceback` shows the traceback in every case; so does a bare `--debug`. Under a launcher only the
    first process of each machine prints the lines that all processes have. `--version` prints the version alone.

    Args:
        main: the script; it reads `sys.argv`.
        after_signal: what the user can do after a signal, for the message.
    """
    if "--version" in sys.argv[1:]:
        print_line(f"{os.path.basename(sys.argv[0])} {__version__}")
        return
    show_traceback = take_traceback_flag(sys.argv)
    restore_default_handlers()
    try:
        with on_signals(raise_interrupted()):
            main()
    except (Exception, KeyboardInterrupt) as error:
        if missing := explain_missing_package(error):
            error = UsageError(missing)
        with on_signals(lambda number: None):  # a launcher sends signals to all processes when one has failed
            if not _report(error, after_signal, show_traceback) or show_traceback:
                raise
        sys.exit(EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED)


def on_failure(callback: Callable[[BaseException], None]) -> Callable[[], None]:
    """
    Call `callback(error)` when an error other than a UsageError is about to end this script.

    Returns:
        A function that removes the callback.
    """
    _failure_callbacks.append(callback)
    return lambda: _failure_callbacks.remove(callback)


def _report(error: BaseException, after_signal: str, show_traceback: bool) -> bool:
    """Call the failure callbacks and print the error's lines; False if the error needs a traceback."""
    machine_fault = explain_machine_fault(error)
    explained = RankError(machine_fault) if machine_fault else error
    if not isinstance(error, UsageError):
        for callback in _failure_callbacks:
            callback(explained)
    if isinstance(error, KeyboardInterrupt):
        drop_closed_outputs()
        lines = [f"{str(error) or 'stopped by SIGINT'}: {after_signal}"]
    elif isinstance(explained, (UsageError, RunError)):
        lines = explained.args
    else:
        return False
    lines = [f"{os.path.basename(sys.argv[0])}: error: {one_line(str(line))}" for line in lines]
    if isinstance(error, UsageError) and not show_traceback:
        report_usage_error(lines)
    elif local_rank() == 0 or isinstance(explained, RankError):
        print_lines(lines)
    return True


def take_traceback_flag(argv: list[str]) -> bool:
    """
    Remove `--traceback` and a bare `--debug` from `argv`; return whether one was there.

    `--debug` with a value stays: it is a flag of TrainingArguments.

    >>> argv = ["x", "--debug", "underflow_overflow", "--traceback", "--max_steps", "3"]
    >>> take_traceback_flag(argv), argv
    (True, ['x', '--debug', 'underflow_overflow', '--max_steps', '3'])
    """
    following = argv[1:] + ["--"]
    kept = [
        word
        for word, next_word in zip(argv, following, strict=True)
        if not (word == "--traceback" or word == "--debug" and next_word.startswith("--"))
    ]
    was_given = len(kept) < len(argv)
    argv[:] = kept
    return was_given
