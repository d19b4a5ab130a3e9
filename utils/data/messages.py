"""
Parses one message of a raw row in the forms of OpenAI, ShareGPT, LLaMA-Factory, ms-swift, ChatGLM3 and GLM-4.

utils/data/conversations.py calls it for each message of a chat or a history, and joins the turns. A message that
cannot be used is a `RowError` that names it: nothing is dropped.
"""

from typing import Any, NamedTuple

from utils.common.errors import RowError
from utils.data.cell_values import parse_list, to_json
from utils.data.row_schema import MEDIA_COLUMNS, TOOL_COLUMNS, check_refused, is_empty
from utils.data.tool_forms import (
    parse_arguments,
    parse_call,
    parse_call_text,
    parse_metadata_call,
    parse_tools,
    same_tools,
)
from utils.models.conversation import ToolCall

ROLE_ALIASES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "chatglm", "bot", "ai", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_CALL = "call"  # a turn of its own for the assistant's calls
_TOOL_ROLES = {
    **dict.fromkeys(("function_call", "function_calls", "tool_call", "tool_calls"), _CALL),
    **dict.fromkeys(("tool", "tools", "tool_response", "tool_responses", "tool_result", "tool_results"), "tool"),
    **dict.fromkeys(("observation", "function", "function_response", "function_result", "ipython"), "tool"),
}
_ROLES = {**ROLE_ALIASES, **_TOOL_ROLES}
# Fields of a message that say whether it is trained on: true, false, 1 or 0.
LOSS_FIELDS = ("loss", "weight", "train", "training", "trainable", "loss_weight", "loss_scale", "output_with_loss")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_TRAINED = (True, "true", "True", "1", "1.0")  # 1 and 1.0 equal True
_NOT_TRAINED = (False, "false", "False", "0", "0.0")
_CALL_FIELDS = ("tool_calls", "function_call")
_UNUSED_FIELDS = (
    "mask",
    "masked",
    "train_detail",
    "train_details",
    "prefix",
    "refusal",
    "function_calls",
    "tool_responses",
)
# Of OpenAI's lists of parts as a text; another list is a tool's result as JSON.
_PART_TYPES = ("text", "image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file")
_FIELDS_OF_ASSISTANT = (*_CALL_FIELDS, *REASONING_FIELDS)


class Turn(NamedTuple):
    """A message of a raw row; the first five fields are those of a `Message`."""

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    trained: bool | None = None
    call_ids: tuple[str, ...] = ()  # of each call, or of the call whose result this is; "" where there is none
    tool_name: str = ""  # of the call whose result this is
    tools: str = ""  # of a system message


def parse_message(item: Any, column: str, number: int) -> tuple[Turn, ...]:
    """
    The turns of a message: one, or two if it holds a question and an answer, or a call and its result.

    Args:
        column: the row's column that has it.
        number: its number there, from 1.

    Raises:
        RowError: it cannot be used.
    """
    if isinstance(item, dict) and len(item) == 2:  # nearly every message
        role_key, content_key = ("role", "content") if "role" in item else ("from", "value")
        role, content = item.get(role_key), item.get(content_key)
        if isinstance(role, str) and role in ROLE_ALIASES and isinstance(content, str) and content.strip():
            return (Turn(ROLE_ALIASES[role], content),)
    return _parse_any(item, f'message {number} of "{column}"')


def _parse_any(item: Any, place: str) -> tuple[Turn, ...]:
    if isinstance(item, dict) and isinstance(item.get("human"), str) and isinstance(item.get("assistant"), str):
        question, answer = item["human"], item["assistant"]  # ms-swift's form of a ShareGPT conversation
        if not question.strip() or not answer.strip():
            raise RowError(f"a question or an answer in {place} is blank")
        return Turn("user", question), Turn("assistant", answer)
    role = _first(item, "role", "from") if isinstance(item, dict) else None
    name = (
        role.strip().removeprefix("<|").removesuffix("|>").lower().replace("-", "_") if isinstance(role, str) else ""
    )
    kind = _ROLES.get(name)
    if kind is None:
        raise RowError(f'{place} needs a "role" (or "from") of system, user, assistant or tool, not {role!r:.60}')
    _check_fields(item, kind, place)
    if kind == _CALL:
        return (_call_turn(item, place),)
    if kind == "tool":
        return _result_turns(item, place)
    if kind == "assistant":
        return (_assistant_turn(item, place),)
    text = _text(_first(item, "content", "value"), place)
    if kind == "user":
        return (Turn("user", _not_blank(text, place)),)
    tools = same_tools(
        {f'"{key}" of {place}': parse_tools(item.get(key), f'"{key}" of {place}') for key in TOOL_COLUMNS}
    )
    return (Turn("system", "" if is_empty(text) else text, tools=tools),)


