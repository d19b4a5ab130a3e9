"""Raw files -> blocks of rows, in constant memory: globs, gzip, encodings, JSON in lines and spread over them."""

import glob
import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.common.errors import RowError, UsageError
from utils.data.encodings import decode_line, encoding_of, say
from utils.data.json_lines import values_of
from utils.data.json_values import ARRAY, VALUES, WRAPPED, ValueReader, layout_of

BLOCK_BYTES = 1 << 20
LONGEST_LINE = 64 << 20  # bytes; what has no newline for longer is no row


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a raw file: whole lines as bytes, or values that stand in an array or over several lines."""

    path: str
    first_line: int
    lines: bytes = b""
    encoding: str = "utf-8"
    elements: Sequence[tuple[int, Any | RowError]] = ()

    def values(self) -> Iterator[tuple[int, Any | RowError]]:
        """(line number from 1, value), a RowError where the file holds something else. Blank lines are skipped."""
        yield from self.elements
        for number, line in enumerate(self._decoded_lines(), start=self.first_line):
            if isinstance(line, RowError):
                yield number, line
            else:
                for value in values_of(line):
                    yield number, value

    def _decoded_lines(self) -> list[str | RowError]:
        if self.encoding == "utf-8":
            try:
                return self.lines.decode().split("\n")
            except UnicodeDecodeError:
                pass
        return [decode_line(line, self.encoding, self.path) for line in self.lines.split(b"\n")]


def input_paths(patterns: Sequence[str]) -> list[str]:
    """
    Files named one by one, or by patterns such as "data/*.json", each pattern's in the order of their names.

    Raises:
        UsageError: a name is not a file, a pattern fits none, or a file begins in an encoding that is not read.
    """
    paths = []
    for pattern in patterns:
        found = [pattern] if Path(pattern).is_file() else sorted(p for p in _fitting(pattern) if Path(p).is_file())
        if not found:
            raise UsageError(f"{pattern} is not a file" + (", and no file fits it" if "*" in pattern else ""))
        paths += found
    for path in paths:
        next(read_blocks(path), None)
    return list(dict.fromkeys(paths))


def _fitting(pattern: str) -> list[str]:
    """The names that fit; a directory that exists by its name as it stands is no pattern."""
    directory = Path(pattern)
    while not directory.is_dir():
        directory = directory.parent
    if glob.escape(str(directory)) == str(directory):
        return glob.glob(pattern)
    rest = str(Path(pattern).relative_to(directory))
    return [str(directory / name) for name in glob.glob(rest, root_dir=directory)]


def read_json_rows(path: str | Path) -> Iterator[tuple[int, Any | RowError]]:
    """
    (line number from 1, value) of each row of a file of JSON Lines, of JSON objects spread over lines, of a JSON array
    or of one in an object, `{"data": [...]}`, or of these with Python dicts for JSON objects; gzip or not; UTF-8 with
    or without a BOM, or GB18030, which is said on stderr.

    A thing that cannot be read is a RowError in place of its value.

    Raises:
        UsageError: `path` is not a file, or in an encoding that is not read.
    """
    for block in read_blocks(str(path)):
        yield from block.values()


def read_blocks(path: str) -> Iterator[Block]:
    """
    The blocks of a file, the same at each reading; `read_json_rows` says which files.

    Raises:
        UsageError: `path` is not a file, or in an encoding that is not read.
    """
    if not Path(path).is_file():
        raise UsageError(f"{path} is not a file")
    with open(path, "rb") as file:
        stream = _Stream(gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file)
        sample = stream.read(BLOCK_BYTES)
        encoding = encoding_of(sample, path)
        stream.unread(sample)
        if encoding != "utf-8":
            say(f"{path}: GB18030, read as such; what is written is UTF-8")
        line = 1
        while True:
            head = stream.read(BLOCK_BYTES)
            layout, start = layout_of(head, encoding, len(head) == BLOCK_BYTES)
            if layout not in (ARRAY, WRAPPED, VALUES):
                stream.unread(head)
                yield from _line_blocks(path, stream, encoding, line)
                break
            line += head[:start].count(b"\n")
            stream.unread(head[start:])
            reader = ValueReader(stream, encoding, line, layout, BLOCK_BYTES)
            for elements in reader.batches():
                yield Block(path, elements[0][0], elements=elements)
            line = reader.line
        if stream.error:
            yield Block(path, line, elements=[(line, RowError(f"the file breaks off: {stream.error}"))])


class _Stream:
    """Reads bytes of a file, plain or gzip; a broken gzip file ends where it breaks, and `error` says why."""

    def __init__(self, file):
        self.file = file
        self.ahead = b""
        self.error = ""

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer at the end alone."""
        parts, missing = [self.ahead[:size]], size - len(self.ahead)
        self.ahead = self.ahead[size:]
        while missing > 0 and not self.error:
            try:
                data = self.file.read1(missing)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                self.error = " ".join(str(error).split()) or type(error).__name__
                break
            if not data:
                break
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)

    def unread(self, data: bytes) -> None:
        self.ahead = data + self.ahead


def _line_blocks(path: str, stream: _Stream, encoding: str, line: int) -> Iterator[Block]:
    parts, size = [], 0  # of the line that the last read ended in
    while True:
        data = stream.read(BLOCK_BYTES)
        cut = data.rfind(b"\n") + 1
        if data and not cut:
            parts.append(data)
            size += len(data)
            if size <= LONGEST_LINE:
                continue
            yield Block(path, line, elements=[(line, RowError(f"a line longer than {LONGEST_LINE >> 20} MiB"))])
            while data and b"\n" not in data:
                data = stream.read(BLOCK_BYTES)
            stream.unread(data[data.find(b"\n") + 1 :])
            parts, size, line = [], 0, line + 1
            continue
        lines = b"".join([*parts, data[:cut]])
        if lines:
            yield Block(path, line, lines, encoding)
            line += lines.count(b"\n")
        if not data:
            return
        parts, size = [data[cut:]], len(data) - cut
