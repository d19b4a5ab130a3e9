"""
Parses one line of JSON Lines or Python dicts into values, and writes rows as lines.

utils/data/raw_reader.py parses with it; every script writes its JSON Lines with `dump_row`.
"""

import ast
import json
import re
import warnings
from json.encoder import encode_basestring
from typing import Any

from utils.common.errors import RowError

NEVER_ENDS = "a Python dict that never ends"
BLANKS = " \t\r\n\ufeff"  # a BOM too: in a file that `cat` made it may be in the middle
_scan = json.JSONDecoder().scan_once  # (text, position) -> (value, end); what json.loads calls
_PYTHON_TOKENS = re.compile(r"""'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+"|[{}\[\]]""", re.DOTALL)


def scan_value(text: str, position: int) -> tuple[Any, int]:
    """
    Parse the JSON value, or the Python dict, that begins at `position`.

    A Python dict has single quotes, as `str(dict)` prints it: the first BELLE processing script wrote such lines. Only
    literals are evaluated.

    Returns:
        The value and the position after it.

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


def parse_line(line: str) -> list[Any | RowError]:
    """
    Parse the values of one line.

    A blank line has none; a line has several if it is a JSON array, or if `cat` joined files without a last newline.
    Everything from the first text that cannot be read is one RowError.
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


def dump_row(row: dict[str, Any]) -> str:
    """One line of JSON Lines, newline included; Chinese stays readable."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def dump_pair(prompt: str, target: str) -> str:
    """Same as `dump_row({"input": prompt, "target": target})`, four times as fast."""
    return f'{{"input": {encode_basestring(prompt)}, "target": {encode_basestring(target)}}}\n'
