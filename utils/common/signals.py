"""
Signals that ask a script to end: SIGINT (Ctrl-C), SIGTERM, SIGHUP (a closed terminal), and in training SIGUSR1.

`utils` handles them during the imports, then `utils.common.script.run` does: a signal raises `Interrupted`, which
unwinds the script like Ctrl-C, so that temporary files and worker processes are removed. Training handles them itself,
as a request to save: `utils.training.callbacks.StopOnSignal`. Processes that a script forks leave signals to it.
SIGQUIT (Ctrl-\\) keeps its default and ends a script at once. SIGBUS, a memory-mapped file that shrank, ends it with
one line.
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

from utils.common.terminal import print_to_stderr

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REPEAT_SECONDS = 1.0  # one Ctrl-C arrives several times: from the terminal, the launcher and a dying parent


class Interrupted(KeyboardInterrupt):
    """
    A signal asks this script to end.

    A KeyboardInterrupt, because libraries let that through and clean up after it.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")


@contextlib.contextmanager
def on_signals(action: Callable[[int], None], numbers: tuple[int, ...] = STOP_SIGNALS) -> Iterator[None]:
    """
    Call `action(number)` at each of these signals until the block ends.

    A signal that is ignored (nohup) stays ignored. A process forked in the block ignores these signals, except
    SIGTERM, which ends it. Python allows handlers in the main thread only; in another thread this does nothing.
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

    previous = {}
    for number in numbers:
        handler = signal.getsignal(number)
        if handler not in (signal.SIG_IGN, None):
            previous[number] = handler
            signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def raise_interrupted() -> Callable[[int], None]:
    """Return an action for `on_signals` that raises Interrupted, once for signals within `REPEAT_SECONDS`."""
    last_signal = -REPEAT_SECONDS

    def action(number: int) -> None:
        nonlocal last_signal
        before, last_signal = last_signal, time.monotonic()
        if last_signal - before > REPEAT_SECONDS:
            raise Interrupted(number)

    return action


def is_script() -> bool:
    """Whether this process runs a script of this repository's root or tools."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    root = Path(__file__).resolve().parents[2]
    return file is not None and Path(file).resolve().parent in (root, root / "tools")


def handle_signals_during_imports() -> None:
    """
    Let a signal end this process with one line, until `utils.common.script.run` takes over.

    Nothing has begun by then, and an exception inside a library's import could leave that library half imported.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _end_during_imports)


def restore_default_handlers() -> None:
    """Undo `handle_signals_during_imports`."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is _end_during_imports:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _end_during_imports(number: int, frame) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print_to_stderr(f"error: {Interrupted(number)}: run the same command again")
    os._exit(1)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _end_at_bus_error(number: int) -> None:
    print_to_stderr(
        "error: a memory-mapped file lost its contents: a dataset was cut off or overwritten while it was read, its "
        "disk failed, or /dev/shm is full"
    )
    os._exit(1)


def explain_bus_errors() -> None:
    """
    Let SIGBUS end this process with one line.

    The handler is set in C: Python runs its own only after the failing instruction, which never completes.
    """
    ctypes.CDLL(None).signal(signal.SIGBUS, _end_at_bus_error)
