"""A file of prompts -> requests: JSON Lines, JSON, CSV or text, single prompts and chats."""

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import RowError, UsageError
from utils.prompts import ChatGLMTemplate, encode_prompt
from utils.raw_files import decode_text
from utils.rows import Message, parse_prompt, read_rows

from transformers import PreTrainedTokenizerBase

SEPARATORS = {".csv": ",", ".tsv": "\t"}
TEXT = ".txt"  # a prompt a line
ADAPTER = "adapter"  # the column that names one of several
BASE = "base"  # its value for none
_PLACE = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Request:
    """One input row: its prompt as text and tokens, or why it has none."""

    index: int
    prompt: str | None
    input_ids: list[int]
    error: str | None = None
    adapter: str | None = None  # the name of one of several


class PromptRow(NamedTuple):
    messages: tuple[Message, ...]
    adapter: str | None


@dataclass(frozen=True)
class PromptForm:
    """
    What of a row is its prompt.

    Args:
        column: the column that is the prompt as it stands; None is what utils/rows.py finds.
        template: a text with columns in braces, `把'{text}'改写...`, in the place of `column`.
        adapters: the names that a row's column "adapter" may have; empty where rows have no choice.
    """

    column: str | None = None
    template: str | None = None
    adapters: Sequence[str] = ()

    def parse(self, raw: Any) -> PromptRow:
        """
        Raises:
            RowError: no prompt in it, a column of the template is missing, or no such adapter.
        """
        adapter = None
        if self.adapters:
            adapter = raw.get(ADAPTER) if isinstance(raw, dict) else None
            if adapter not in self.adapters:
                raise RowError(f'"{ADAPTER}" is {adapter!r}, not one of {", ".join(self.adapters)}')
        if self.column is None and self.template is None:
            return PromptRow(parse_prompt(raw).messages, adapter)
        if not isinstance(raw, dict):
            raise RowError(f"a row must be an object, not {type(raw).__name__}")
        text = _PLACE.sub(lambda place: _cell(raw, place[1]), self.template or f"{{{self.column}}}")
        if not text.strip():
            raise RowError("the prompt is blank")
        return PromptRow((Message("user", text),), adapter)

    def check_columns(self, columns: Sequence[str], path: str) -> "PromptForm":
        """
        The form for a table with these columns: of a table with one column that is the prompt.

        Raises:
            UsageError: a column is not there, or none can be taken for the prompt.
        """
        if self.template is None and self.column is None:
            names = [name for name in columns if name != ADAPTER]
            try:
                parse_prompt(dict.fromkeys(names, "x"))
            except RowError:
                if len(names) == 1:
                    return PromptForm(names[0], None, self.adapters)
                raise UsageError(
                    f"--input_path {path} has the columns {', '.join(names)}: say which is the prompt with "
                    "--prompt_column, or how they make one with --prompt_template"
                ) from None
            return self
        for name in _PLACE.findall(self.template or f"{{{self.column}}}"):
            if name not in columns:
                flag = "--prompt_template" if self.template else "--prompt_column"
                raise UsageError(f"{flag}: {path} has no column {name}, but {', '.join(columns)}")
        return self


def _cell(raw: dict[str, Any], column: str) -> str:
    if column not in raw:
        raise RowError(f'no column "{column}" among {sorted(map(str, raw))}')
    value = raw[column]
    return value if isinstance(value, str) else "" if value is None else str(value)


def read_requests(
    input_path: str,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatGLMTemplate,
    form: PromptForm = PromptForm(),
) -> list[Request]:
    """
    Raises:
        UsageError: no such file, no rows in it, or a table without the columns that `form` asks for.
    """
    requests = []
    for index, (place, row) in enumerate(_rows(input_path, form)):
        if isinstance(row, RowError):
            requests.append(Request(index, None, [], error=f"{place}: {row}"))
        else:
            input_ids = encode_prompt(tokenizer, row.messages, template)
            requests.append(Request(index, template.render(row.messages), input_ids, adapter=row.adapter))
    if not requests:
        raise UsageError(f"--input_path {input_path} has no rows")
    return requests


def _rows(path: str, form: PromptForm) -> Iterator[tuple[str, PromptRow | RowError]]:
    """(file:line, row)."""
    kind = Path(path).suffix.lower()
    if kind in SEPARATORS:
        yield from _table_rows(path, SEPARATORS[kind], form)
    elif kind == TEXT:
        plain = PromptForm("line", None, form.adapters) if form.template is None else form
        for number, line in enumerate(_read(path).splitlines(), start=1):
            if line.strip():
                yield f"{path}:{number}", _try(plain.parse, {"line": line})
    else:
        for _, number, row in read_rows(path, form.parse):
            yield f"{path}:{number}", row


def _table_rows(path: str, separator: str, form: PromptForm) -> Iterator[tuple[str, PromptRow | RowError]]:
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(io.StringIO(_read(path), newline=""), delimiter=separator)
    form = form.check_columns([name for name in reader.fieldnames or () if name], path)
    rows = iter(reader)
    while True:
        try:
            raw = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"{path}:{reader.line_num}", RowError(f"not CSV: {error}")
            continue
        place = f"{path}:{reader.line_num}"
        if None in raw:
            yield place, RowError(f"{len(raw[None])} cells more than columns")
        else:
            yield place, _try(form.parse, raw)


def _try(parse: Callable[[Any], PromptRow], raw: Any) -> PromptRow | RowError:
    try:
        return parse(raw)
    except RowError as error:
        return error


def _read(path: str) -> str:
    try:
        return decode_text(Path(path).read_bytes(), path)
    except OSError as error:
        raise UsageError(f"--input_path {path} cannot be read: {error.strerror}") from None
