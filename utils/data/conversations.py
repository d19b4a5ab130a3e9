"""
Parses the chats and histories of raw rows, and joins their turns to a `Conversation`.

utils/data/row_parser.py calls it. A turn that cannot be used is a `RowError` that names it: nothing is dropped.
"""

import ast
import json
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from utils.common.errors import RowError
from utils.data.row_schema import MEDIA_COLUMNS, TOOL_COLUMNS, check_refused, is_empty
from utils.models.conversation import Conversation, Message

ROLE_ALIASES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "chatglm", "bot", "ai", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TOOL_ROLES = (
    *("function_call", "function", "function_response", "observation", "ipython"),
    *("tool", "tools", "tool_call", "tool_calls", "tool_response", "tool_responses", "tool_result"),
)
# Fields of a message that say whether it is trained on: true, false, 1 or 0.
LOSS_FIELDS = ("loss", "weight", "train", "training", "trainable", "loss_weight", "loss_scale", "output_with_loss")
_TRAINED = (True, "true", "True", "1", "1.0")  # 1 and 1.0 equal True
_NOT_TRAINED = (False, "false", "False", "0", "0.0")
_REFUSED_FIELDS = (*TOOL_COLUMNS, *MEDIA_COLUMNS)
_UNUSED_FIELDS = (
    *("mask", "masked", "train_detail", "train_details", "prefix"),
    *("reasoning_content", "reasoning", "thinking", "refusal"),
    "metadata",  # in ChatGLM3 and GLM-4 the name of a tool
)


class Turn(NamedTuple):
    """A message of a raw row, and whether it is trained on."""

    role: str
    content: str
    trained: bool = True


def parse_chat(raw: Any, column: str) -> list[Turn]:
    """
    Parse a list of {"role", "content"} or {"from", "value"}.

    The list may also be the text of a table's cell.

    Raises:
        RowError: a message cannot be used.
    """
    items = parse_list(raw, column)
    if not items:
        raise RowError(f'"{column}" must be a list with at least one message')
    return [_parse_message(item, column) for item in items]


def parse_history(raw: Any, column: str) -> list[Turn]:
    """
    Parse a list of [question, answer] pairs or of messages.

    The list may also be the text of a table's cell.

    Raises:
        RowError: a pair or a message cannot be used.
    """
    turns = []
    for item in parse_list(raw, column):
        if isinstance(item, dict):
            turns.append(_parse_message(item, column))
        elif isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(text, str) for text in item):
            if not all(text.strip() for text in item):
                raise RowError(f'a question or an answer in "{column}" is blank')
            turns += (Turn("user", item[0]), Turn("assistant", item[1]))
        else:
            raise RowError(f'"{column}" must be a list of [question, answer] pairs or of messages')
    return turns


def join_turns(system: str, columns: Sequence[tuple[str, list[Turn]]]) -> Conversation:
    """
    Join turns to one conversation.

    Args:
        system: the system text, "" for none.
        columns: the row's columns and their turns, in order.

    Raises:
        RowError: turns do not alternate, or there is a system message other than one at the start.
    """
    turns = [turn for _, column_turns in columns for turn in column_turns if turn != Turn("system", "")]
    names = " and ".join(f'"{column}"' for column, column_turns in columns if column_turns)
    if turns and turns[0].role == "system":
        if system and system != turns[0].content:
            raise RowError(f'a system message in {names} and another in "system"')
        system = turns.pop(0).content
    if any(turn.role == "system" for turn in turns):
        raise RowError("there may be one system message, at the start")
    if not turns:
        raise RowError(f"{names} holds only a system message")
    for number, turn in enumerate(turns):
        if turn.role != ("user", "assistant")[number % 2]:
            raise RowError(f"messages of {names} must alternate between user and assistant, the user first")
    if system:
        turns.insert(0, Turn("system", system))
    return Conversation(
        tuple(
            Message(turn.role, turn.content, trained=False if turn.role == "assistant" and not turn.trained else None)
            for turn in turns
        )
    )


def _parse_message(item: Any, column: str) -> Turn:
    role = _either(item, "role", "from") if isinstance(item, dict) else None
    name = (role or "").strip().removeprefix("<|").removesuffix("|>").lower()
    if name.replace("-", "_") in TOOL_ROLES:
        raise RowError(f'a turn of the role "{role}" in "{column}": tools cannot be used yet')
    if name not in ROLE_ALIASES:
        raise RowError(f'each message needs a "role" (or "from") of "user" or "assistant", not {role!r}')
    _check_fields(item, column)
    content = _either(item, "content", "value")
    if ROLE_ALIASES[name] == "system" and is_empty(content):
        return Turn("system", "")
    if not isinstance(content, str) or not content.strip():
        raise RowError('each message needs a "content" (or "value") that holds text')
    return Turn(ROLE_ALIASES[name], content, _is_trained(item, column))


def _check_fields(item: dict[str, Any], column: str) -> None:
    if len(item) == 2:  # nearly every message
        return
    place = f' in a message of "{column}"'
    check_refused(item, [name for name in _REFUSED_FIELDS if name in item], place)
    for name in _UNUSED_FIELDS:
        value = item.get(name)
        if not is_empty(value) and (name != "metadata" or isinstance(value, str)):
            raise RowError(f'"{name}"{place} is not empty: it cannot be used')


def _is_trained(item: dict[str, Any], column: str) -> bool:
    trained = True
    if len(item) == 2:  # nearly every message
        return trained
    for name in LOSS_FIELDS:
        value = item.get(name)
        if value in (None, "", []) or value in _TRAINED:
            continue
        if value not in _NOT_TRAINED:
            raise RowError(f'"{name}" in a message of "{column}" is {value!r}: a turn is trained on (1) or not (0)')
        trained = False
    return trained


def _either(item: dict[str, Any], *keys: str) -> str | None:
    value = next((item[key] for key in keys if key in item), None)
    return value if isinstance(value, str) else None


def parse_list(value: Any, column: str) -> list[Any]:
    """
    The list that a value is, or that its text holds.

    A table's cell holds one in JSON, or as Python prints it.

    Raises:
        RowError: there is no list.
    """
    if isinstance(value, str):
        value = _literal(value, column)
    if is_empty(value):
        return []
    if not isinstance(value, list):
        raise RowError(f'"{column}" must be a list, not {type(value).__name__}')
    return value


def _literal(text: str, column: str) -> Any:
    if is_empty(text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # of odd escapes
                value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise RowError(f'"{column}" is text, but neither a JSON list nor a Python list') from None
    try:
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair, which no encoding can write
    except (UnicodeEncodeError, TypeError, ValueError, RecursionError) as error:
        raise RowError(f'"{column}" holds text that cannot be written: {error}') from None
    return value
