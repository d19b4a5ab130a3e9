"""One line of JSON Lines -> values, and files that appear whole or not at all, in the place of no input."""

import ast
import json
import re
import warnings
from json.encoder import encode_basestring
from typing import Any

from utils.common.errors import RowError

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


def dump_row(row: dict[str, Any]) -> str:
    """One line of JSON Lines, Chinese left readable."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def dump_pair(prompt: str, target: str) -> str:
    """`dump_row({"input": prompt, "target": target})`, four times as fast."""
    return f'{{"input": {encode_basestring(prompt)}, "target": {encode_basestring(target)}}}\n'
