"""
The pieces that a rendered conversation consists of, and how its values read where the official templates print them.

The modules `chat_renderers*.py` build their texts of these. The official templates are jinja, so the helpers follow
jinja's rules for what a value lacks: a missing key prints as nothing, and asking more of it is an error.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """A part of a rendered conversation: one special token, or plain text."""

    text: str
    is_token: bool = False  # one special token of the template; a token that a message spells out is plain text
    message: int | None = None  # number of the assistant message that the model writes here; None: not the model's


class Missing:
    """The value of a key that is not there: false, empty, and printed as nothing."""

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return ""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


MISSING = Missing()


def value_of(holder: Any, key: str) -> Any:
    """Return a mapping's value for a key; MISSING where there is none."""
    return holder.get(key, MISSING) if isinstance(holder, Mapping) else MISSING


def items_of(value: Any, name: str) -> Iterable[Any]:
    """Return what a loop over a value yields; raises ValueError for a number, true, false or null."""
    if isinstance(value, (str, Mapping, Sequence, Missing)):
        return value
    raise ValueError(f"{name} is {value!r}, not a list")


def json_text(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON with characters as they are; raises ValueError for what JSON cannot say."""
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent)
    except TypeError as error:
        raise ValueError(f"JSON cannot say {value!r}") from error


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Return the pieces without empty ones, and with neighbouring plain texts of one writer as one."""
    result: list[Piece] = []
    for piece in pieces:
        if not piece.text:
            continue
        last = result[-1] if result else None
        if last is not None and not last.is_token and not piece.is_token and last.message == piece.message:
            result[-1] = last._replace(text=last.text + piece.text)
        else:
            result.append(piece)
    return result
