"""Raw rows of every supported schema -> `Row`; what is wrong with a row, in words."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from utils.errors import RowError
from utils.raw_files import Block, read_blocks

# (columns joined to the prompt, column of the target), the first that fits a row is taken.
SCHEMAS = (
    (("instruction", "input"), "output"),  # BELLE today, Alpaca
    (("input",), "target"),  # BELLE's first files
    (("context",), "target"),  # the JSONL of ChatGLM-Tuning
    (("prompt",), "completion"),
)
CHATS = ("messages", "conversations")  # the second in BELLE's 3.5M file and ShareGPT, with from/value
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}
# BELLE's multi-turn files hold the conversation in `instruction`: "Human:...\nAssistant:...\nHuman:...\nAssistant:".
_TURN = re.compile(r"(?:^|\n)\s*(Human|Assistant)[:：]")


class Message(NamedTuple):
    role: str  # "user" or "assistant"
    content: str


class Row(NamedTuple):
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


def parse_prompt(raw: Any) -> Row:
    """
    Reads the prompt of a raw row; a target that stands beside it is left out.

    `instruction` and `input` are joined by a newline where both hold text. A chat is
    `{"messages": [{"role": "user", "content": ...}, ...]}` or
    `{"conversations": [{"from": "human", "value": ...}, ...]}` and ends with the user's turn; a system message at its
    start stands before the first user's text, a newline between.

    Raises:
        RowError: no schema fits, or the prompt is blank.
    """
    schema = _schema_of(raw)
    if schema.chat:
        messages = _parse_chat(raw[schema.chat], schema.chat)
        return Row(messages[:-1] if messages[-1].role == "assistant" else messages)
    return Row(_parse_columns(raw, schema))


def parse_row(raw: Any) -> Row:
    """
    Reads a training row: a prompt and its target.

    Raises:
        RowError: no schema fits, or the prompt or the target is blank.
    """
    schema = _schema_of(raw)
    if schema.chat:
        messages = _parse_chat(raw[schema.chat], schema.chat)
        if messages[-1].role != "assistant" or len(messages) < 2:
            raise RowError("a training conversation must end with the assistant's answer to a user's message")
        return Row(messages)
    prompt = _parse_columns(raw, schema)
    if schema.target is None:
        raise RowError(f"no target among {sorted(map(str, raw))}; known are {describe_schemas()}")
    target = _text(raw, schema.target)
    if not target or target.isspace():
        raise RowError(f'the target ("{schema.target}") is blank')
    return Row((*prompt, Message("assistant", target)))


class _Schema(NamedTuple):
    chat: str | None  # the column of a conversation
    prompt: tuple[str, ...]
    target: str | None


def _schema_of(raw: Any) -> _Schema:
    if not isinstance(raw, dict):
        raise RowError(f"a row must be a JSON object, not {type(raw).__name__}")
    return _find_schema(tuple(raw))


@functools.lru_cache(maxsize=4096)
def _find_schema(columns: tuple[str, ...]) -> _Schema:
    """Which of a row's columns hold what."""
    for column in CHATS:
        if column in columns:
            return _Schema(column, (), None)
    found = [(prompt, target) for prompt, target in SCHEMAS if prompt[0] in columns]
    if not found:
        known = f"known are {describe_schemas()}"
        raise RowError(f"no known columns among {sorted(map(str, columns))}; {known}")
    targets = [target for _, target in found if target in columns]
    return _Schema(None, tuple(column for column in found[0][0] if column in columns), targets[0] if targets else None)


def _parse_columns(raw: dict[str, Any], schema: _Schema) -> tuple[Message, ...]:
    """The prompt."""
    columns = schema.prompt
    prompt = _text(raw, columns[0])
    if len(columns) > 1 and (more := _text(raw, columns[1])):
        prompt = f"{prompt}\n{more}" if prompt else more
    if not prompt or prompt.isspace():
        raise RowError(f"the prompt ({' + '.join(columns)}) is blank")
    if "Human" in prompt and columns[0] == "instruction" and (turns := _parse_tagged(prompt)):
        return turns
    return (Message("user", prompt),)


