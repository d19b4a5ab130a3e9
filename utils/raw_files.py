"""Raw files -> blocks of rows, in constant memory: globs, gzip, encodings, JSON Lines and JSON arrays."""

import codecs
import functools
import glob
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import RowError, UsageError
from utils.jsonl import BLANKS, NEVER_ENDS, scan_value, values_of
from utils.terminal_text import one_line

BLOCK_BYTES = 1 << 20
LONGEST_LINE = 64 << 20  # bytes; what has no newline for longer is no row
LONGEST_ELEMENT = 16 << 20  # characters of a row in an array
LEAST_EVIDENCE = 8  # bytes that are not ASCII, below which nothing is taken for GB18030
_ASCII = bytes(range(128))
# A Chinese character or mark in UTF-8, the quotes and dashes of U+2000 to U+203F among them.
_CHINESE = rb"(?:[\xe3-\xe9\xef][\x80-\xbf]|\xe2\x80)[\x80-\xbf]"
_CHINESE_UTF8 = re.compile(_CHINESE)
# Once in 2,000,000 random characters of GB2312, as measured.
_UTF8_RUN = re.compile(rb"(?:" + _CHINESE + rb"){3}")
_TWO_BYTES = re.compile("[\x80-\u07ff]")


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a raw file: whole lines as bytes, or the values of an array's elements."""

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
        return [_decode_line(line, self.encoding, self.path) for line in self.lines.split(b"\n")]


