"""
Turns raw rows of every supported schema into `Conversation`s, or into a `RowError` that says why not.

Processing, tokenising, inference and evaluation all read rows through this module (`read_rows`, or `rows_in_block` in
worker processes), so that a column means the same in each. The schemas are tables in utils/data/row_schema.py.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from utils.common.errors import RowError
from utils.data.conversations import join_turns, parse_chat, parse_history
from utils.data.messages import ROLE_ALIASES, Turn
from utils.data.raw_reader import Block, read_blocks
from utils.data.row_options import parse_options
from utils.data.row_schema import (
    ANSWER_COLUMNS,
    DOCUMENT_COLUMNS,
    HISTORY_COLUMN,
    NO_RENAMES,
    OPTION_COLUMNS,
    PREFERENCE_COLUMNS,
    PROMPT_MORE,
    REASONING_COLUMN,
    SYSTEM_COLUMNS,
    TOOL_COLUMNS,
    VERDICT_COLUMNS,
    WEIGHT_COLUMNS,
    ColumnMap,
    Schema,
    check_refused,
    find_schema,
    is_empty,
    texts_of,
)
from utils.data.tool_forms import parse_tools, same_tools
from utils.models.conversation import Conversation, Message

# BELLE's multi-turn files have the conversation in `instruction`: "Human:...\nAssistant:...\nHuman:...\nAssistant:".
_TURN = re.compile(r"(?:^|\n)\s*(Human|Assistant)[:：]")


def parse_prompt(raw: Any, columns: ColumnMap = NO_RENAMES) -> Conversation:
    """
    Read the prompt of a raw row, without the target if it has one.

    `instruction` and `input` are joined by a newline if both hold text. A chat is
    `{"messages": [{"role": "user", "content": ...}, ...]}` or
    `{"conversations": [{"from": "human", "value": ...}, ...]}` and ends with the user's turn or with a tool's result.
    The text of `system`, or a system message at a chat's start, is the first message; the turns of `history` come
    before the others.

    Raises:
        RowError: no known column, a blank prompt, or something that would be lost.
    """
    raw, schema = _find_schema(raw, columns)
    conversation = _conversation(raw, schema)
    return Conversation(conversation.prompt, conversation.tools, conversation.options)


def parse_row(raw: Any, columns: ColumnMap = NO_RENAMES) -> Conversation:
    """
    Read a training row: a prompt and its target.

    Raises:
        RowError: see `parse_prompt`; or the target is blank, or marked as not to be trained on.
    """
    raw, schema = _find_schema(raw, columns)
    row = _conversation(raw, schema)
    if schema.context:
        _check_training(raw)
    if not schema.chat:
        answer = Message("assistant", _target(raw, schema), _reasoning(raw) if schema.context else "")
        return Conversation((*row.messages, answer), row.tools, row.options)
    if row.target is None:
        raise RowError("a training conversation must end with the assistant's answer or calls")
    if not row.trained_messages("every"):
        raise RowError("no answer of the conversation is to be trained on")
    return row


def parse_question(raw: Any, text: str, used: Sequence[str]) -> Conversation:
    """
    The prompt whose last question is `text`, after the row's system text and history, with its tools and options.

    Args:
        used: the columns that `text` was made from.

    Raises:
        RowError: the text is blank, or see `parse_prompt`.
    """
    if not text.strip():
        raise RowError("the prompt is blank")
    context = find_schema(("prompt", *(name for name in raw if name not in used))).context
    return _in_context(raw, context, "prompt", [Turn("user", text)])


def _check_training(raw: dict[str, Any]) -> None:
    """
    Check the columns that speak of the target.

    Raises:
        RowError: the answer is worse than another one, or counts more or less than others.
    """
    check_refused(raw, [name for name in PREFERENCE_COLUMNS if name in raw])
    for name in VERDICT_COLUMNS:
        if raw.get(name) is False:
            raise RowError(f'"{name}" is false: an answer that is not wanted cannot be trained on')
    for name in WEIGHT_COLUMNS:
        weight = raw.get(name)
        if isinstance(weight, int | float) and weight != 1:
            raise RowError(f'"{name}" is {weight}: rows cannot count more or less than others')


def _find_schema(raw: Any, columns: ColumnMap) -> tuple[dict[str, Any], Schema]:
    """The row with its columns renamed, and its schema."""
    raw = columns.rename(raw)
    if not isinstance(raw, dict):
        raise RowError(f"a row must be a JSON object, not {type(raw).__name__}")
    schema = find_schema(tuple(raw))
    if not schema.chat and isinstance(raw[schema.prompts[0]], list):
        raw = _as_chat(raw, schema)
        schema = find_schema(tuple(raw))
    return raw, schema


def _as_chat(raw: dict[str, Any], schema: Schema) -> dict[str, Any]:
    """A row whose prompt and answer are lists of messages, as TRL has them, as a row with one list."""
    prompt = schema.prompts[0]
    if not all(isinstance(message, dict) for message in raw[prompt]):
        raise RowError(f'"{prompt}" is list, not text')
    messages = list(raw[prompt])
    for name in schema.answers:
        if isinstance(raw[name], list):
            messages += raw[name]
        elif not is_empty(raw[name]):
            messages.append({"role": "assistant", "content": raw[name]})
    return {"messages": messages} | {n: value for n, value in raw.items() if n not in (prompt, *schema.answers)}


def _conversation(raw: dict[str, Any], schema: Schema) -> Conversation:
    """The row's messages: all of a chat, or those before the target."""
    if schema.chat:
        turns = parse_chat(raw[schema.chat], schema.chat)
        if schema.context and not is_empty(raw.get(REASONING_COLUMN)):
            raise RowError(f'"{REASONING_COLUMN}" is not empty: in a chat it is a field of the assistant\'s message')
        contents = [turn.content for turn in turns]
        for name in schema.prompts:
            if isinstance(raw[name], str) and raw[name].strip() and raw[name] not in contents:
                raise RowError(
                    f'"{schema.chat}" does not hold the text of "{name}": '
                    f"give --columns messages={schema.chat} to ignore it"
                )
        return _in_context(raw, schema.context, schema.chat, turns)
    prompt = _prompt(raw, schema.prompts)
    turns = _parse_tagged(prompt) if "Human" in prompt and schema.prompts[0] == "instruction" else None
    if schema.context or turns:
        return _in_context(raw, schema.context, schema.prompts[0], turns or [Turn("user", prompt)])
    return Conversation((Message("user", prompt),))


