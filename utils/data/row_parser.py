"""Raw rows of every supported schema -> `Conversation`; what is wrong with a row, in words."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from utils.common.errors import RowError
from utils.data.conversations import ROLES, Turn, join, parse_chat, parse_history
from utils.data.raw_reader import Block, read_blocks
from utils.data.row_schema import (
    ANSWERS,
    DOCUMENTS,
    HISTORY,
    MORE,
    NO_RENAMES,
    PREFERENCES,
    SYSTEMS,
    VERDICTS,
    WEIGHTS,
    ColumnMap,
    Schema,
    check_refused,
    find_schema,
    texts_of,
)
from utils.models.conversation import Conversation, Message

# BELLE's multi-turn files hold the conversation in `instruction`: "Human:...\nAssistant:...\nHuman:...\nAssistant:".
_TURN = re.compile(r"(?:^|\n)\s*(Human|Assistant)[:：]")


def parse_prompt(raw: Any, columns: ColumnMap = NO_RENAMES) -> Conversation:
    """
    Reads the prompt of a raw row; a target that stands beside it is left out.

    `instruction` and `input` are joined by a newline where both hold text. A chat is
    `{"messages": [{"role": "user", "content": ...}, ...]}` or
    `{"conversations": [{"from": "human", "value": ...}, ...]}` and ends with the user's turn. The text of `system`, or
    a system message at a chat's start, is the first message; the turns of `history` stand before the others.

    Raises:
        RowError: no schema fits, the prompt is blank, or the row has something that would be lost.
    """
    raw = columns.rename(raw)
    return Conversation(_conversation(raw, _schema_of(raw)).prompt)


def parse_row(raw: Any, columns: ColumnMap = NO_RENAMES) -> Conversation:
    """
    Reads a training row: a prompt and its target.

    Raises:
        RowError: see `parse_prompt`; or the target is blank, or not to be trained on.
    """
    raw = columns.rename(raw)
    schema = _schema_of(raw)
    row = _conversation(raw, schema)
    if schema.carrying:
        _check_training(raw)
    if not schema.chat:
        return row._replace(messages=(*row.messages, Message("assistant", _target(raw, schema))))
    if row.target is None:
        raise RowError("a training conversation must end with the assistant's answer to a user's message")
    if not row.trained_ends:
        raise RowError("no answer of the conversation is to be trained on")
    return row


def parse_question(raw: Any, text: str, used: Sequence[str]) -> Conversation:
    """
    The prompt whose last question is `text`, which was made of the columns `used`, behind the row's system text and
    history.

    Raises:
        RowError: the text is blank, or see `parse_prompt`.
    """
    if not text.strip():
        raise RowError("the prompt is blank")
    carrying = find_schema(("prompt", *(name for name in raw if name not in used))).carrying
    return _in_context(raw, carrying, "prompt", [Turn("user", text)])


def _check_training(raw: dict[str, Any]) -> None:
    """
    Raises:
        RowError: the row says that its answer is worse than another, or counts more or less than others.
    """
    check_refused(raw, [name for name in PREFERENCES if name in raw])
    for name in VERDICTS:
        if raw.get(name) is False:
            raise RowError(f'"{name}" is false: an answer that is not wanted cannot be trained on')
    for name in WEIGHTS:
        weight = raw.get(name)
        if isinstance(weight, int | float) and weight != 1:
            raise RowError(f'"{name}" is {weight}: rows cannot count more or less than others')


def _schema_of(raw: Any) -> Schema:
    if not isinstance(raw, dict):
        raise RowError(f"a row must be a JSON object, not {type(raw).__name__}")
    return find_schema(tuple(raw))


def _conversation(raw: dict[str, Any], schema: Schema) -> Conversation:
    """The row's messages: of a chat all, of columns those before the target."""
    if schema.chat:
        turns = parse_chat(raw[schema.chat], schema.chat)
        contents = [turn.content for turn in turns]
        for name in schema.prompts:
            if isinstance(raw[name], str) and raw[name].strip() and raw[name] not in contents:
                raise RowError(
                    f'"{name}" stands beside "{schema.chat}", which does not hold its text: '
                    f"--columns messages={schema.chat} leaves it out"
                )
        return _in_context(raw, schema.carrying, schema.chat, turns)
    prompt = _prompt(raw, schema.prompts)
    turns = _parse_tagged(prompt) if "Human" in prompt and schema.prompts[0] == "instruction" else None
    if schema.carrying or turns:
        return _in_context(raw, schema.carrying, schema.prompts[0], turns or [Turn("user", prompt)])
    return Conversation((Message("user", prompt),))


