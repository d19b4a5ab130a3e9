"""A file of prompts -> requests: JSON Lines, JSON, CSV or text, single prompts and chats."""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from utils.common.errors import RowError, UsageError
from utils.common.processes import print_once
from utils.data.encodings import decode_text
from utils.data.json_lines import BLANKS
from utils.data.row_parser import check_columns, parse_prompt, parse_question, read_rows
from utils.data.row_schema import NO_RENAMES, ColumnMap, find_schema
from utils.models.conversation import Message
from utils.models.templates import ChatTemplate, encode_prompt

SEPARATORS = {".csv": ",", ".tsv": "\t"}
TEXT = ".txt"  # a prompt a line
ADAPTER = "adapter"  # the column that names one of several
BASE = "base"  # its value for none
_LINE_END = re.compile(r"\r\n|\n|\r")
_PLACE = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class PromptRow:
    """One input row: its prompt as text and tokens, or why it has none."""

    index: int
    prompt: str | None
    input_ids: list[int]
    error: str | None = None
    adapter: str | None = None  # the name of one of several


class ParsedPrompt(NamedTuple):
    messages: tuple[Message, ...]
    adapter: str | None


@dataclass(frozen=True)
class PromptForm:
    """
    What of a row is its prompt.

    Args:
        column: the column that is the prompt as it stands; None is what utils/data/row_parser.py finds.
        template: a text with columns in braces, `把'{text}'改写...`, in the place of `column`.
        adapters: the names that a row's column "adapter" may have; empty where rows have no choice.
        columns: those that utils/data/row_parser.py takes in place of the ones it knows.

    A row's system text and history stand before its prompt in every form, unless a template has them.
    """

    column: str | None = None
    template: str | None = None
    adapters: Sequence[str] = ()
    columns: ColumnMap = NO_RENAMES

    def parse(self, raw: Any) -> ParsedPrompt:
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
            return ParsedPrompt(parse_prompt(raw, self.columns).messages, adapter)
        if not isinstance(raw, dict):
            raise RowError(f"a row must be an object, not {type(raw).__name__}")
        text = _PLACE.sub(lambda place: _cell(raw, place[1]), self._text)
        return ParsedPrompt(
            parse_question(self.columns.rename(raw), text, _PLACE.findall(self._text)).messages, adapter
        )

    @property
    def _text(self) -> str:
        return self.template or f"{{{self.column}}}"

    def check_columns(self, columns: Sequence[str], path: str) -> "PromptForm":
        """
        The form for a table with these columns: of a table with one column that is the prompt, which is said.

        Raises:
            UsageError: a column is not there, or none can be taken for the prompt.
        """
        self.columns.check(columns, path)
        names = [name for name in columns if name != ADAPTER]
        if self.template is None and self.column is None:
            try:
                find_schema(tuple(self.columns.rename(dict.fromkeys(names))))
            except RowError:
                if len(names) == 1:
                    print_once(f"{path}: its one column, {names[0]}, is the prompt")
                    return replace(self, column=names[0])
                raise UsageError(
                    f"--input_path {path} has the columns {', '.join(names)}: say which is the prompt with "
                    "--prompt_column or --columns prompt=NAME, or how they make one with --prompt_template"
                ) from None
            return self
        for name in _PLACE.findall(self._text):
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
    template: ChatTemplate,
    form: PromptForm = PromptForm(),
) -> list[PromptRow]:
    """
    Raises:
        UsageError: no such file, no rows in it, or a table without the columns that `form` asks for.
    """
    requests = []
    for index, (place, row) in enumerate(_rows(input_path, form)):
        if isinstance(row, RowError):
            requests.append(PromptRow(index, None, [], error=f"{place}: {row}"))
        else:
            input_ids = encode_prompt(tokenizer, row.messages, template)
            requests.append(PromptRow(index, template.render(row.messages), input_ids, adapter=row.adapter))
    if not requests:
        raise UsageError(f"--input_path {input_path} has no rows")
    return requests


def _rows(path: str, form: PromptForm) -> Iterator[tuple[str, ParsedPrompt | RowError]]:
    """(file:line, row)."""
    kind = Path(path).suffix.lower()
    if kind in SEPARATORS:
        yield from _table_rows(path, SEPARATORS[kind], form)
    elif kind == TEXT:
        form.columns.check(["line"], path)
        plain = replace(form, column="line") if form.template is None else form
        for number, line in enumerate(_LINE_END.split(_read(path)), start=1):
            if line.strip():
                yield f"{path}:{number}", _try(plain.parse, {"line": line.removeprefix("\ufeff")})
    else:
        check_columns(form.columns, [path])
        for _, number, row in read_rows(path, form.parse):
            yield f"{path}:{number}", row


def _table_rows(path: str, separator: str, form: PromptForm) -> Iterator[tuple[str, ParsedPrompt | RowError]]:
    """
    Raises:
        UsageError: a quote is not closed or stands where none can, or the header is empty or names a column twice.
    """
    lines = _records(path, separator)
    _, header = next(lines, (1, []))
    header = [name.strip(BLANKS) for name in header]
    names = [name for name in header if name]  # pandas writes its index without one
    if not names:
        raise UsageError(f"--input_path {path}: no names of columns in its first line")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"--input_path {path}: several columns are named {', '.join(repeated)}: rename them")
    form = form.check_columns(names, path)
    for number, cells in lines:
        if len(cells) != len(header):
            yield f"{path}:{number}", RowError(f"{len(cells)} cells, but {len(header)} columns")
        else:
            raw = {name: cell for name, cell in zip(header, cells, strict=True) if name}
            yield f"{path}:{number}", _try(form.parse, raw)


def _records(path: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, cells) of each record that is not blank."""
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(_read(path), newline=""), delimiter=separator, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            closed = "" if "end of data" in str(error) else f" ({error}, in line {reader.line_num})"
            raise UsageError(
                f'--input_path {path}:{first}: a quote (") that opens a cell in this row is not closed before a '
                f"separator{closed}: close it, and write a quote inside a cell twice"
            ) from None
        if cells:
            yield first, cells


def _try(parse: Callable[[Any], ParsedPrompt], raw: Any) -> ParsedPrompt | RowError:
    try:
        return parse(raw)
    except RowError as error:
        return error


def _read(path: str) -> str:
    try:
        return decode_text(Path(path).read_bytes(), path)
    except OSError as error:
        raise UsageError(f"--input_path {path} cannot be read: {error.strerror}") from None
