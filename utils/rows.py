"""Raw rows of every supported schema -> `Row`; what is wrong with a row, in words."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from utils.jsonl import read_json_rows

# (columns joined to the prompt, column of the target), the first that fits a row is taken.
SCHEMAS = (
    (("instruction", "input"), "output"),  # BELLE today, Alpaca
    (("input",), "target"),  # BELLE's first files
    (("context",), "target"),  # the JSONL of ChatGLM-Tuning
    (("prompt",), "completion"),
)


class RowError(ValueError):
    """A row that cannot be used; the message says why."""


@dataclass(frozen=True)
class Message:
    role: str  # "user" or "assistant"
    content: str


@dataclass(frozen=True)
class Row:
    """A conversation. A training row ends with the assistant's message, a prompt with the user's."""

    messages: tuple[Message, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the answer."""
        return self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages

    @property
    def target(self) -> str | None:
        """The answer, or None where the row is a prompt."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else None


def _text(raw: dict[str, Any], column: str) -> str:
    value = raw.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f'"{column}" is {type(value).__name__}, not text')
    return value


def parse_prompt(raw: Any) -> Row:
    """
    Reads the prompt of a raw row; a target that stands beside it is left out.

    `instruction` and `input` are joined by a newline where both hold text. A chat is
    `{"messages": [{"role": "user", "content": ...}, ...]}` and ends with the user's turn.

    Raises:
        RowError: no schema fits, or the prompt is blank.
    """
    if not isinstance(raw, dict):
        raise RowError(f"a row must be a JSON object, not {type(raw).__name__}")
    if "messages" in raw:
        messages = _parse_messages(raw["messages"])
        return Row(messages[:-1] if messages[-1].role == "assistant" else messages)
    for columns, _ in SCHEMAS:
        if columns[0] in raw:
            prompt = "\n".join(part for part in (_text(raw, column) for column in columns) if part)
            if not prompt.strip():
                raise RowError(f"the prompt ({' + '.join(columns)}) is blank")
            return Row((Message("user", prompt),))
    raise RowError(f"no known columns among {sorted(map(str, raw))}; known are {describe_schemas()}")


def parse_row(raw: Any) -> Row:
    """
    Reads a training row: a prompt and its target.

    Raises:
        RowError: no schema fits, or the prompt or the target is blank.
    """
    if isinstance(raw, dict) and "messages" in raw:
        messages = _parse_messages(raw["messages"])
        if messages[-1].role != "assistant" or len(messages) < 2:
            raise RowError("a training conversation must end with the assistant's answer to a user's message")
        return Row(messages)
    prompt = parse_prompt(raw)
    for columns, target_column in SCHEMAS:
        if columns[0] in raw and target_column in raw:
            target = _text(raw, target_column)
            if not target.strip():
                raise RowError(f'the target ("{target_column}") is blank')
            return Row((*prompt.messages, Message("assistant", target)))
    raise RowError(f"no target among {sorted(map(str, raw))}; known are {describe_schemas()}")


def describe_schemas() -> str:
    return "; ".join("/".join((*columns, target)) for columns, target in SCHEMAS) + "; messages"


def _parse_messages(raw: Any) -> tuple[Message, ...]:
    if not isinstance(raw, list) or not raw:
        raise RowError('"messages" must be a list with at least one message')
    messages = []
    for item in raw:
        if not isinstance(item, dict) or item.get("role") not in ("user", "assistant"):
            raise RowError('each message needs a "role" of "user" or "assistant"')
        if not isinstance(item.get("content"), str) or not item["content"].strip():
            raise RowError('each message needs a "content" that holds text')
        messages.append(Message(item["role"], item["content"]))
    for turn, message in enumerate(messages):
        if message.role != ("user", "assistant")[turn % 2]:
            raise RowError("messages must alternate between user and assistant, the user first")
    return tuple(messages)


def read_rows(path: str, parse: Callable[[Any], Row]) -> Iterator[tuple[int, Row | RowError]]:
    """Yields (number from 1, row) for each row of a JSON or JSON Lines file; one that cannot be used, as its error."""
    for number, raw in read_json_rows(path):
        if isinstance(raw, json.JSONDecodeError):
            yield number, RowError(f"not JSON: {raw}")
            continue
        try:
            yield number, parse(raw)
        except RowError as error:
            yield number, error


@dataclass
class Rejections:
    """Counts the rows of a file that were not used, and keeps the first few to show."""

    path: str
    shown: int = 5
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, number: int, reason: str | RowError) -> None:
        self.count += 1
        if len(self.first) < self.shown:
            self.first.append(f"{self.path}:{number}: {reason}")

    def report(self) -> None:
        """Prints them to stderr."""
        for line in self.first:
            print(line, file=sys.stderr)
        if self.count > self.shown:
            print(f"... and {self.count - self.shown} more", file=sys.stderr)