def _in_context(raw: dict[str, Any], carrying: Sequence[str], column: str, turns: list[Turn]) -> Conversation:
    """The turns of `column` behind the row's system text and history, which are among the columns `carrying`."""
    check_refused(raw, [name for name in carrying if name not in PREFERENCES])
    systems = texts_of(raw, [name for name in SYSTEMS if name in carrying])
    systems = {name: text for name, text in systems.items() if not text.isspace()}
    if len(set(systems.values())) > 1:
        raise RowError(f"{' and '.join(systems)} hold different system texts")
    history = parse_history(raw[HISTORY], HISTORY) if HISTORY in carrying else []
    return join(next(iter(systems.values()), ""), [(HISTORY, history), (column, turns)])


def _prompt(raw: dict[str, Any], columns: Sequence[str]) -> str:
    """The text of the first of the columns, with that of one more behind it where that belongs to a prompt."""
    texts = texts_of(raw, columns)
    if len(texts) == 2 and _belongs(*texts):
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


def _belongs(first: str, more: str) -> bool:
    """Whether a prompt is the text of the column `first` and behind it that of `more`."""
    return more in MORE and first not in (*MORE, *DOCUMENTS) and (more != "query" or first == "prompt")


def _target(raw: dict[str, Any], schema: Schema) -> str:
    if not schema.answers:
        raise RowError(
            f"no target among {sorted(map(str, raw))}; known are {', '.join(ANSWERS)}; --columns names others"
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
    """The turns of a text in BELLE's multi-turn form; None where it does not start and end as one does."""
    tags = list(_TURN.finditer(text))
    if not tags or tags[0][1] != "Human" or text[: tags[0].start()].strip():
        return None
    ends = [tag.start() for tag in tags[1:]] + [len(text)]
    turns = [(tag[1], text[tag.end() : end].strip()) for tag, end in zip(tags, ends, strict=True)]
    if turns[-1] != ("Assistant", ""):
        return None
    found = [Turn(ROLES[role.lower()], content) for role, content in turns[:-1]]
    for number, turn in enumerate(found):
        if turn.role != ("user", "assistant")[number % 2] or not turn.content:
            raise RowError("the Human: and Assistant: turns of the instruction do not alternate, or one is blank")
    if found[-1].role != "user":
        raise RowError("the instruction's last turn before Assistant: is not Human:")
    return found


class NumberedRow(NamedTuple):
    path: str
    line: int  # from 1; of a JSON array the line that a row starts on
    row: Conversation | RowError


def rows_in_block(block: Block, parse: Callable[[Any], Conversation]) -> Iterator[NumberedRow]:
    """The rows of a block of a raw file; one that cannot be used, as its error."""
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
    """The rows of a seed task, `{"instruction", "instances": [{"input", "output"}]}`: one an instance."""
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
    Every row of one raw file, or of several, in order and in constant memory; one that cannot be used, as its error.

    Raises:
        UsageError: a path is not a file.
    """
    for path in [paths] if isinstance(paths, str) else paths:
        for block in read_blocks(path):
            yield from rows_in_block(block, parse)


def check_columns(columns: ColumnMap, paths: Iterable[str]) -> None:
    """
    Looks into the first block of each file, about 1 MiB.

    Raises:
        UsageError: a column that --columns names is in none of them.
    """
    if not columns.pairs:
        return
    paths, found = list(paths), {}
    for path in paths:
        for block in itertools.islice(read_blocks(path), 1):
            for _, raw in block.values():
                found |= dict.fromkeys(raw) if isinstance(raw, dict) else {}
    columns.check(found, " ".join(paths))
