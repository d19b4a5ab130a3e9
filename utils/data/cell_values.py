"""
Parses values that a table's cell, or a field of a message, may hold as text: lists, objects and JSON.

utils/data/conversations.py, messages.py, tool_forms.py and row_options.py call it. `place` says where the value is,
for the message of a `RowError`.
"""

import ast
import json
import warnings
from typing import Any

from utils.common.errors import RowError
from utils.data.row_schema import is_empty


def parse_list(value: Any, place: str) -> list[Any]:
    """
    The list that a value is, or that its text holds.

    A table's cell holds one in JSON, or as Python prints it.

    Raises:
        RowError: there is no list.
    """
    value = parse_cell(value, place)
    if is_empty(value):
        return []
    if not isinstance(value, list):
        raise RowError(f"{place} must be a list, not {type(value).__name__}")
    return value


def parse_cell(value: Any, place: str) -> Any:
    """
    The value that a text holds in JSON or as Python prints it; any other value as it is, and None for an empty text.

    Raises:
        RowError: the text holds neither.
    """
    if not isinstance(value, str):
        return value
    if is_empty(value):
        return None
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # of odd escapes
                parsed = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise RowError(f"{place} is text, but neither a JSON list nor a Python list") from None
    to_json(parsed, place)
    return parsed


def to_json(value: Any, place: str) -> str:
    """
    The JSON text of a value; Chinese stays readable.

    Raises:
        RowError: JSON has no such value, or its text holds half a surrogate pair, which no encoding can write.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"{place} holds what cannot be written as JSON: {error}") from None
    return text


def parse_json(text: str) -> Any:
    """
    The value of a JSON text.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or holds NaN or half a surrogate pair.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    try:
        to_json(value, "it")
    except RowError as error:
        raise ValueError(str(error)) from None
    return value
