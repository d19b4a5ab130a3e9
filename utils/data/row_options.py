"""
Parses the options of a chat template that a row has of its own: thinking on or off, and the like.

utils/data/row_parser.py calls it. They are columns of the row, or stand in its `chat_template_kwargs`.
"""

from collections.abc import Iterable
from typing import Any

from utils.common.errors import RowError
from utils.data.cell_values import parse_cell
from utils.data.row_schema import KWARGS_COLUMN, is_empty

_ON = (True, "true", "True", "1", "on", "enabled")  # 1 equals True
_OFF = (False, "false", "False", "0", "off", "disabled")


def parse_options(raw: dict[str, Any], names: Iterable[str]) -> tuple[tuple[str, Any], ...]:
    """
    The row's options as (name, value) pairs in the order of their names, which are those of the released templates.

    Args:
        raw: the row.
        names: its columns that hold options.

    Raises:
        RowError: an option is unknown, given twice, or has no value that it may have.
    """
    options: dict[str, Any] = {}
    for name in names:
        if name == KWARGS_COLUMN:
            values = parse_cell(raw[name], f'"{name}"') or {}
            if not isinstance(values, dict):
                raise RowError(f'"{name}" must be an object, not {type(values).__name__}')
            for inner, value in values.items():
                _add(options, inner, value, f'{inner!r:.60} in "{name}"')
        else:
            _add(options, name, raw[name], f'"{name}"')
    return tuple(sorted(options.items()))


def _add(options: dict[str, Any], name: str, value: Any, place: str) -> None:
    if value is None or (isinstance(value, str) and is_empty(value)):
        return
    if name == "thinking" and isinstance(value, dict):  # of the public API: {"type": "enabled", "clear_thinking": ...}
        for inner, setting in value.items():
            _add(options, "thinking" if inner == "type" else inner, setting, f"{inner!r:.60} in {place}")
        return
    if name in ("thinking", "enable_thinking", "clear_thinking"):
        parsed, official = _switch(value, place), "clear_thinking" if name == "clear_thinking" else "enable_thinking"
    elif name == "reasoning_effort":
        if not isinstance(value, str):
            raise RowError(f"{place} is {value!r}: it must be text, such as high")
        parsed, official = value, name
    else:
        raise RowError(
            f"{place} cannot be used: the options of a row are enable_thinking, clear_thinking and reasoning_effort"
        )
    if options.setdefault(official, parsed) != parsed:
        raise RowError(f'{place} gives "{official}" a second value: keep one of them')


def _switch(value: Any, place: str) -> bool:
    if isinstance(value, bool | int | str):
        if value in _ON:
            return True
        if value in _OFF:
            return False
    raise RowError(f"{place} is {value!r:.60}: it must be true or false")
