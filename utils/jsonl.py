"""Reading JSON Lines and JSON arrays row by row, and writing files that appear whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from utils.errors import UsageError

_DECODER = json.JSONDecoder()


def read_json_rows(path: str | os.PathLike) -> Iterator[tuple[int, Any | json.JSONDecodeError]]:
    """
    Yields (line number from 1, value) of a JSON Lines file, or (position from 1, value) of a file that is one JSON
    array. A line that is not JSON yields the error in place of the value; several values on one line, as `cat` makes
    of a file without a last newline, are read one by one. Blank lines are skipped. UTF-8, with or without BOM.

    Raises:
        UsageError: the file is missing, not UTF-8, or starts an array that never ends.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} is not a file")
    try:
        with path.open(encoding="utf-8-sig") as file:
            if _first_character(file) == "[":
                yield from _read_array(file, path)
                return
            for number, line in enumerate(file, start=1):
                yield from ((number, value) for value in _values(line))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 (byte {error.start}): convert it, for example with iconv") from None


def _first_character(file: IO[str]) -> str:
    start = file.tell()
    character = file.read(1)
    while character and character.isspace():
        character = file.read(1)
    file.seek(start)
    return character


def _read_array(file: IO[str], path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.load(file)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} starts like a JSON array but is not one: {error}") from None
    yield from enumerate(rows, start=1)


def _values(line: str) -> Iterator[Any | json.JSONDecodeError]:
    line = line.strip()
    while line:
        try:
            value, end = _DECODER.raw_decode(line)
        except json.JSONDecodeError as error:
            yield error
            return
        yield value
        line = line[end:].lstrip()


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike) -> Iterator[IO[str]]:
    """
    A text file (UTF-8) that replaces `path` when the block ends without an error, and leaves it untouched otherwise.

    Raises:
        UsageError: the directory cannot be made or written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = temporary.open("w", encoding="utf-8", newline="\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def dump_row(row: dict[str, Any]) -> str:
    """One line of JSON Lines, Chinese left readable."""
    return json.dumps(row, ensure_ascii=False) + "\n"