def _in_context(raw: dict[str, Any], context: Sequence[str], column: str, turns: list[Turn]) -> Conversation:
    """
    The turns of `column` after the row's system text and history, with its tools and options.

    Those are among the columns `context`.
    """
    check_refused(raw, [name for name in context if name not in PREFERENCE_COLUMNS])
    systems = texts_of(raw, [name for name in SYSTEM_COLUMNS if name in context])
    systems = {name: text for name, text in systems.items() if not text.isspace()}
    if len(set(systems.values())) > 1:
        raise RowError(f"{' and '.join(systems)} hold different system texts: keep one of them")
    history = parse_history(raw[HISTORY_COLUMN], HISTORY_COLUMN) if HISTORY_COLUMN in context else []
    tools = same_tools({f'"{name}"': parse_tools(raw[name], f'"{name}"') for name in TOOL_COLUMNS if name in context})
    joined = join_turns(next(iter(systems.values()), ""), [(HISTORY_COLUMN, history), (column, turns)], tools)
    options = [name for name in OPTION_COLUMNS if name in context]
    return joined._replace(options=parse_options(raw, options)) if options else joined


def _reasoning(raw: dict[str, Any]) -> str:
    """The reasoning before the target of a row that is no chat."""
    reasoning = texts_of(raw, [REASONING_COLUMN]).get(REASONING_COLUMN, "")
    return "" if is_empty(reasoning) else reasoning


def _prompt(raw: dict[str, Any], columns: Sequence[str]) -> str:
    """The prompt's text, from one column or from two."""
    texts = texts_of(raw, columns)
    if len(texts) == 2 and _is_one_prompt(*texts):
        prompt = "\n".join(texts.values())
    else:
        filled = [name for name, text in texts.items() if not text.isspace()]
        if len(filled) > 1:
            names = " and ".join(f'"{name}"' for name in filled)
            raise RowError(f"{names} could each be the prompt: say which with --columns prompt=NAME")
        prompt = texts[filled[0]] if filled else ""
    if not prompt or prompt.isspace():
        raise RowError(f"the prompt ({' + '.join(columns)}) is blank")
    return prompt


