"""
Read a file of rows and encode each row's prompt.

In: --input_path (JSON Lines, JSON, CSV, TSV or text; single prompts or chats), a tokenizer, a template, and a
`PromptForm` that says which columns are the prompt. Out: one `PromptRow` a row; a row that cannot be used has an
error, so that numbers and counts agree with the file. Called by utils/inference/job.py. Tables are read by csv in
strict mode, not by pandas, which would guess types and encodings.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from utils.common.console import print_line
from utils.common.errors import RowError, UsageError
from utils.common.numbers import counted
from utils.data.encodings import decode_text
from utils.data.json_lines import BLANKS
from utils.data.row_parser import check_columns, parse_prompt, parse_question, read_rows
from utils.data.row_schema import NO_RENAMES, ColumnMap, find_schema
from utils.models.conversation import Conversation
from utils.models.templates import ChatTemplate

SEPARATORS = {".csv": ",", ".tsv": "\t"}
TEXT_SUFFIX = ".txt"  # a prompt a line
ADAPTER_COLUMN = "adapter"  # names the adapter of a row, if there are several
BASE_NAME = "base"  # its value for the base model without an adapter
MAX_CELL = 1 << 30  # characters; the csv module's own limit, 131,072, is below a long chat
_LINE_END = re.compile(r"\r\n|\n|\r")  # not str.splitlines, which also ends lines inside a prompt (U+2028, form feed)
_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class PromptRow:
    """A row's prompt as text and tokens, or its error."""

    index: int
    prompt: str | None
    input_ids: list[int]
    error: str | None = None
    adapter: str | None = None  # name of the row's adapter, or BASE_NAME; None if rows have no choice
    tools: str = ""  # JSON text of the tools that the answer may call


@dataclass(frozen=True)
class Prompts:
    """The rows of --input_path as prompts, and the tokenizer and template that made them."""

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    template_reason: str  # why this template, for the header
    rows: list[PromptRow]


class ParsedPrompt(NamedTuple):
    """A row's prompt before it is encoded, and the adapter it names."""

    conversation: Conversation
    adapter: str | None


@dataclass(frozen=True)
class PromptForm:
    """
    How a row becomes a prompt.

    A row's system text, tools and history come before the prompt, unless the template contains them.

    Args:
        column: the column that is the whole prompt; None: utils/data/row_parser.py finds the prompt.
        template: a text with column names in braces, `把'{text}'改写...`, instead of `column`.
        adapters: the values that a row's ADAPTER_COLUMN may have; empty: rows have no choice.
        columns: other columns for the roles that utils/data/row_parser.py knows.
    """

    column: str | None = None
    template: str | None = None
    adapters: Sequence[str] = ()
    columns: ColumnMap = NO_RENAMES

    def parse(self, raw: Any) -> ParsedPrompt:
        """
        Return the prompt of a row.

        Raises:
            RowError: it has no prompt, lacks a column of the template, or names no known adapter.
        """
        adapter = None
        if self.adapters:
            adapter = raw.get(ADAPTER_COLUMN) if isinstance(raw, dict) else None
            if adapter not in self.adapters:
                raise RowError(f'"{ADAPTER_COLUMN}" is {adapter!r}, not one of {", ".join(self.adapters)}')
        if self.column is None and self.template is None:
            return ParsedPrompt(parse_prompt(raw, self.columns), adapter)
        if not isinstance(raw, dict):
            raise RowError(f"a row must be an object, not {type(raw).__name__}")
        text = _PLACEHOLDER.sub(lambda match: _cell(raw, match[1]), self._text)
        used_columns = _PLACEHOLDER.findall(self._text)
        return ParsedPrompt(parse_question(self.columns.rename(raw), text, used_columns), adapter)

    @property
    def _text(self) -> str:
        return self.template or f"{{{self.column}}}"

    def check_columns(self, columns: Sequence[str], path: str) -> "PromptForm":
        """
        Return the form for a table with these columns.

        The only column of a table is its prompt, and a printed line says so.

        Raises:
            UsageError: a column is missing, or no column is known as a prompt.
        """
        self.columns.check(columns, path)
        names = [name for name in columns if name != ADAPTER_COLUMN]
        if self.template is None and self.column is None:
            try:
                find_schema(tuple(self.columns.rename(dict.fromkeys(names))))
            except RowError:
                if len(names) == 1:
                    print_line(f"{path}: its only column, {names[0]}, is the prompt")
                    return replace(self, column=names[0])
                raise UsageError(
                    f"--input_path {path} has the columns {', '.join(names)}: name the prompt with --prompt_column "
                    "or --columns prompt=NAME, or build it from columns with --prompt_template"
                ) from None
            return self
        for name in _PLACEHOLDER.findall(self._text):
            if name not in columns:
                flag = "--prompt_template" if self.template else "--prompt_column"
                raise UsageError(f"{flag}: {path} has no column {name}, but {', '.join(columns)}")
        return self