def input_paths(patterns: Sequence[str]) -> list[str]:
    """
    Files named one by one, or by patterns such as "data/*.json", each pattern's in the order of their names.

    Raises:
        UsageError: a name is not a file, or a pattern fits none.
    """
    paths = []
    for pattern in patterns:
        found = [pattern] if Path(pattern).is_file() else sorted(p for p in _fitting(pattern) if Path(p).is_file())
        if not found:
            raise UsageError(f"{pattern} is not a file" + (", and no file fits it" if "*" in pattern else ""))
        paths += found
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
    (line number from 1, value) of each row of a file of JSON Lines, of a JSON array, or of either with Python dicts
    for JSON objects; gzip or not; UTF-8 with or without a BOM, or GB18030, which is said on stderr.

    A thing that cannot be read is a RowError in place of its value.

    Raises:
        UsageError: `path` is not a file.
    """
    for block in read_blocks(str(path)):
        yield from block.values()


def read_blocks(path: str) -> Iterator[Block]:
    """
    The blocks of a file, the same at each reading; `read_json_rows` says which files.

    Raises:
        UsageError: `path` is not a file.
    """
    if not Path(path).is_file():
        raise UsageError(f"{path} is not a file")
    with open(path, "rb") as file:
        stream = _Stream(gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file)
        sample = stream.read(BLOCK_BYTES)
        if sample[:2] in (b"\xff\xfe", b"\xfe\xff"):
            yield Block(path, 1, elements=[(1, RowError("UTF-16, of which nothing was read: convert it to UTF-8"))])
            return
        stream.unread(sample)
        encoding = "gb18030" if _is_gb18030(sample) else "utf-8"
        if encoding != "utf-8":
            _say(f"{path}: GB18030, read as such; what is written is UTF-8")
        line = 1
        while True:
            head = stream.read(BLOCK_BYTES)
            text = head.removeprefix(b"\xef\xbb\xbf")
            start = text.lstrip()
            if start.startswith(b"[") and start[1:].lstrip()[:1] in (b"{", b"]"):
                line += text[: len(text) - len(start)].count(b"\n")
                stream.unread(start[1:])
                array = _ArrayReader(path, stream, encoding, line)
                yield from array.blocks()
                line = array.line
                continue
            stream.unread(head)
            yield from _line_blocks(path, stream, encoding, line)
            break
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


class _ArrayReader:
    """
    Reads a JSON array behind its opening bracket, element by element. After an element that cannot be read it goes on
    at the next object whose first key is that of the array's first: `{"instruction":` cannot stand in a JSON string.
    """

    def __init__(self, path: str, stream: _Stream, encoding: str, line: int):
        self.path, self.stream, self.encoding, self.line = path, stream, encoding, line
        # Bytes that are not text become lone surrogates, which spoil the one element that they stand in.
        self.decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")
        self.text, self.position = "", 0
        self.counted = 0  # `line` is that of text[counted]
        self.opening: re.Pattern | None = None

    def blocks(self) -> Iterator[Block]:
        elements, size = [], 0
        for number, value, length in self._elements():
            elements.append((number, value))
            size += length
            if size >= BLOCK_BYTES:
                yield Block(self.path, elements[0][0], elements=elements)
                elements, size = [], 0
        if elements:
            yield Block(self.path, elements[0][0], elements=elements)

    def _fill(self) -> bool:
        """Drops what was read, and reads at least as much as is left; False at the end of the file."""
        self._count()
        data = self.stream.read(max(BLOCK_BYTES, len(self.text) - self.position))
        self.text = self.text[self.position :] + self.decoder.decode(data, final=not data)
        self.position = self.counted = 0
        return bool(data)

    def _count(self) -> int:
        self.line += self.text.count("\n", self.counted, self.position)
        self.counted = self.position
        return self.line

    def _next_character(self) -> str:
        while True:
            while self.position < len(self.text) and (c := self.text[self.position]) in BLANKS:
                self.position += 1
            if self.position < len(self.text):
                return c
            if not self._fill():
                return ""

    def _elements(self) -> Iterator[tuple[int, Any | RowError, int]]:
        while character := self._next_character():
            if character == "]":
                self.position += 1
                self._count()
                rest = self.text[self.position :].encode(self.encoding, "surrogateescape")
                self.stream.unread(rest + self.decoder.getstate()[0])
                return
            if character == ",":
                self.position += 1
                continue
            value, length = self._scan()
            yield self._count(), value, length
            self.position += length or 1
            if not length and not self._resume():
                return
        yield self._count(), RowError("the array has no end: the file is cut"), 0

    def _scan(self) -> tuple[Any | RowError, int]:
        """The element at the position and how long it is, 0 if that cannot be said; text is read until it is whole."""
        while True:
            try:
                value, end = scan_value(self.text, self.position)
                break
            except (RowError, json.JSONDecodeError) as error:
                # A value that breaks off at the end of the text may go on in the file.
                message, broken_at = getattr(error, "msg", str(error)), getattr(error, "pos", self.position)
                open_end = message.startswith(("Unterminated", NEVER_ENDS)) or broken_at >= len(self.text) - 16
                if open_end and len(self.text) - self.position < LONGEST_ELEMENT and self._fill():
                    continue
                return RowError(f"not JSON: {message}" if hasattr(error, "msg") else message), 0
        if self.opening is None and isinstance(value, dict) and value:
            key = json.dumps(next(iter(value)), ensure_ascii=False)
            self.opening = re.compile(r"\{\s*" + re.escape(key))
        length = end - self.position
        if self._is_text(self.text[self.position : end]):
            return value, length
        return RowError(f"bytes that are not {self.encoding.upper()}"), length

    def _is_text(self, element: str) -> bool:
        """Whether no lone surrogate stands for a byte, and no GB18030 for UTF-8."""
        if element.isascii():
            return True
        try:
            data = element.encode(self.encoding)
        except UnicodeEncodeError:
            return False
        return self.encoding == "utf-8" or not _UTF8_RUN.search(data)

    def _resume(self) -> bool:
        """Goes to the next object like the first; False where none follows."""
        while self.opening:
            if found := self.opening.search(self.text, self.position):
                self.position = found.start()
                return True
            self.position = max(self.position, len(self.text) - 1000)
            if not self._fill():
                break
        while self.stream.read(BLOCK_BYTES):
            pass
        return False


def _decode_line(line: bytes, encoding: str, path: str) -> str | RowError:
    """
    A line in its file's encoding, or in the other where all of it speaks for that: `cat` joins files of both. A UTF-8
    line of which bytes are lost would often pass for GB18030 in other characters; most of it is UTF-8 still.
    """
    if encoding == "utf-8":
        if (text := _strict(line, encoding)) is not None:
            return text
        if _is_gb18030(line) and (text := _strict(line, "gb18030")) is not None:
            _say(f"{path}: some lines are GB18030, read as such; what is written is UTF-8")
            return text
    else:
        if len(_CHINESE_UTF8.findall(line)) >= 2 and (text := _strict(line, "utf-8")) is not None:
            return text
        if (text := _strict(line, encoding)) is not None:
            return text
    return RowError(f"bytes that are not {encoding.upper()}")


def decode_text(data: bytes, path: str) -> str:
    """
    A whole file's text: UTF-8 with or without a BOM, UTF-16 with one, or GB18030, which is said on stderr.

    Raises:
        UsageError: none of these.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    text = _decode_line(data.removeprefix(b"\xef\xbb\xbf"), "utf-8", path)
    if isinstance(text, RowError):
        raise UsageError(f"{path}: {text}: convert it to UTF-8")
    return text


@functools.cache
def _say(message: str) -> None:
    print(one_line(message), file=sys.stderr)


def _strict(data: bytes, encoding: str) -> str | None:
    """The text, or None where it is not in that encoding."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return None
    return None if encoding == "gb18030" and _UTF8_RUN.search(data) else text


def _is_gb18030(data: bytes) -> bool:
    """
    Whether bytes are GB18030 rather than UTF-8 with bytes lost: nearly all of those that are not ASCII form GB18030
    characters. Few of them then form UTF-8 characters of three bytes; of two bytes they form many by chance, but a
    text in such letters that lost a byte consists of little else.
    """
    foreign = len(data.translate(None, _ASCII))
    if foreign < LEAST_EVIDENCE:
        return False
    text = data.decode("utf-8", "ignore")
    two_bytes = 2 * len(_TWO_BYTES.findall(text))
    more_bytes = len(text.encode()) - (len(data) - foreign) - two_bytes
    lost = data.decode("gb18030", "replace").count("\ufffd")
    return more_bytes < 0.4 * foreign and two_bytes + more_bytes < 0.8 * foreign and lost <= foreign / 20 + 1
