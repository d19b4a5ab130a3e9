"""
Reads JSON values that are not one a line, in constant memory.

These are the elements of an array, of an array in an object such as {"data": [...]}, or objects that spread over lines
and follow one another. utils/data/raw_reader.py reads JSON Lines and calls this for the rest. A value that cannot be
read becomes a RowError in its place; ijson and the like would end at the first.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from utils.common.errors import RowError
from utils.data.encodings import UTF8_RUN
from utils.data.json_lines import BLANKS, NEVER_ENDS, scan_value
from utils.data.row_schema import CHAT_COLUMNS, PROMPT_COLUMNS

HEAD_BYTES = 1 << 16  # from which the layout is detected
LONGEST_ELEMENT = 16 << 20  # characters; a row that has no end within them is rejected
# Keys under which an object holds a list of rows; no row has a column of these names that holds objects.
WRAPPERS = ("data", "rows", "train", "training", "examples", "items", "records", "samples", "dataset", "test", "valid")
LINES, ARRAY, WRAPPED, VALUES = "lines", "array", "wrapped", "values"
_BLANK = re.compile(f"[{BLANKS}]*")


class Layout(NamedTuple):
    """How the values of a file are arranged."""

    name: str  # LINES, ARRAY, WRAPPED or VALUES
    start: int  # bytes before the first element of an array, or before the first value


def detect_layout(head: bytes, encoding: str, more: bool) -> Layout:
    """
    Layout of the values with which `head` begins.

    Args:
        more: whether the file continues after `head`.
    """
    text = codecs.getincrementaldecoder(encoding)("surrogateescape").decode(head[:HEAD_BYTES])
    more = more or len(head) > HEAD_BYTES
    start = _BLANK.match(text).end()
    name, position = LINES, 0
    if text.startswith("[", start) and text[start + 1 :].lstrip()[:1] in ("{", "]"):
        name, position = ARRAY, start + 1
    elif text.startswith("{", start):
        if position := _wrapped_start(text, start):
            name = WRAPPED
        elif _is_spread(text, start, more):
            name, position = VALUES, start
    return Layout(name, len(text[:position].encode(encoding, "surrogateescape")))


def _wrapped_start(text: str, start: int) -> int:
    """
    Position of the first element in an object's array of rows.

    `start` is that of the object, `{..., "data": [...]}`; 0 if it has no array of rows.
    """
    position = start + 1
    try:
        while True:
            position = _BLANK.match(text, position).end()
            key, position = scan_value(text, position)
            position = _BLANK.match(text, position).end()
            if not isinstance(key, str) or key in (*PROMPT_COLUMNS, *CHAT_COLUMNS) or text[position] != ":":
                return 0
            position = _BLANK.match(text, position + 1).end()
            opening = _BLANK.match(text, position + 1).end()
            if key in WRAPPERS and text[position] == "[" and text[opening] in "{]":
                return position + 1
            _, position = scan_value(text, position)
            position = _BLANK.match(text, position).end()
            if text[position] != ",":
                return 0
            position += 1
    except (RowError, json.JSONDecodeError, IndexError):
        return 0


def _is_spread(text: str, start: int, more: bool) -> bool:
    """
    Whether the object at `start` continues in the next line.

    Otherwise it is a line that breaks off.
    """
    newline = text.find("\n", start)
    if newline < 0:
        return False
    try:
        return scan_value(text, start)[1] > newline
    except RowError as error:
        return str(error) == NEVER_ENDS and more
    except json.JSONDecodeError as error:
        return more and error.pos > newline and (error.msg.startswith("Unterminated") or error.pos >= len(text) - 16)


class Stream(Protocol):
    """A file that takes back bytes that were read too far."""

    def read(self, size: int) -> bytes: ...

    def unread(self, data: bytes) -> None: ...


class ValueReader:
    """
    Reads the elements of a JSON array, or consecutive values.

    After a value that cannot be read it resumes at the next object whose first key is that of the first object:
    `{"instruction":` cannot occur in a JSON string.

    Args:
        line: number of the stream's next line; afterwards that of the line after the values.
        layout: ARRAY, WRAPPED or VALUES.
        block_bytes: bytes read at a time.
    """

    def __init__(self, stream: Stream, encoding: str, line: int, layout: str, block_bytes: int):
        self.stream, self.encoding, self.line, self.layout = stream, encoding, line, layout
        self.block_bytes = block_bytes
        # Bytes that are not text become lone surrogates, which spoil the one element that they stand in.
        self.decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")
        self.text, self.position = "", 0
        self.counted = 0  # `line` is that of text[counted]
        self.opening: re.Pattern | None = None

    def batches(self) -> Iterator[list[tuple[int, Any | RowError]]]:
        """Yield lists of (line number, value), of about `block_bytes` each."""
        elements, size = [], 0
        for number, value, length in self._elements():
            elements.append((number, value))
            size += length
            if size >= self.block_bytes:
                yield elements
                elements, size = [], 0
        if elements:
            yield elements

    def _fill(self) -> bool:
        """
        Drop the text before the position and read more.

        It reads at least as much as remains; False at the end of the file.
        """
        self._count()
        data = self.stream.read(max(self.block_bytes, len(self.text) - self.position))
        self.text = self.text[self.position :] + self.decoder.decode(data, final=not data)
        self.position = self.counted = 0
        return bool(data)

    def _count(self) -> int:
        """Number of the line of the position."""
        self.line += self.text.count("\n", self.counted, self.position)
        self.counted = self.position
        return self.line

    def _next_character(self) -> str:
        """
        Move to the next nonblank character and return it.

        "" at the end of the file.
        """
        while True:
            while self.position < len(self.text) and (c := self.text[self.position]) in BLANKS:
                self.position += 1
            if self.position < len(self.text):
                return c
            if not self._fill():
                return ""

    def _elements(self) -> Iterator[tuple[int, Any | RowError, int]]:
        """
        Yield (line number, value, its length in characters).

        The text after the last one goes back to the stream.
        """
        while character := self._next_character():
            if self.layout == VALUES:
                if character == "[":  # an array follows them
                    self._give_back()
                    return
            elif character == "]":
                self.position += 1
                if self.layout == WRAPPED:
                    yield from self._rest_of_wrapper()
                self._give_back()
                return
            if character == ",":
                self.position += 1
                continue
            value, length = self._scan()
            yield self._count(), value, length
            self.position += length or 1
            if not length and not self._resume():
                return
        if self.layout != VALUES:
            yield self._count(), RowError("the array has no end: the file is cut"), 0

    def _give_back(self) -> None:
        self._count()
        rest = self.text[self.position :].encode(self.encoding, "surrogateescape")
        self.stream.unread(rest + self.decoder.getstate()[0])

    def _rest_of_wrapper(self) -> Iterator[tuple[int, RowError, int]]:
        """
        Read to the end of the object round the array.

        A second list of objects in it is skipped with an error.
        """
        while (character := self._next_character()) and character != "}":
            key, length = self._scan()
            self.position += length or 1
            if character != '"' or isinstance(key, RowError) or self._next_character() != ":":
                continue  # a comma, or what cannot be read
            self.position += 1
            opening = self._next_character()
            line = self._count()
            value, length = self._scan()
            self.position += length or 1
            holds_rows = isinstance(value, list) and any(isinstance(item, dict) for item in value)
            if holds_rows or (opening == "[" and isinstance(value, RowError)):
                reason = f'"{key}" is a second list of the file, which is not read: save it as a separate file'
                yield line, RowError(reason), 0
        self.position += 1

    def _scan(self) -> tuple[Any | RowError, int]:
        """
        The element at the position and its length, 0 if unknown.

        Reads text until the element is whole.
        """
        while True:
            try:
                value, end = scan_value(self.text, self.position)
                break
            except (RowError, json.JSONDecodeError) as error:
                # A value that breaks off at the end of the text may continue in the file.
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
        """Whether no byte became a lone surrogate, and no UTF-8 was decoded as GB18030."""
        if element.isascii():
            return True
        try:
            data = element.encode(self.encoding)
        except UnicodeEncodeError:
            return False
        return self.encoding == "utf-8" or not UTF8_RUN.search(data)

    def _resume(self) -> bool:
        """Move to the next object like the first; False if none follows."""
        while self.opening:
            if match := self.opening.search(self.text, self.position):
                self.position = match.start()
                return True
            self.position = max(self.position, len(self.text) - 1000)
            if not self._fill():
                break
        while self.stream.read(self.block_bytes):
            pass
        return False
