"""
Parses the chats and histories of raw rows, and joins their turns to a `Conversation`.

utils/data/row_parser.py calls it; utils/data/messages.py parses the messages. Turns that do not follow each other as
in a conversation are a `RowError`: nothing is dropped.
"""

from collections.abc import Sequence
from typing import Any

from utils.common.errors import RowError
from utils.data.cell_values import parse_list
from utils.data.messages import Turn, parse_message
from utils.data.tool_forms import call_before_result, same_tools
from utils.models.conversation import Conversation, Message

_MESSAGE_FIELDS = len(Message._fields)


def parse_chat(raw: Any, column: str) -> list[Turn]:
    """
    Parse a list of {"role", "content"} or {"from", "value"}.

    The list may also be the text of a table's cell.

    Raises:
        RowError: a message cannot be used.
    """
    items = parse_list(raw, f'"{column}"')
    if not items:
        raise RowError(f'"{column}" must be a list with at least one message')
    turns: list[Turn] = []
    for number, item in enumerate(items, start=1):
        turns += parse_message(item, column, number)
    return turns


def parse_history(raw: Any, column: str) -> list[Turn]:
    """
    Parse a list of [question, answer] pairs or of messages.

    The list may also be the text of a table's cell.

    Raises:
        RowError: a pair or a message cannot be used.
    """
    turns: list[Turn] = []
    for number, item in enumerate(parse_list(raw, f'"{column}"'), start=1):
        if isinstance(item, dict):
            turns += parse_message(item, column, number)
        elif isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(text, str) for text in item):
            if not all(text.strip() for text in item):
                raise RowError(f'a question or an answer in "{column}" is blank')
            turns += (Turn("user", item[0]), Turn("assistant", item[1]))
        else:
            raise RowError(f'"{column}" must be a list of [question, answer] pairs or of messages')
    return turns


def join_turns(system: str, columns: Sequence[tuple[str, list[Turn]]], tools: str = "") -> Conversation:
    """
    Join turns to one conversation.

    Args:
        system: the system text, "" for none.
        columns: the row's columns and their turns, in order.
        tools: the row's tools as JSON text, "" for none.

    Raises:
        RowError: a turn cannot follow the one before, or there is a system message other than one at the start.
    """
    turns = [turn for _, column_turns in columns for turn in column_turns]
    names = " and ".join(f'"{column}"' for column, column_turns in columns if column_turns)
    if any(turn.role == "system" for turn in turns):
        system, tools, turns = _take_system(system, tools, turns, names)
    if not turns:
        raise RowError(f"{names} holds only a system message")
    if not _alternate(turns):
        turns = _join_calls(turns, names)
        _check_order(turns, names)
        turns = _order_results(turns)
    messages = [Message._make(turn[:_MESSAGE_FIELDS]) for turn in turns]
    if system:
        messages.insert(0, Message("system", system))
    return Conversation(tuple(messages), tools)


def _take_system(system: str, tools: str, turns: list[Turn], names: str) -> tuple[str, str, list[Turn]]:
    """The system text, the tools and the other turns."""
    if turns[0].role == "system":
        first, turns = turns[0], turns[1:]
        if system and first.content and system != first.content:
            raise RowError(f'a system message in {names} and another in "system"')
        system = system or first.content
        tools = same_tools({"the row": tools, "its system message": first.tools})
    others = [turn for turn in turns if turn.role != "system"]
    if any(turn.role == "system" and (turn.content or turn.tools) for turn in turns):
        raise RowError("there may be one system message, at the start")
    return system, tools, others


def _alternate(turns: list[Turn]) -> bool:
    return all(turn.role == ("user", "assistant")[number % 2] for number, turn in enumerate(turns))


def _join_calls(turns: list[Turn], names: str) -> list[Turn]:
    """
    The turns with each call in one turn with the assistant's text before it, and with the calls before it.

    A text before a result, if it is a call, becomes one.
    """
    joined: list[Turn] = []
    for turn in turns:
        last = joined[-1] if joined else None
        if last and last.role == "assistant":
            if turn.role == "assistant" and turn.tool_calls and not turn.content and not turn.reasoning:
                joined[-1] = _with_calls(last, turn, names)
                continue
            if turn.role == "tool" and not last.tool_calls and (parsed := call_before_result(last.content)):
                thought, calls = parsed
                ids = ("",) * len(calls)
                joined[-1] = last._replace(content=thought, tool_calls=tuple(calls), call_ids=ids)
        joined.append(turn)
    return joined


def _with_calls(turn: Turn, calls: Turn, names: str) -> Turn:
    if turn.trained is not calls.trained:
        raise RowError(
            f"in {names} the assistant's turn and the call after it are one message, but differ in whether they are "
            "trained on: give both the same loss"
        )
    ids = turn.call_ids + calls.call_ids
    return turn._replace(tool_calls=turn.tool_calls + calls.tool_calls, call_ids=ids)


def _check_order(turns: list[Turn], names: str) -> None:
    """
    Raises:
        RowError: a turn cannot follow the one before.
    """
    previous, open_calls = "", 0
    for turn in turns:
        if turn.role == "tool":
            if previous not in ("assistant", "tool") or (previous == "assistant" and not open_calls):
                raise RowError(
                    f"in {names} a tool's result follows no call: the assistant's message before it needs tool_calls"
                )
            if not open_calls:
                raise RowError(f"in {names} are more results of tools than calls before them: leave the others out")
            open_calls -= 1
        else:
            expected = ("user", "tool") if turn.role == "assistant" else ("", "assistant")
            if previous not in expected:
                results = ", and results of tools come before an answer" if "tool" in [t.role for t in turns] else ""
                raise RowError(
                    f"messages of {names} must alternate between user and assistant, the user first{results}"
                )
            open_calls = len(turn.tool_calls)
        previous = turn.role


def _order_results(turns: list[Turn]) -> list[Turn]:
    """The turns with the results of several calls in the order of the calls."""
    ordered: list[Turn] = []
    results: list[Turn] = []
    for turn in turns:
        if turn.role == "tool":
            results.append(turn)
            continue
        ordered += _in_order_of_calls(results, ordered[-1]) if results else []
        ordered.append(turn)
        results = []
    return ordered + (_in_order_of_calls(results, ordered[-1]) if results else [])


def _in_order_of_calls(results: list[Turn], calls: Turn) -> list[Turn]:
    """The results in the order of their calls where all have ids, or else names, of distinct calls."""
    ids = [result.call_ids[0] if result.call_ids else "" for result in results]
    names = [result.tool_name for result in results]
    for own, of_calls in ((ids, calls.call_ids), (names, [call.name for call in calls.tool_calls])):
        places = {key: place for place, key in enumerate(of_calls) if key}
        if len(places) == len(of_calls) and len(set(own)) == len(own) and set(own) <= places.keys():
            return [result for _, result in sorted(zip(map(places.get, own), results, strict=True))]
    return results
