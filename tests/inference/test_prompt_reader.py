"""What becomes of a file of prompts without a model: lines, tables, cells, and what is refused."""

import json

import pytest
from conftest import TINY

from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.errors import UsageError
from utils.data.row_schema import ColumnMap
from utils.inference.prompt_reader import PromptForm, read_prompt_rows
from utils.models.templates import template_for


@pytest.fixture(scope="module")
def read():
    """read(file, form) -> its rows."""
    tokenizer = load_tokenizer(str(TINY))
    return lambda file, *form: read_prompt_rows(str(file), tokenizer, template_for(tokenizer), *form)


def test_a_line_of_text_ends_at_its_newline_alone(read, tmp_path):
    text = "a\u2028b\u2029c\x85d\x0ce\x0bf\x1cg\x1dh\x1ei"
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "rows.txt").write_bytes(f"\ufeff{text}{end}{end}二{end}".encode())
        assert [row.prompt for row in read(tmp_path / "rows.txt")] == [text, "二"]
    with pytest.raises(UsageError, match="rows.txt has no column q, but line"):
        read(tmp_path / "rows.txt", PromptForm(columns=ColumnMap.parse("prompt=q")))
    (tmp_path / "rows.csv").write_text(f"prompt\r{text}\r二\r", newline="")
    assert [row.prompt for row in read(tmp_path / "rows.csv")] == [text, "二"]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": text}, ensure_ascii=False) + "\r\n", newline="")
    assert [row.prompt for row in read(tmp_path / "rows.jsonl")] == [text]


@pytest.mark.parametrize(
    "table, words",
    [
        ('prompt,id\n一,1\n"二,2\n三,3\n四,4\n', r":3: a quote \(\"\) .* is not closed"),
        ('prompt,id\n一,1\n"二,2\n三,3\n"四",4\n', r":3: a quote .* line 5"),
        ('prompt,id\n"一"说,1\n', r":2: a quote .* is not closed before a separator"),
        ('"prompt,id\n一,1\n', ":1: a quote"),
        ("prompt,prompt\n一,1\n", "several columns are named prompt"),
        (",,\n一,1,2\n", "no names of columns"),
        ("", "it is empty"),
        ("prompt,id\n", "has no rows"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_table_that_is_none_is_refused(read, tmp_path, table, words, kind):
    (tmp_path / f"rows.{kind}").write_text(table.replace(",", "\t") if kind == "tsv" else table)
    with pytest.raises(UsageError, match=words):
        read(tmp_path / f"rows.{kind}")


def test_cells_of_a_table(read, tmp_path):
    """A quote inside a cell stays; blank lines are skipped; a row with a cell too few or too many is an error."""
    table = '\n,prompt , id\n0,他说"好",1\n\n1,"a ""b""\r\nc",2\n2,d\n3,e,5,6\n'
    (tmp_path / "rows.csv").write_text(table, newline="")
    good, quoted, fewer, more = read(tmp_path / "rows.csv")
    assert (good.prompt, quoted.prompt) == ('他说"好"', 'a "b"\r\nc')
    assert fewer.error.endswith("rows.csv:7: 2 cells, but 3 columns")
    assert more.error.endswith("rows.csv:8: 4 cells, but 3 columns")
