"""
Says a usage error once, and last, under a launcher of several processes.

`utils.common.script.run` calls `report_usage_error`. All processes have the same fault; local rank 0 of each machine
says it, and the others wait for that, because a launcher ends all processes as soon as one has failed. What the
launchers leave, measured with 2 processes:

- torchrun, and accelerate launch with several processes: they end with a traceback of their own and a report, whose
  last entry is the first error file (TORCHELASTIC_ERROR_FILE) that a process wrote. The fault goes there and not to
  stderr: it is the last line, above a rule, of 35 (before: the first of 41). The
  exit code is 1, because the launcher raises an exception; nothing that a process does shortens that.
- deepspeed: the fault is the last line of stderr, and the exit code is 2. The launcher's log, on stdout, ends with a
  line for each process that it ends, and one with the command and the exit code.
- accelerate launch with one process: a traceback of 11 lines follows the fault, and the exit code is 1. It has no
  error file.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from utils.common.errors import EXIT_USAGE
from utils.common.processes import local_rank
from utils.common.signals import on_signals

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torch's agent sets it for each process, and reads the file that it names
DEEPSPEED = "CROSS_SIZE"  # DeepSpeed's launcher sets it
WAIT_FOR_RANK_0 = 20.0  # seconds; it may still be importing, while the machine is busy
WAIT_FOR_OTHERS = 5.0  # seconds; one that is still importing would be reported as killed
POLL = 0.01  # seconds


def report_usage_error(lines: Sequence[str]) -> None:
    """
    Print the lines where they are read last, or let the launcher print them; only local rank 0 does.

    Under torch's agent this ends the process, so that all processes end within its polling interval.
    """
    path = os.environ.get(ERROR_FILE)
    is_first = local_rank() == 0
    if path and os.path.isdir(os.path.dirname(path)):
        _report_to_agent(Path(path), lines)
    elif is_first:
        print_lines(lines)
    elif DEEPSPEED in os.environ:
        _wait(lambda: False, WAIT_FOR_RANK_0)  # the launcher ends this process once rank 0 has said it


def print_lines(lines: Sequence[str]) -> None:
    """Print lines to stderr, also where the terminal or the reader of a pipe is gone."""
    for line in lines:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def _report_to_agent(path: Path, lines: Sequence[str]) -> None:
    """
    Write the error file that torch's agent reads, and end this process together with the others.

    Those whose fault local rank 0 has said exit with 0: the agent reports each that does not, in seven lines.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    files = [path.parent.parent / str(rank) / path.name for rank in range(processes)]
    code = EXIT_USAGE
    if local_rank() == 0:
        _wait(lambda: all(file.exists() for file in files[1:]), WAIT_FOR_OTHERS)
        if not _agent_is_parent():
            print_lines(lines)
        _write(path, "\n".join(["", *lines]), time.time())
    else:
        _write(path, "as on local rank 0", time.time() + 1)  # the agent shows the earliest one last
        if _wait(files[0].exists, WAIT_FOR_RANK_0):
            code = 0
        else:  # it has another fault, or none
            print_lines(lines)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _write(path: Path, text: str, seconds: float) -> None:
    """Write an error file as torch.distributed.elastic's ErrorHandler does; `py_callstack` is what is shown of it."""
    extra = {"py_callstack": text, "timestamp": str(int(seconds))}
    partial = path.with_suffix(".partial")
    with contextlib.suppress(OSError):
        partial.write_text(json.dumps({"message": {"message": "UsageError", "extraInfo": extra}}), encoding="utf-8")
        partial.rename(path)


def _agent_is_parent() -> bool:
    """Whether the parent made the error file's name: a wrapper in between has inherited the variable."""
    try:
        inherited = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"{ERROR_FILE}={os.environ[ERROR_FILE]}".encode() not in inherited


def _wait(is_over: Callable[[], bool], seconds: float) -> bool:
    """Return whether `is_over` became true, within `seconds` and before a signal."""
    signals: list[int] = []
    deadline = time.monotonic() + seconds
    with on_signals(signals.append):
        while not is_over():
            if signals or time.monotonic() > deadline:
                return False
            time.sleep(POLL)
    return True
