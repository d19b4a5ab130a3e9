"""
Tables of the columns of raw rows: prompt, answer, chat, context, and what cannot be used.

A new data set with other column names is a row here. `--columns prompt=q,response=a` gives other columns these roles.
utils/data/row_parser.py reads the texts.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from utils.common.errors import RowError, UsageError

CHAT_COLUMNS = ("messages", "conversations", "conversation")
# The first of these that a row has is its prompt; a column of PROMPT_MORE is joined to it.
PROMPT_COLUMNS = ("instruction", "prompt", "question", "problem", "query", "input", "context")
DOCUMENT_COLUMNS = ("content", "document", "article", "dialogue")  # a text whose summary is the answer
PROMPT_MORE = ("input", "query", "context")
ANSWER_COLUMNS = ("output", "target", "completion", "response", "answer", "reply", "solution", "summary")
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message", "meta_instruction")
HISTORY_COLUMN = "history"
TOOL_COLUMNS = ("tools", "functions")  # what may be called
CALL_COLUMNS = ("function_call", "function_calls", "tool_calls", "tool_call_id", "tool_responses")
# Options of the chat template, by themselves or in an object.
KWARGS_COLUMN = "chat_template_kwargs"
OPTION_COLUMNS = (KWARGS_COLUMN, "enable_thinking", "thinking", "clear_thinking", "reasoning_effort")
REASONING_COLUMN = "reasoning_content"  # what is thought before the answer
MEDIA_COLUMNS = ("image", "images", "image_url", "video", "videos", "audio", "audios", "objects")
PREFERENCE_COLUMNS = ("chosen", "rejected", "rejected_response", "rejected_messages")
VERDICT_COLUMNS = ("label", "kto_tag")  # false marks an answer that is not wanted
WEIGHT_COLUMNS = ("weight", "loss_weight", "sample_weight")  # a number: how much the row counts
REFUSED_COLUMNS = (
    dict.fromkeys(CALL_COLUMNS, 'calls and results are messages: write the row as a chat, in "messages"')
    | dict.fromkeys(MEDIA_COLUMNS, "only text can be used")
    | dict.fromkeys(PREFERENCE_COLUMNS, "training on preferences is not supported")
)
_CONTEXT_COLUMNS = {
    *(*SYSTEM_COLUMNS, HISTORY_COLUMN, *TOOL_COLUMNS, *OPTION_COLUMNS, REASONING_COLUMN),
    *(*REFUSED_COLUMNS, *VERDICT_COLUMNS, *WEIGHT_COLUMNS),
}
# Roles that --columns may name, by the names that people use for them.
COLUMN_ROLES = {
    **{name: name for name in ("prompt", "input", "response", "system", HISTORY_COLUMN, "messages", "tools")},
    **{"instruction": "prompt", "question": "prompt", "output": "response", "target": "response"},
    **{"answer": "response", "completion": "response", "conversations": "messages"},
}
COLUMNS_HELP = (
    "which columns hold prompt, input, response, system, history, messages or tools: prompt=q,response=a (default: "
    "columns with known names)"
)
_REPLACED = {  # role that --columns gives to a column -> the columns that would have it by their name
    "prompt": {*PROMPT_COLUMNS, *DOCUMENT_COLUMNS, *CHAT_COLUMNS},
    "input": {*PROMPT_MORE},
    "response": {*ANSWER_COLUMNS},
    "system": {*SYSTEM_COLUMNS},
    HISTORY_COLUMN: {HISTORY_COLUMN},
    "messages": {*PROMPT_COLUMNS, *DOCUMENT_COLUMNS, *CHAT_COLUMNS, *ANSWER_COLUMNS},
    "tools": {*TOOL_COLUMNS},
}


class Schema(NamedTuple):
    """The columns that a row has, by role."""

    chat: str | None
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    context: tuple[str, ...]  # system, history, tools, options, and what cannot be used


@functools.lru_cache(maxsize=4096)
def find_schema(columns: tuple[str, ...]) -> Schema:
    """
    Find the roles of a row's columns by their names.

    Raises:
        RowError: none of the columns is a known prompt or chat.
    """
    chat = next((name for name in CHAT_COLUMNS if name in columns), None)
    prompts = tuple(name for name in (*PROMPT_COLUMNS, *DOCUMENT_COLUMNS) if name in columns)
    if not chat and not prompts:
        raise RowError(
            f"no known columns among {', '.join(sorted(map(str, columns)))}: say which is which with --columns "
            "prompt=NAME,response=NAME"
        )
    answers = tuple(name for name in ANSWER_COLUMNS if name in columns)
    return Schema(chat, prompts, answers, tuple(name for name in columns if name in _CONTEXT_COLUMNS))


def is_empty(value: Any) -> bool:
    """Whether a column or field holds nothing, also as text in a table's cell."""
    return (
        value is None
        or value is False
        or (value.strip() in ("", "[]", "{}", "null", "None") if isinstance(value, str) else value in ([], {}))
    )