def _text(raw: dict[str, Any], column: str) -> str:
    value = raw.get(column)
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    raise RowError(f'"{column}" is {type(value).__name__}, not text')


def describe_schemas() -> str:
    return (
        "; ".join("/".join((*columns, target)) for columns, target in SCHEMAS)
        + "; instruction/instances; "
        + ("; ".join(CHATS))
    )


def _parse_tagged(text: str) -> tuple[Message, ...] | None:
    """The turns of a text in BELLE's multi-turn form; None where it does not start and end as one does."""
    tags = list(_TURN.finditer(text))
    if not tags or tags[0][1] != "Human" or text[: tags[0].start()].strip():
        return None
    ends = [tag.start() for tag in tags[1:]] + [len(text)]
    turns = [(tag[1], text[tag.end() : end].strip()) for tag, end in zip(tags, ends, strict=True)]
    if turns[-1] != ("Assistant", ""):
        return None
    messages = tuple(Message(ROLES[role.lower()], content) for role, content in turns[:-1])
    for turn, message in enumerate(messages):
        if message.role != ("user", "assistant")[turn % 2] or not message.content:
            raise RowError("the Human: and Assistant: turns of the instruction do not alternate, or one is blank")
    if messages[-1].role != "user":
        raise RowError("the instruction's last turn before Assistant: is not Human:")
    return messages


def _parse_chat(raw: Any, column: str) -> tuple[Message, ...]:
    if not isinstance(raw, list) or not raw:
        raise RowError(f'"{column}" must be a list with at least one message')
    messages, system = [], ""
    for item in raw:
        role = ROLES.get(_either(item, "role", "from")) if isinstance(item, dict) else None
        if role is None:
            raise RowError('each message needs a "role" (or "from") of "user" or "assistant"')
        content = _either(item, "content", "value")
        if not isinstance(content, str) or not content.strip():
            raise RowError('each message needs a "content" (or "value") that holds text')
        if role == "system":
            if messages or system:
                raise RowError("a system message must stand once, at the start")
            system = content + "\n"
        else:
            messages.append(Message(role, system + content if not messages else content))
    if not messages:
        raise RowError(f'"{column}" holds a system message alone')
    for turn, message in enumerate(messages):
        if message.role != ("user", "assistant")[turn % 2]:
            raise RowError("messages must alternate between user and assistant, the user first")
    return tuple(messages)


def _either(item: dict[str, Any], *keys: str) -> Any:
    value = next((item[key] for key in keys if key in item), None)
    return value if isinstance(value, str) else None


class NumberedRow(NamedTuple):
    path: str
    line: int  # from 1; of a JSON array the line that a row starts on
    row: Row | RowError


def rows_of(block: Block, parse: Callable[[Any], Row]) -> Iterator[NumberedRow]:
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


def _parse_instances(raw: dict[str, Any], parse: Callable[[Any], Row]) -> list[Row | RowError]:
    """The rows of a seed task, `{"instruction", "instances": [{"input", "output"}]}`: one an instance."""
    instances = raw["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(item, dict) for item in instances):
        return [RowError('"instances" must be a list with at least one object')]
    rows = []
    for instance in instances:
        try:
            rows.append(parse({"instruction": raw.get("instruction"), **instance}))
        except RowError as error:
            rows.append(error)
    return rows


def read_rows(paths: str | Iterable[str], parse: Callable[[Any], Row]) -> Iterator[NumberedRow]:
    """
    Every row of one raw file, or of several, in order and in constant memory; one that cannot be used, as its error.

    Raises:
        UsageError: a path is not a file.
    """
    for path in [paths] if isinstance(paths, str) else paths:
        for block in read_blocks(path):
            yield from rows_of(block, parse)
