"""
Which columns of a raw row hold what: the prompt, the answer, a chat, what stands before it, and what cannot be used.

`--columns prompt=q,response=a` gives other columns these roles. utils/data/row_parser.py reads the texts.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from utils.common.errors import RowError, UsageError

CHATS = ("messages", "conversations", "conversation")
# The first column that a row has is its prompt; MORE is joined to it.
PROMPTS = ("instruction", "prompt", "question", "problem", "query", "input", "context")
DOCUMENTS = ("content", "document", "article", "dialogue")  # what a summary is of
MORE = ("input", "query", "context")
ANSWERS = ("output", "target", "completion", "response", "answer", "solution", "summary")
SYSTEMS = ("system", "system_prompt", "system_message", "meta_instruction")
HISTORY = "history"
TOOLS = ("tools", "functions", "function_call", "function_calls", "tool_calls", "tool_call_id", "tool_responses")
MEDIA = ("image", "images", "image_url", "video", "videos", "audio", "audios", "objects")
PREFERENCES = ("chosen", "rejected", "rejected_response", "rejected_messages")
VERDICTS = ("label", "kto_tag")  # False marks an answer that is not wanted
WEIGHTS = ("weight", "loss_weight", "sample_weight")  # a number: how much the row counts
REFUSED = (
    dict.fromkeys(TOOLS, "tools cannot be used yet")
    | dict.fromkeys(MEDIA, "only text can be used")
    | dict.fromkeys(PREFERENCES, "training on preferences is not supported")
)
_CARRYING = {*SYSTEMS, HISTORY, *REFUSED, *VERDICTS, *WEIGHTS}
# What --columns may name, and the roles of the names that people know the roles by.
ROLES = {
    **{name: name for name in ("prompt", "input", "response", "system", HISTORY, "messages")},
    **{"instruction": "prompt", "question": "prompt", "output": "response", "target": "response"},
    **{"answer": "response", "completion": "response", "conversations": "messages"},
}
COLUMNS_HELP = (
    "which columns hold prompt, input, response, system, history or messages: prompt=q,response=a (their names say)"
)
_REPLACED = {  # by a role that --columns gives: columns that have it by their name
    "prompt": {*PROMPTS, *DOCUMENTS, *CHATS},
    "input": {*MORE},
    "response": {*ANSWERS},
    "system": {*SYSTEMS},
    HISTORY: {HISTORY},
    "messages": {*PROMPTS, *DOCUMENTS, *CHATS, *ANSWERS},
}


class Schema(NamedTuple):
    """The columns of a row by what they hold, those that it has alone."""

    chat: str | None
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    carrying: tuple[str, ...]  # beside prompt and answer: system, history, and what cannot be used


@functools.lru_cache(maxsize=4096)
def find_schema(columns: tuple[str, ...]) -> Schema:
    """
    Raises:
        RowError: none of the columns is known as a prompt or a chat.
    """
    chat = next((name for name in CHATS if name in columns), None)
    prompts = tuple(name for name in (*PROMPTS, *DOCUMENTS) if name in columns)
    if not chat and not prompts:
        raise RowError(
            f"no known columns among {sorted(map(str, columns))}; known are {describe_columns()}; "
            "--columns prompt=NAME,response=NAME names others"
        )
    answers = tuple(name for name in ANSWERS if name in columns)
    return Schema(chat, prompts, answers, tuple(name for name in columns if name in _CARRYING))


def describe_columns() -> str:
    return (
        f"{', '.join((*PROMPTS, *DOCUMENTS))} for the prompt, {', '.join(ANSWERS)} for the answer, "
        f"{', '.join(CHATS)} for a chat, instruction/instances for seed tasks"
    )


def is_empty(value: Any) -> bool:
    """Whether a column or field says nothing, also as text in a cell of a table."""
    return (
        value is None
        or value is False
        or (value.strip() in ("", "[]", "{}", "null", "None") if isinstance(value, str) else value in ([], {}))
    )


def check_refused(raw: dict[str, Any], names: Iterable[str], place: str = "") -> None:
    """
    Raises:
        RowError: one of the columns or fields `names` holds something that would be lost.
    """
    for name in names:
        if name in REFUSED and not is_empty(raw[name]):
            raise RowError(f'"{name}"{place} is not empty: {REFUSED[name]}')


@dataclass(frozen=True)
class ColumnMap:
    """What `--columns` says: (role, column) pairs; without any, columns have the roles that their names say."""

    pairs: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str | None) -> "ColumnMap":
        """
        "prompt=q,response=a" as a ColumnMap.

        Raises:
            UsageError: not of that form, or a role that there is none of.
        """
        pairs: dict[str, str] = {}
        for part in (text or "").split(",") if text is not None else ():
            name, _, column = (side.strip() for side in part.partition("="))
            if not column:
                raise UsageError(f"--columns {text}: write ROLE=COLUMN, such as prompt=q,response=a")
            if name not in ROLES:
                raise UsageError(f"--columns {text}: no role {name}; there are {', '.join(dict.fromkeys(ROLES))}")
            if ROLES[name] in pairs:
                raise UsageError(f"--columns {text}: two columns for {ROLES[name]}")
            pairs[ROLES[name]] = column
        if "messages" in pairs and pairs.keys() & {"prompt", "input", "response"}:
            raise UsageError(f"--columns {text}: messages hold prompt and response")
        return cls(tuple(pairs.items()))

    @property
    def roles(self) -> set[str]:
        return {role for role, _ in self.pairs}

    def rename(self, raw: Any) -> Any:
        """The row with its columns under the names of their roles, and without others of the same roles."""
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
        Args:
            columns: those that the rows of `place` have.

        Raises:
            UsageError: a column that --columns names is not among them.
        """
        known = list(dict.fromkeys(map(str, columns)))
        if missing := [column for _, column in self.pairs if column not in known]:
            raise UsageError(f"--columns: {place} has no column {', '.join(missing)}, but {', '.join(known[:50])}")


NO_RENAMES = ColumnMap()


def texts_of(raw: dict[str, Any], columns: Sequence[str]) -> dict[str, str]:
    """
    The texts that are not empty, by column.

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
