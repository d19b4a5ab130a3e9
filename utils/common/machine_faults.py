"""
Recognises faults of the machine, a full or failing disk, exhausted memory, a missing package; explains each in a line.

`utils.common.script.run` asks for each error that ends a script. Libraries report such faults as an OSError, as a
RuntimeError with only a text, or as an error of their own, often while they handle the first one: so the whole chain
of causes is searched, by error number where there is one and by text elsewhere. Nothing else in the tree does this.
"""

import errno
import os
import re
import sys
from pathlib import Path
from types import TracebackType

from utils.common.errors import EXIT_USAGE, RunError, UsageError
from utils.common.terminal import one_line, print_to_stderr

ROOT = Path(__file__).resolve().parent.parent.parent
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
FILE_GONE = (errno.ENOENT, errno.ESTALE)
DISK_FAULTS = (errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG)
FREE_SPACE = "free some space and run the command again"
RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # safetensors is written in Rust
FAILED_WRITE = re.compile("PytorchStreamWriter failed|unexpected pos [0-9]+ vs|iostream error|No space left on device")
NO_DIRECTORY = re.compile("Parent directory .* does not exist")
NO_MEMORY = re.compile("allocate memory|bad_alloc|out of memory|can't start new thread|failed to map segment")


def explain_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """
    Print one line for a missing package or a machine fault, a traceback for any other error.

    Set as `sys.excepthook`, for errors during the imports, which `utils.common.script.run` does not see.

    Raises:
        SystemExit: a package is missing; the exit code is that of a wrong request.
    """
    missing = explain_missing_package(error)
    line = missing or explain_machine_fault(error)
    if line is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print_to_stderr(f"error: {one_line(line)}")
    if missing:
        sys.exit(EXIT_USAGE)


def explain_missing_package(error: BaseException) -> str | None:
    """Explain in one line that a package is not installed; None for any other error, as for a module of our own."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or not name or (ROOT / name).is_dir():
        return None
    fix = "activate the environment, or pip install -r requirements.txt"
    return f"{name} is not installed in {sys.executable}: {fix}"


def explain_machine_fault(error: BaseException) -> str | None:
    """Explain a full or failing disk, or exhausted memory, in one line; None for any other error."""
    if isinstance(error, (UsageError, RunError, KeyboardInterrupt)):
        return None
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    for cause in reversed(chain):  # the first error: a writer that fails again while it is closed hides it
        shortage = _explain_shortage(cause)
        if shortage:
            return shortage
    return _explain_disk(error)


def _explain_shortage(error: BaseException) -> str | None:
    text, number = " ".join(str(error).split()), _error_number(error)
    if number in FULL_DISK:
        return f"{_file_of(error)}{os.strerror(number)}: {FREE_SPACE}"
    by_text = isinstance(error, (RuntimeError, ImportError)) and NO_MEMORY.search(text)
    if by_text or number == errno.ENOMEM or isinstance(error, MemoryError):
        cause = text.partition(". ")[0] if text else type(error).__name__
        return f"memory ran out ({cause}): use smaller batches or fewer processes, or raise the limit"
    if isinstance(error, RuntimeError) and FAILED_WRITE.search(text):
        return f"a file could not be written, probably because of a full disk or a quota: {FREE_SPACE}"
    return None


def _explain_disk(error: BaseException) -> str | None:
    number = _error_number(error)
    if number in FILE_GONE or NO_DIRECTORY.search(str(error)):
        missing = f"{_file_of(error)}{os.strerror(number)}" if isinstance(error, OSError) else str(error).rstrip(".")
        return f"{missing}: was it removed?"
    return f"{_file_of(error)}{os.strerror(number)}" if number in DISK_FAULTS else None


def _error_number(error: BaseException) -> int | None:
    match = RUST_OS_ERROR.search(str(error))
    return int(match[1]) if match else getattr(error, "errno", None)


def _file_of(error: BaseException) -> str:
    return f"{error.filename}: " if getattr(error, "filename", None) else ""
