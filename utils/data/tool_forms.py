"""
Parses tools and calls of tools, in the forms of OpenAI, LLaMA-Factory, ms-swift, ChatGLM3 and GLM-4.

utils/data/messages.py and row_parser.py call it. Tools become JSON text of one list, and each call a `ToolCall`.
"""

import ast
import json
import re
from typing import Any

from utils.common.errors import RowError
from utils.data.cell_values import parse_cell, parse_json, parse_list, to_json
from utils.data.row_schema import is_empty
from utils.models.conversation import ToolCall

CALL_FORM = '{"name": ..., "arguments": {...}}'
_ARGUMENTS = ("arguments", "parameters")  # of a call
_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
_NAME_LINE = re.compile(r"([\w.-]+)\n")  # GLM-4 writes a call as its name, a newline and the arguments
_CODE_FENCE = re.compile(r"```(?:python)?\n(.*?)\n?```", re.DOTALL)  # ChatGLM3 writes tool_call(city='Paris') in one


def parse_tools(value: Any, place: str) -> str:
    """
    The JSON text of the list of tools that a value holds; "" for none.

    The list may be JSON text, and so may each tool. A tool without {"type": "function", "function": ...} around it
    gets it.

    Raises:
        RowError: there is no list, or a tool has no name.
    """
    if is_empty(value):
        return ""
    if isinstance(value, str):
        try:
            value = parse_cell(value, place)
        except RowError:
            raise RowError(
                f"{place} is text, but no JSON list of tools: put a description in words into the system text"
            ) from None
    tools = parse_list(value, place)
    return to_json(
        [_parse_tool(tool, f"tool {number} of {place}") for number, tool in enumerate(tools, start=1)], place
    )


def _parse_tool(tool: Any, place: str) -> dict[str, Any]:
    tool = parse_cell(tool, place)
    if not isinstance(tool, dict):
        raise RowError(f"{place} must be an object with a name, not {type(tool).__name__}")
    function = tool.get("function") or tool
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise RowError(f'{place} has no "name"')
    if function is tool:
        own = {key: value for key, value in tool.items() if key not in ("type", "function")}
        return {"type": "function", "function": own}
    return tool if "type" in tool else {"type": "function", **tool}


def same_tools(definitions: dict[str, str]) -> str:
    """
    The tools of a row that may have them in several places.

    Args:
        definitions: place -> JSON text of its tools, or "".

    Raises:
        RowError: two places hold different tools.
    """
    filled = {text: place for place, text in definitions.items() if text}
    if len(filled) > 1:
        raise RowError(f"{' and '.join(filled.values())} hold different tools: keep one of them")
    return next(iter(filled), "")


def parse_call(value: Any, place: str) -> tuple[ToolCall, str]:
    """
    The call that an object holds, and its id, "" for none.

    The object is {"name", "arguments"}, also with `parameters`, or has it under `function`, as OpenAI writes it.

    Raises:
        RowError: there is no name, or the arguments are no object.
    """
    value = parse_cell(value, place)
    function = (value.get("function") or value) if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise RowError(f"{place} has no name of a tool: write a call as {CALL_FORM}")
    given = [function[key] for key in _ARGUMENTS if function.get(key) is not None]
    if len(given) > 1:
        raise RowError(f'{place} has both "arguments" and "parameters": keep one of them')
    call_id = value.get("id")
    arguments = parse_arguments(given[0] if given else None, f"the arguments of {place}")
    return ToolCall(name, arguments), call_id if isinstance(call_id, str) else ""


def parse_arguments(value: Any, place: str) -> str:
    """
    The JSON text of a call's arguments; a text that is JSON of an object stays letter for letter.

    Raises:
        RowError: they are no object.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return "{}"
    if isinstance(value, dict):
        return to_json(value, place)
    if not isinstance(value, str):
        raise RowError(f"{place} must be an object or its JSON text, not {type(value).__name__}")
    try:
        parsed = parse_json(value)
    except ValueError as error:
        raise RowError(f"{place} are text, but not JSON: {error}") from None
    if parsed is None:
        return "{}"
    if not isinstance(parsed, dict):
        raise RowError(f"{place} must be JSON of an object, not of {type(parsed).__name__}")
    return value


def parse_call_text(text: Any, place: str) -> tuple[str, list[tuple[ToolCall, str]]]:
    """
    The thought before the calls that a message's text holds, "" for none, and the calls with their ids.

    The text is one JSON object or a list of them; LLaMA-Factory writes a thought before it as <think>...</think>.

    Raises:
        RowError: it holds no call.
    """
    thought = ""
    if isinstance(text, str) and (match := _THOUGHT.match(text)):
        thought, text = match[0].rstrip(), text[match.end() :]
    try:
        value = parse_json(text) if isinstance(text, str) else text
    except ValueError:
        raise RowError(f"{place} is no call: it must be JSON such as {CALL_FORM}") from None
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise RowError(f"{place} holds no call: it must be JSON such as {CALL_FORM}")
    return thought, [parse_call(call, place) for call in calls]


def call_before_result(text: str) -> tuple[str, list[ToolCall]] | None:
    """
    The thought and the calls of an assistant's text whose next message is a result; None if it is no call.

    GLM-4's own data has calls as such texts: JSON of {"name", "arguments"}, or the name, a newline and the arguments.
    """
    try:
        if (match := _NAME_LINE.match(text)) and text[match.end() :].lstrip().startswith("{"):
            return "", [ToolCall(match[1], parse_arguments(text[match.end() :], "they"))]
        thought, calls = parse_call_text(text, "it")
    except RowError:
        return None
    return thought, [call for call, _ in calls]


def parse_metadata_call(name: str, text: str, place: str) -> ToolCall:
    """
    The call of an assistant's message whose `metadata` is the tool's name and whose text its arguments.

    The text is JSON in GLM-4, and Python code in ChatGLM3: tool_call(city='Paris').

    Raises:
        RowError: the text is neither.
    """
    try:
        return ToolCall(name, parse_arguments(text, "they"))
    except RowError:
        pass
    code = match[1] if (match := _CODE_FENCE.fullmatch(text.strip())) else text.strip()
    try:
        call = ast.parse(code, mode="eval").body
        if not isinstance(call, ast.Call) or call.args or ast.unparse(call.func) != "tool_call":
            raise ValueError(code)
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise RowError(
            f'"metadata" in {place} names the tool {name!r:.60}, but its text is not the arguments as JSON'
        ) from None
    return ToolCall(name, to_json(arguments, f"the arguments of {place}"))


def call_fields(call: ToolCall) -> dict[str, Any]:
    """
    A call in OpenAI's form, which `parse_call` parses to the same call.

    Its arguments are an object, or a text where an object's JSON would have other letters.
    """
    arguments = json.loads(call.arguments)
    same = json.dumps(arguments, ensure_ascii=False) == call.arguments
    return {"type": "function", "function": {"name": call.name, "arguments": arguments if same else call.arguments}}