def check_refused(raw: dict[str, Any], names: Iterable[str], place: str = "") -> None:
    """
    Check that columns or fields which cannot be used are empty.

    Args:
        names: columns of `raw`.
        place: where `raw` is, for the message.

    Raises:
        RowError: one of them holds something that would be lost.
    """
    for name in names:
        if name in REFUSED_COLUMNS and not is_empty(raw[name]):
            raise RowError(f'"{name}"{place} is not empty: {REFUSED_COLUMNS[name]}')


@dataclass(frozen=True)
class ColumnMap:
    """
    The (role, column) pairs of `--columns`; without any, columns have roles by their names.

    The field name is hashed in utils/data/shards.py.
    """

    pairs: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str | None) -> "ColumnMap":
        """
        Parse "prompt=q,response=a"; None is a map without pairs.

        Raises:
            UsageError: another form, an unknown role, or a role given twice.
        """
        pairs: dict[str, str] = {}
        if text is None:
            return cls()
        for pair in text.split(","):
            name, _, column = (word.strip() for word in pair.partition("="))
            if not column:
                raise UsageError(f"--columns {text}: write ROLE=COLUMN, such as prompt=q,response=a")
            if name not in COLUMN_ROLES:
                raise UsageError(f"--columns {text}: no role {name}; the roles are {', '.join(COLUMN_ROLES)}")
            if COLUMN_ROLES[name] in pairs:
                raise UsageError(f"--columns {text}: two columns for {COLUMN_ROLES[name]}")
            pairs[COLUMN_ROLES[name]] = column
        if "messages" in pairs and pairs.keys() & {"prompt", "input", "response"}:
            raise UsageError(f"--columns {text}: messages hold prompt and response: give one or the other")
        return cls(tuple(pairs.items()))

    @property
    def roles(self) -> set[str]:
        """The roles that are given to columns."""
        return {role for role, _ in self.pairs}

    def rename(self, raw: Any) -> Any:
        """The row with mapped columns under the names of their roles, without other columns of these roles."""
        if not self.pairs or not isinstance(raw, dict):
            return raw
        dropped = {column for _, column in self.pairs}.union(*(_REPLACED[role] for role, _ in self.pairs))
        renamed = {name: value for name, value in raw.items() if name not in dropped}
        for role, column in self.pairs:
            if column in raw:
                renamed[role] = raw[column]
        return renamed

    def check(self, columns: Iterable[str], place: str) -> None:
        """
        Check that the mapped columns exist.

        Args:
            columns: the columns of the rows.
            place: where the rows are, for the message.

        Raises:
            UsageError: a mapped column is not among them.
        """
        known = list(dict.fromkeys(map(str, columns)))
        if missing := [column for _, column in self.pairs if column not in known]:
            others = f"but {', '.join(known[:50])}" if known else "nor any row that can be read as JSON"
            raise UsageError(f"--columns: {place} has no column {', '.join(missing)}, {others}")


NO_RENAMES = ColumnMap()


def texts_of(raw: dict[str, Any], columns: Sequence[str]) -> dict[str, str]:
    """
    The texts of `columns` that are not empty, by column.

    Raises:
        RowError: a value is not text.
    """
    texts = {}
    for column in columns:
        value = raw.get(column)
        if isinstance(value, str):
            if value:
                texts[column] = value
        elif value is not None:
            raise RowError(f'"{column}" is {type(value).__name__}, not text')
    return texts
