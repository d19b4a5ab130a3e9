"""One line of JSON Lines -> values, and files that appear whole or not at all, in the place of no input."""

import ast
import contextlib
import glob
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterable, Iterator
from json.encoder import encode_basestring
from pathlib import Path
from typing import IO, Any

from utils.errors import FULL_DISK, RowError, UsageError

UNENCODABLE = "backslashreplace"  # bytes of a file name that are not UTF-8: as \\udcff, which JSON reads back
NEVER_ENDS = "a Python dict that never ends"
BLANKS = " \t\r\n\ufeff"  # a BOM stands in the middle of a file that `cat` made
_scan = json.JSONDecoder().scan_once  # (text, position) -> (value, end); what json.loads calls
_PYTHON_TOKENS = re.compile(r"""'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+"|[{}\[\]]""", re.DOTALL)


def scan_value(text: str, position: int) -> tuple[Any, int]:
    """
    The JSON value at `position` and where it ends, or the Python dict that `str(dict)` made, its quotes single: the
    lines of the first BELLE processing script are such. Nothing but literals is read.

    Raises:
        RowError: it cannot be a row, or its text holds half a surrogate pair, which no encoding can write.
        json.JSONDecodeError: it is not JSON, or breaks off.
    """
    try:
        value, end = _scan(text, position)
    except StopIteration as stop:  # json.loads does the same
        raise json.JSONDecodeError("Expecting value", text, stop.value) from None
    except json.JSONDecodeError:
        if not text.startswith("{'", position):
            raise
        value, end = _python_dict(text, position)
    except RecursionError:
        raise RowError("not a row: nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise RowError(f"not JSON: {error}") from None
    if text.find("\\ud", position, end) >= 0 or text.find("\\uD", position, end) >= 0:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except (UnicodeEncodeError, TypeError, ValueError) as error:
            raise RowError(f"text that cannot be written: {error}") from None
    return value, end


def _python_dict(text: str, position: int) -> tuple[dict, int]:
    depth, end = 0, None
    for token in _PYTHON_TOKENS.finditer(text, position):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token[0], 0)
        if depth == 0:
            end = token.end()
            break
    if end is None:
        raise RowError(NEVER_ENDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of odd escapes
            value = ast.literal_eval(text[position:end])
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise RowError(f"neither JSON nor a Python dict: {error}") from None
    if not isinstance(value, dict):
        raise RowError(f"a row must be an object, not {type(value).__name__}")
    return value, end


def values_of(line: str) -> list[Any | RowError]:
    """
    The values of one line: none of a blank one, several where `cat` joined files without a last newline or where the
    line is a JSON array. What follows the first thing that cannot be read is lost with it, as one RowError.
    """
    try:  # nearly every line is one object and nothing else
        value, end = _scan(line, 0)
        if end >= len(line) - 1 and isinstance(value, dict) and line[end:] in ("", "\r") and "\\u" not in line:
            return [value]
    except (StopIteration, ValueError, RecursionError):
        pass
    values, position = [], 0
    line = line.strip(BLANKS)
    while position < len(line):
        try:
            value, position = scan_value(line, position)
        except RowError as error:
            return [*values, error]
        except json.JSONDecodeError as error:
            return [*values, RowError(f"not JSON: {error.msg} at character {error.pos + 1}")]
        if isinstance(value, list):
            values += value
        else:
            values.append(value)
        while position < len(line) and line[position] in BLANKS:
            position += 1
        if line.startswith(",", position) and position == len(line) - 1:  # a line out of an array
            break
    return values


def check_output(path: str | os.PathLike, inputs: Iterable[str | os.PathLike] = (), flag: str = "") -> None:
    """
    Refuses, before the work, an output that `atomic_writer` could not write or that would destroy something.

    Args:
        path: the file to be.
        inputs: files and directories that the command reads.
        flag: the flag that names `path`, for the message.

    Raises:
        UsageError: `path` is a directory, a device or a pipe; is one of `inputs`, also by another name or link; lies
            where nothing can be written.
    """
    name = f"{flag} {os.fspath(path)}".strip()
    absolute = os.path.abspath(path)
    parent = os.path.realpath(os.path.dirname(absolute))
    if os.path.isdir(absolute) or os.fspath(path).endswith("/"):
        raise UsageError(f"{name} is a directory: name a file")
    mode = os.stat(path).st_mode if os.path.exists(path) else stat.S_IFREG
    if not stat.S_ISREG(mode) or parent == "/dev" or parent.startswith("/proc/"):
        raise UsageError(f"{name} is a device or a pipe, which a finished file would replace: name a file")
    for source in inputs:
        if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            raise UsageError(f"{name} is an input ({os.fspath(source)}), which would be lost: name another file")
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise UsageError(f"{name} cannot be written: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{name} cannot be written: no permission to write in {parent}")


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike) -> Iterator[IO[str]]:
    """
    A text file (UTF-8, with UNENCODABLE) that replaces `path` when the block ends without an error, and leaves it
    untouched otherwise. What a killed run of this machine left behind is removed.

    Raises:
        UsageError: the directory cannot be made or written to, or `path` is no plain file.
    """
    check_output(path)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        file = temporary.open("w", encoding="utf-8", errors=UNENCODABLE, newline="\n")
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_directory(path: str | os.PathLike) -> Iterator[Path]:
    """A directory beside `path` for what is written on the way to it; it goes with the block."""
    path = Path(path)
    directory = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        directory.mkdir()
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def remove_leftovers(path: Path) -> None:
    """Removes temporary files and directories of `path` whose process, of this machine, runs no more."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        process_id = left.name.split(".")[-2]
        if process_id.isdigit() and not Path(f"/proc/{process_id}").exists():
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


def dump_row(row: dict[str, Any]) -> str:
    """One line of JSON Lines, Chinese left readable."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def dump_pair(prompt: str, target: str) -> str:
    """`dump_row({"input": prompt, "target": target})`, four times as fast."""
    return f'{{"input": {encode_basestring(prompt)}, "target": {encode_basestring(target)}}}\n'