def _cell(raw: dict[str, Any], column: str) -> str:
    if column not in raw:
        raise RowError(f'no column "{column}" among {sorted(map(str, raw))}')
    value = raw[column]
    return value if isinstance(value, str) else "" if value is None else str(value)


def read_prompt_rows(
    input_path: str,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    form: PromptForm = PromptForm(),
) -> list[PromptRow]:
    """
    Read and encodes every row of a file, in its order.

    Raises:
        UsageError: no such file, no rows in it, or a table without the columns that `form` needs.
    """
    prompts = []
    for index, (source, row) in enumerate(_rows(input_path, form)):
        if isinstance(row, RowError):
            prompts.append(PromptRow(index, None, [], error=f"{source}: {row}"))
        else:
            try:
                prompts.append(encode_row(index, row, tokenizer, template))
            except ValueError as error:
                prompts.append(PromptRow(index, None, [], error=f"{source}: {error}"))
    if not prompts:
        raise UsageError(f"--input_path {input_path} has no rows")
    return prompts


def encode_row(index: int, row: ParsedPrompt, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> PromptRow:
    """
    Return a row's prompt as tokens.

    Raises:
        ValueError: the template has no form of something in the row.
    """
    prompt = row.conversation
    template.check_expressible(prompt)
    ids = template.encoded_prompt(tokenizer, prompt).ids()
    return PromptRow(index, template.render(prompt), ids, adapter=row.adapter, tools=prompt.callable_tools)


def _rows(path: str, form: PromptForm) -> Iterator[tuple[str, ParsedPrompt | RowError]]:
    """Yield ("file:line", prompt or the error that says why there is none)."""
    suffix = Path(path).suffix.lower()
    if suffix in SEPARATORS:
        yield from _table_rows(path, SEPARATORS[suffix], form)
    elif suffix == TEXT_SUFFIX:
        form.columns.check(["line"], path)
        line_form = replace(form, column="line") if form.template is None else form
        for number, line in enumerate(_LINE_END.split(_read_text(path)), start=1):
            if line.strip():
                yield f"{path}:{number}", _parse(line_form, {"line": line.removeprefix("\ufeff")})
    else:
        check_columns(form.columns, [path])
        for _, number, row in read_rows(path, form.parse):
            yield f"{path}:{number}", row


def _table_rows(path: str, separator: str, form: PromptForm) -> Iterator[tuple[str, ParsedPrompt | RowError]]:
    """
    Raises:
        UsageError: a quote is not closed or in a wrong place, or the header is empty or names a column twice.
    """
    records = _records(path, separator)
    _, header = next(records, (1, []))
    header = [name.strip(BLANKS) for name in header]
    names = [name for name in header if name]  # pandas writes its index as a column without a name
    if not names:
        what = "no names of columns in its first line" if Path(path).stat().st_size else "it is empty"
        raise UsageError(f"--input_path {path}: {what}")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"--input_path {path}: several columns are named {', '.join(repeated)}: rename them")
    form = form.check_columns(names, path)
    for number, cells in records:
        if len(cells) != len(header):
            yield f"{path}:{number}", RowError(f"{counted(len(cells), 'cell')}, but {counted(len(header), 'column')}")
        else:
            raw = {name: cell for name, cell in zip(header, cells, strict=True) if name}
            yield f"{path}:{number}", _parse(form, raw)


def _records(path: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its first line, cells) of each record that is not blank."""
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=separator, strict=True)
    while True:
        first_line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            detail = "" if "end of data" in str(error) else f" ({error}, in line {reader.line_num})"
            raise UsageError(
                f'--input_path {path}:{first_line}: a quote (") that opens a cell in this row is not closed before a '
                f"separator{detail}: close it, and write a quote inside a cell twice"
            ) from None
        if cells:
            yield first_line, cells


def _parse(form: PromptForm, raw: dict[str, Any]) -> ParsedPrompt | RowError:
    try:
        return form.parse(raw)
    except RowError as error:
        return error


def _read_text(path: str) -> str:
    try:
        return decode_text(Path(path).read_bytes(), path)
    except OSError as error:
        raise UsageError(f"--input_path {path} cannot be read: {error.strerror}") from None
