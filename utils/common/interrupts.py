"""
Signals that ask a script to end: SIGINT (Ctrl-C), SIGTERM, SIGHUP (a closed terminal), and in training SIGUSR1.

Each ends a script where it stands, as an `Interrupted` that `utils.common.script.run` turns into one line. Training
takes them as a request to save, see `utils.training.callbacks.StopOnSignal`. SIGQUIT (Ctrl-\\) is left alone: it ends
at once.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AT_ONCE = 1.0  # seconds within which signals are one: a terminal's, its launcher's and a dead parent's


class Interrupted(KeyboardInterrupt):
    """A signal asks this script to end. A KeyboardInterrupt, which libraries let through and clean up after."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")


@contextlib.contextmanager
def on_signals(action: Callable[[int], None], numbers: tuple[int, ...] = STOP_SIGNALS) -> Iterator[None]:
    """
    Calls `action` at each of these signals until the block ends. What is ignored stays ignored (nohup). A process
    forked in the block leaves them to its parent, all but SIGTERM, which ends it. Only the main thread can do this; in
    another, nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def receive(number: int, frame) -> None:
        if os.getpid() == owner:
            action(number)
        elif number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.getsignal(number) for number in numbers}
    answered = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in answered:
        signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in answered.items():
            signal.signal(number, handler)


def raise_interrupted() -> Callable[[int], None]:
    """An action that raises Interrupted: at the first signal, and at those that come more than a second after it."""
    last = -AT_ONCE

    def action(number: int) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > AT_ONCE:
            raise Interrupted(number)

    return action


def print_to_stderr(line: str) -> None:
    """Writes a line to stderr; safe in a signal handler, and where the terminal is gone."""
    with contextlib.suppress(OSError):
        os.write(2, f"{os.path.basename(sys.argv[0])}: {line}\n".encode(errors="replace"))


def drop_closed_outputs() -> None:
    """Lets stdout and stderr go nowhere where they cannot be written: a terminal that closed, a `tee` that ended."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            drop_output(stream)


def drop_output(stream: IO[str]) -> None:
    """Lets what is written to `stream`, and what waits in it, go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def is_script() -> bool:
    """Whether this process runs a script of this toolkit."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    root = Path(__file__).resolve().parents[2]
    return file is not None and Path(file).resolve().parent in (root, root / "tools")


def answer_during_imports() -> None:
    """
    Until `utils.common.script.run` takes over, lets a signal end this script with one line. Nothing has begun then,
    and an exception inside a library's import can leave anything.
    """

    for number in STOP_SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _end)


def end_answers_to_imports() -> None:
    """Undoes `answer_during_imports`."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _end(number: int, frame) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print_to_stderr(f"error: {Interrupted(number)}: run the same command again")
    os._exit(1)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _end_at_bus_error(number: int) -> None:
    print_to_stderr(
        "error: a file that was read as memory is no longer all there: a dataset was cut off or overwritten, its disk "
        "failed, or /dev/shm is full"
    )
    os._exit(1)


def explain_bus_errors() -> None:
    """Lets SIGBUS end this process with one line. Python's own handlers run behind the instruction that fails."""
    ctypes.CDLL(None).signal(signal.SIGBUS, _end_at_bus_error)