def _check_fields(item: dict[str, Any], kind: str, place: str) -> None:
    """
    Raises:
        RowError: a field holds something that would be lost.
    """
    check_refused(item, [name for name in MEDIA_COLUMNS if name in item], f" in {place}")
    unused = [*_UNUSED_FIELDS, *(() if kind == "system" else TOOL_COLUMNS)]
    for name in unused:
        if not is_empty(item.get(name)):
            raise RowError(f'"{name}" in {place} is not empty: it cannot be used')
    if kind == _CALL or kind == "assistant":
        return
    for name in _FIELDS_OF_ASSISTANT:
        if not is_empty(item.get(name)):
            raise RowError(f'"{name}" in {place} is not empty, but only a message of the assistant has it')
    if kind != "tool" and isinstance(item.get("metadata"), str) and item["metadata"].strip():
        raise RowError(f'"metadata" in {place} is not empty: only a message of the assistant names a tool there')


def _assistant_turn(item: dict[str, Any], place: str) -> Turn:
    text, reasoning = _text(_first(item, "content", "value"), place), _reasoning(item, place)
    calls = _calls(item, place)
    name = item.get("metadata")  # of the tool in ChatGLM3 and GLM-4
    if isinstance(name, str) and name.strip():
        if calls:
            raise RowError(f'{place} has "metadata" and other calls: keep one of them')
        calls, text = [(parse_metadata_call(name.strip(), text, place), "")], ""
    if not calls and reasoning and not text.strip():
        raise RowError(f"{place} has reasoning, but neither an answer nor a call after it")
    if not calls:
        _not_blank(text, place)
    return Turn(
        "assistant",
        text,
        reasoning,
        tuple(call for call, _ in calls),
        _is_trained(item, place),
        tuple(call_id for _, call_id in calls),
    )


def _calls(item: dict[str, Any], place: str) -> list[tuple[ToolCall, str]]:
    """The calls in the fields of a message of the assistant, with their ids."""
    filled = [name for name in _CALL_FIELDS if not is_empty(item.get(name))]
    if not filled:
        return []
    if len(filled) > 1:
        raise RowError(f"{place} has both {' and '.join(filled)}: keep one of them")
    (name,) = filled
    values = parse_list(item[name], f'"{name}" of {place}') if name == "tool_calls" else [item[name]]
    return [parse_call(value, f"call {number} of {place}") for number, value in enumerate(values, start=1)]


def _call_turn(item: dict[str, Any], place: str) -> Turn:
    """The turn of a message whose text is a call or a list of calls."""
    calls, thought = _calls(item, place), ""
    text = _first(item, "content", "value")
    if not calls or not is_empty(text):
        thought, more = parse_call_text(text, place)
        calls += more
    return Turn(
        "assistant",
        thought,
        _reasoning(item, place),
        tuple(call for call, _ in calls),
        _is_trained(item, place),
        tuple(call_id for _, call_id in calls),
    )


def _result_turns(item: dict[str, Any], place: str) -> tuple[Turn, ...]:
    """The turn of a call's result; before it that of the call, which ChatGLM3's form has in the same message."""
    value, name = _first(item, "content", "value"), _text_of(item, "name")
    if value is None and ("observation" in item or "parameters" in item):
        if not name.strip():
            raise RowError(f'{place} has no "name" of a tool')
        call = ToolCall(name, parse_arguments(item.get("parameters"), f'"parameters" of {place}'))
        turn = Turn("assistant", "", tool_calls=(call,), trained=_is_trained(item, place), call_ids=("",))
        return (turn, Turn("tool", _result(item["observation"], place))) if "observation" in item else (turn,)
    call_id = _text_of(item, "tool_call_id") or _text_of(item, "id")
    return (Turn("tool", _result(value, place), call_ids=(call_id,), tool_name=name),)


def _result(value: Any, place: str) -> str:
    """The text of a call's result, which may be any value of JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(v, dict) and v.get("type") in _PART_TYPES for v in value):
        return _text(value, place)
    return to_json(value, f"the result in {place}")


def _text(value: Any, place: str) -> str:
    """The text of a message: a string, or OpenAI's list of parts."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowError(f'{place} needs a "content" (or "value") that holds text, not {type(value).__name__}')
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RowError(f"a part of the type {kind!r:.60} in {place}: only text can be used")
    return "".join(part["text"] for part in value)


def _not_blank(text: str, place: str) -> str:
    if not text.strip():
        raise RowError(f'{place} needs a "content" (or "value") that holds text')
    return text


def _reasoning(item: dict[str, Any], place: str) -> str:
    texts = {name: item[name] for name in REASONING_FIELDS if not is_empty(item.get(name))}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise RowError(f'"{name}" in {place} is {type(text).__name__}, not text')
    if len(set(texts.values())) > 1:
        raise RowError(f"{' and '.join(texts)} in {place} hold different texts: keep one of them")
    return next(iter(texts.values()), "")


def _is_trained(item: dict[str, Any], place: str) -> bool | None:
    """Whether a message is trained on; None if it does not say."""
    trained = None
    for name in LOSS_FIELDS:
        value = item.get(name)
        if value in (None, "", []):
            continue
        if value in _NOT_TRAINED:
            trained = False
        elif value not in _TRAINED:
            raise RowError(f'"{name}" in {place} is {value!r}: a turn is trained on (1) or not (0)')
        elif trained is None:
            trained = True
    return trained


def _first(item: dict[str, Any], *keys: str) -> Any:
    return next((item[key] for key in keys if key in item), None)


def _text_of(item: dict[str, Any], key: str) -> str:
    value = item.get(key)
    return value if isinstance(value, str) else ""
