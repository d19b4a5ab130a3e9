"""`Piece`: what the chat renderers make a chat of, and how their fixed texts become pieces."""

import re
from typing import Any, NamedTuple

OPENING = "[gMASK]<sop>"
THINK, THINK_END = "<think>", "</think>"
ASSISTANT, OBSERVATION = "<|assistant|>", "<|observation|>"
# From GLM-4.5 on these are tokens too, though the tokenizer does not call them special.
TAGS = tuple(
    f"<{slash}{name}>"
    for name in ("think", "tool_call", "tool_response", "arg_key", "arg_value")
    for slash in ("", "/")
)
NOTHINK = "/nothink"
_TOKENS = re.compile(r"(\[gMASK\]|<sop>|<\|\w+\|>|" + "|".join(map(re.escape, (*TAGS, NOTHINK))) + ")")


class Piece(NamedTuple):
    """A text or token of a rendered chat."""

    text: str
    is_token: bool = False  # one token that the template writes; else plain text, whatever it spells
    message: int | None = None  # number, from 0, of the assistant's message that the model writes here


def literal(text: str, message: int | None = None) -> list[Piece]:
    """A template's own text, split into its tokens and the text between them."""
    return [
        Piece(part, is_token=bool(index % 2), message=message)
        for index, part in enumerate(_TOKENS.split(text))
        if part
    ]


def role_token(role: str) -> list[Piece]:
    """The token that opens a message."""
    return [Piece(f"<|{role}|>", is_token=True)]


def printed(value: Any) -> str:
    """A value as Jinja prints it; None stands for a missing key."""
    return "" if value is None else str(value)
