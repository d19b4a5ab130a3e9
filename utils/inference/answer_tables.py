"""
Answers as a CSV or TSV table, written and read back.

Reading is for a finished output only: the same command, run again, takes the answers over and tries the rows with
errors again. Called by utils/inference/answer_writer.py. The csv module alone would write a text's CR without quotes,
and read numbers and lists back as text.
"""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from utils.inference.prompt_reader import MAX_CELL

TABLE_COLUMNS = ("index", "prompt", "answer", "finish_reason", "prompt_tokens", "answer_tokens")
JSON_COLUMNS = ("answers", "tool_calls")
NUMBER_COLUMNS = ("index", "prompt_tokens", "answer_tokens")


def answer_table_lines(answers: list[dict[str, Any]], separator: str) -> Iterator[str]:
    """Yield the header and one line an answer; lists and objects become JSON."""
    other_columns = {name for answer in answers for name in answer} - set(TABLE_COLUMNS)
    line = io.StringIO(newline="")
    # `csv` quotes a cell that has a character of the line's end: with "\n" alone, a text's CR would end its row.
    table = csv.DictWriter(line, [*TABLE_COLUMNS, *sorted(other_columns)], delimiter=separator, lineterminator="\r\n")
    header = {name: name for name in table.fieldnames}
    for cells in (header, *map(_cells_of_answer, answers)):
        table.writerow(cells)
        yield line.getvalue()[:-2] + "\n"
        line.seek(line.truncate(0))


def read_answer_table(data: bytes, separator: str) -> Iterator[dict[str, Any]]:
    """Yield the answers of a table of `answer_table_lines`; edited lines that are none are skipped."""
    csv.field_size_limit(MAX_CELL)
    rows = csv.DictReader(io.StringIO(data.decode(errors="replace"), newline=""), delimiter=separator)
    while True:
        try:
            yield _answer_of_cells(next(rows))
        except StopIteration:
            return
        except (csv.Error, ValueError, TypeError, RecursionError):
            continue


def _cells_of_answer(answer: dict[str, Any]) -> dict[str, Any]:
    return {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
        for name, value in answer.items()
    }


def _answer_of_cells(cells: dict[str | None, str]) -> dict[str, Any]:
    if None in cells:
        raise ValueError("more cells than columns")
    answer: dict[str, Any] = {}
    for name, cell in cells.items():
        if name in NUMBER_COLUMNS:
            answer[name] = int(cell) if cell else None
        elif name in JSON_COLUMNS:
            answer[name] = json.loads(cell) if cell else None
        else:
            answer[name] = cell
    # An empty cell of another column is a value that this answer does not have.
    return {
        name: value for name, value in answer.items() if value is not None and (value != "" or name in TABLE_COLUMNS)
    }