def _is_one_prompt(first: str, more: str) -> bool:
    """Whether the texts of two columns make one prompt."""
    return (
        more in PROMPT_MORE
        and first not in (*PROMPT_MORE, *DOCUMENT_COLUMNS)
        and (more != "query" or first == "prompt")
    )


def _target(raw: dict[str, Any], schema: Schema) -> str:
    if not schema.answers:
        raise RowError(
            f"no target among {', '.join(sorted(map(str, raw)))}: say which column it is with --columns response=NAME "
            f"(known names: {', '.join(ANSWER_COLUMNS)})"
        )
    texts = texts_of(raw, schema.answers)
    filled = {text: name for name, text in texts.items() if not text.isspace()}
    if len(filled) > 1:
        names = " and ".join(f'"{name}"' for name in filled.values())
        raise RowError(f"{names} could each be the target: say which with --columns response=NAME")
    if not filled:
        raise RowError(f'the target ("{schema.answers[0]}") is blank')
    return next(iter(filled))


def _parse_tagged(text: str) -> list[Turn] | None:
    """The turns of a text in BELLE's multi-turn form, or None."""
    tags = list(_TURN.finditer(text))
    if not tags or tags[0][1] != "Human" or text[: tags[0].start()].strip():
        return None
    ends = [tag.start() for tag in tags[1:]] + [len(text)]
    turns = [(tag[1], text[tag.end() : end].strip()) for tag, end in zip(tags, ends, strict=True)]
    if turns[-1] != ("Assistant", ""):
        return None
    parsed = [Turn(ROLE_ALIASES[role.lower()], content) for role, content in turns[:-1]]
    for number, turn in enumerate(parsed):
        if turn.role != ("user", "assistant")[number % 2] or not turn.content:
            raise RowError("the Human: and Assistant: turns of the instruction do not alternate, or one is blank")
    if parsed[-1].role != "user":
        raise RowError("the instruction's last turn before Assistant: is not Human:")
    return parsed


class NumberedRow(NamedTuple):
    """A row with its file and line; a `RowError` if it cannot be used."""

    path: str
    line: int  # from 1; the line on which the row starts
    row: Conversation | RowError


def rows_in_block(block: Block, parse: Callable[[Any], Conversation]) -> Iterator[NumberedRow]:
    """Yield the rows of a block, unusable ones as their error."""
    path = block.path
    for line, raw in block.values():
        if isinstance(raw, RowError):
            yield NumberedRow(path, line, raw)
        elif isinstance(raw, dict) and "instances" in raw:
            yield from (NumberedRow(path, line, row) for row in _parse_instances(raw, parse))
        else:
            try:
                row = parse(raw)
            except RowError as error:
                row = error
            yield NumberedRow(path, line, row)


def _parse_instances(raw: dict[str, Any], parse: Callable[[Any], Conversation]) -> list[Conversation | RowError]:
    """The rows of a seed task, `{"instruction", "instances": [{"input", "output"}]}`: one per instance."""
    instances = raw["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(item, dict) for item in instances):
        return [RowError('"instances" must be a list with at least one object')]
    rows = []
    for instance in instances:
        try:
            rows.append(parse({**{name: value for name, value in raw.items() if name != "instances"}, **instance}))
        except RowError as error:
            rows.append(error)
    return rows


def read_rows(paths: str | Iterable[str], parse: Callable[[Any], Conversation]) -> Iterator[NumberedRow]:
    """
    Yield the rows of raw files in order, unusable ones as their error.

    Memory does not grow with the files.

    Raises:
        UsageError: a path is not a file.
    """
    for path in [paths] if isinstance(paths, str) else paths:
        for block in read_blocks(path):
            yield from rows_in_block(block, parse)


def check_columns(columns: ColumnMap, paths: Iterable[str]) -> None:
    """
    Check that the mapped columns occur in one of the files.

    It reads the first block (1 MiB) of each.

    Raises:
        UsageError: a mapped column is in none of them.
    """
    if not columns.pairs:
        return
    paths, names = list(paths), {}
    for path in paths:
        for block in itertools.islice(read_blocks(path), 1):
            for _, raw in block.values():
                names |= dict.fromkeys(raw) if isinstance(raw, dict) else {}
    columns.check(names, " ".join(paths))
