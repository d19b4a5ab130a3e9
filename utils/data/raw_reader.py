"""
Reads raw files as blocks of rows in constant memory: file patterns, gzip, encodings, JSON by lines or in arrays.

utils/data/row_parser.py turns the rows into conversations; utils/data/shards.py hands whole blocks to its workers,
which then decode and parse them. `datasets.load_dataset("json")` reads no JSON array in an object, no Python dicts, no
GB18030, needs one schema for all rows, and stops at the first bad one.
"""

import glob
import gzip
import json
import shlex
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from utils.common.errors import RowError, UsageError
from utils.data.encodings import decode_line, detect_encoding
from utils.data.json_lines import parse_line
from utils.data.json_values import ARRAY, VALUES, WRAPPED, ValueReader, detect_layout

BLOCK_BYTES = 1 << 20  # of a block: thousands of rows, so that work per block costs little
TABLE_SUFFIXES = (".csv", ".tsv", ".xls", ".xlsx", ".ods", ".parquet")
LONGEST_LINE = 64 << 20  # bytes; something without a newline for longer is no row


@dataclass(frozen=True)
class Block:
    """
    Consecutive rows of a raw file, cheap to send to another process.

    Either `lines`, whole lines as bytes, or `elements`, (line number, value) pairs of an array or of objects that
    spread over lines. `raw_bytes` are those of the file, perhaps compressed, that were read since the block before.
    """

    path: str
    first_line: int
    lines: bytes = b""
    encoding: str = "utf-8"
    elements: Sequence[tuple[int, Any | RowError]] = ()
    raw_bytes: int = 0

    def values(self) -> Iterator[tuple[int, Any | RowError]]:
        """
        Yield (line number from 1, value); blank lines are skipped.

        A RowError is in place of a value that cannot be read.
        """
        yield from self.elements
        for number, line in enumerate(self._decoded_lines(), start=self.first_line):
            if isinstance(line, RowError):
                yield number, line
            else:
                for value in parse_line(line):
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
    Expand file names and patterns such as "data/*.json".

    Each pattern's files are in the order of their names.

    Raises:
        UsageError: a name is not a file, a pattern matches none, a file is a table, or begins in an unsupported
            encoding.
    """
    paths = []
    for pattern in patterns:
        if Path(pattern).is_file():
            matches = [pattern]
        else:
            matches = sorted(path for path in _expand(pattern) if Path(path).is_file())
        if not matches:
            if Path(pattern).is_dir():
                raise UsageError(f"{pattern} is a directory, not a file: name its files, such as '{pattern}/*.json'")
            raise UsageError(f"{pattern} is not a file" + (", and no file matches it" if "*" in pattern else ""))
        paths += matches
    for path in paths:
        check_no_table(path)
    return list(dict.fromkeys(paths))


def check_no_table(path: str) -> None:
    """
    Check that a file named like a table has JSON rows nevertheless.

    Raises:
        UsageError: it is a table; with the command that converts it. Or it begins in an unsupported encoding.
    """
    suffix = Path(path).suffix.lower()
    is_text = suffix in (".csv", ".tsv") or suffix not in TABLE_SUFFIXES
    block = next(read_blocks(path), None) if is_text else None
    if suffix not in TABLE_SUFFIXES or block and any(isinstance(value, dict) for _, value in block.values()):
        return
    output = str(Path(path).with_suffix(".jsonl"))
    if not is_text:
        raise UsageError(f"{path} is a table, and rows are JSON: save it as {Path(path).stem}.csv and give that")
    options = "dtype=str, keep_default_na=False"
    options += ', sep="\\t"' if suffix == ".tsv" else ""
    options += f', encoding="{block.encoding}"' if block and block.encoding != "utf-8" else ""
    source, target = (json.dumps(name, ensure_ascii=False) for name in (path, output))
    program = f"import pandas; pandas.read_csv({source}, {options}).to_json({target}, "
    program += 'orient="records", lines=True, force_ascii=False)'
    raise UsageError(
        f"{path} is a table, and rows are JSON: convert it with python -c {shlex.quote(program)} and give {output}"
    )


def _expand(pattern: str) -> list[str]:
    """
    The names that match a pattern.

    A directory that exists under its literal name is no pattern.
    """
    directory = Path(pattern)
    while not directory.is_dir():
        directory = directory.parent
    if glob.escape(str(directory)) == str(directory):
        return glob.glob(pattern)
    rest = str(Path(pattern).relative_to(directory))
    return [str(directory / name) for name in glob.glob(rest, root_dir=directory)]


def read_json_rows(path: str | Path, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, Any | RowError]]:
    """
    Yield (line number from 1, value) of each row of a file.

    A RowError is in place of a value that cannot be read.

    The file holds JSON Lines, JSON objects that spread over lines, a JSON array, an array in an object
    (`{"data": [...]}`), or these with Python dicts in place of JSON objects. It may be gzip. It is UTF-8 with or
    without a BOM, or GB18030.

    Raises:
        UsageError: `path` is not a file, or in an unsupported encoding.
    """
    for block in read_blocks(str(path), block_bytes):
        yield from block.values()


def read_blocks(path: str, block_bytes: int = BLOCK_BYTES, longest_line: int = LONGEST_LINE) -> Iterator[Block]:
    """
    Yield the blocks of a file, the same at each call.

    `read_json_rows` says which files.

    Args:
        block_bytes: size of a block, which its last row may exceed.
        longest_line: bytes without a newline from which a line is rejected.

    Raises:
        UsageError: `path` is not a file, or in an unsupported encoding.
    """
    if not Path(path).is_file():
        raise UsageError(f"{path} is not a file")
    with open(path, "rb") as file:
        position = 0
        for block in _blocks(file, path, block_bytes, longest_line):
            yield replace(block, raw_bytes=file.tell() - position)
            position = file.tell()


def _blocks(file: BinaryIO, path: str, block_bytes: int, longest_line: int) -> Iterator[Block]:
    """Yield the blocks of an open file, without their `raw_bytes`."""
    stream = _Stream(gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file)
    sample = stream.read(block_bytes)
    encoding = detect_encoding(sample, path)
    stream.unread(sample)
    line = 1
    while True:
        head = stream.read(block_bytes)
        layout, start = detect_layout(head, encoding, len(head) == block_bytes)
        if layout not in (ARRAY, WRAPPED, VALUES):
            stream.unread(head)
            yield from _LineReader(stream, path, encoding, block_bytes, longest_line).blocks(line)
            break
        line += head[:start].count(b"\n")
        stream.unread(head[start:])
        reader = ValueReader(stream, encoding, line, layout, block_bytes)
        for elements in reader.batches():
            yield Block(path, elements[0][0], encoding=encoding, elements=elements)
        line = reader.line
    if stream.error:
        yield Block(path, line, elements=[(line, RowError(f"the file breaks off: {stream.error}"))])


class _Stream:
    """
    Reads bytes of a file, plain or gzip.

    A broken gzip file ends where it breaks, and `error` says why.
    """

    def __init__(self, file):
        self.file = file
        self.ahead = b""
        self.error = ""

    def read(self, size: int) -> bytes:
        """Read `size` bytes, fewer only at the end of the file."""
        pieces, missing = [self.ahead[:size]], size - len(self.ahead)
        self.ahead = self.ahead[size:]
        while missing > 0 and not self.error:
            try:
                data = self.file.read1(missing)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                self.error = " ".join(str(error).split()) or type(error).__name__
                break
            if not data:
                break
            pieces.append(data)
            missing -= len(data)
        return b"".join(pieces)

    def unread(self, data: bytes) -> None:
        """Put bytes back, to be read next."""
        self.ahead = data + self.ahead


@dataclass(frozen=True)
class _LineReader:
    """Reads blocks of whole lines from a stream; see `read_blocks` for the fields."""

    stream: _Stream
    path: str
    encoding: str
    block_bytes: int
    longest_line: int

    def blocks(self, line: int) -> Iterator[Block]:
        """
        Yield the blocks up to the end of the file.

        `line` is the number of the next line.
        """
        pieces, size = [], 0  # of the line in which the last read ended
        while True:
            data = self.stream.read(self.block_bytes)
            cut = data.rfind(b"\n") + 1
            if data and not cut:
                pieces.append(data)
                size += len(data)
                if size <= self.longest_line:
                    continue
                reason = RowError(f"a line longer than {self.longest_line >> 20} MiB")
                yield Block(self.path, line, elements=[(line, reason)])
                while data and b"\n" not in data:
                    data = self.stream.read(self.block_bytes)
                self.stream.unread(data[data.find(b"\n") + 1 :])
                pieces, size, line = [], 0, line + 1
                continue
            lines = b"".join([*pieces, data[:cut]])
            if lines:
                yield Block(self.path, line, lines, self.encoding)
                line += lines.count(b"\n")
            if not data:
                return
            pieces, size = [data[cut:]], len(data) - cut
