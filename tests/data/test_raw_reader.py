"""Raw files of every schema and encoding become rows; what cannot be read is reported with its line."""

import gzip
import json
import subprocess
import sys

import pytest

from utils.common.errors import RowError, UsageError
from utils.data.raw_reader import BLOCK_BYTES, input_paths, read_blocks, read_json_rows
from utils.data.row_parser import parse_prompt, parse_row, read_rows
from utils.models.conversation import Message

ROWS = [
    {"instruction": f"请写出第{number}句关于春天的诗，\n要押韵。", "input": "", "output": f"春风又绿江南岸\t{number}"}
    for number in range(20)
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
ARRAY = json.dumps(ROWS, ensure_ascii=False, indent=2)


def turns(row):
    return [message.content for message in row.messages]


def sort_out(numbered):
    """(line, value) pairs -> the values, and the errors with their lines."""
    numbered = list(numbered)
    return [value for _, value in numbered if not isinstance(value, RowError)], [
        (line, str(value)) for line, value in numbered if isinstance(value, RowError)
    ]


def read(tmp_path, data, block_bytes=BLOCK_BYTES):
    (tmp_path / "rows").write_bytes(data)
    return sort_out(read_json_rows(tmp_path / "rows", block_bytes))


@pytest.mark.parametrize(
    "raw, expected",
    [
        ({"instruction": "Human: 你好\nAssistant: 你好！\nHuman: 再见\nAssistant:", "output": "再见！"}, 4),
        ({"instruction": "Human：你好\n\nAssistant：", "input": "", "output": "你好！"}, 2),
        ({"id": "1", "conversations": [{"from": "human", "value": "问"}, {"from": "assistant", "value": "答"}]}, 2),
        ({"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}, 2),
        ({"messages": [{"role": role, "content": role} for role in ("system", "user", "assistant")]}, 3),
    ],
)
def test_conversations(raw, expected):
    assert len(parse_row(raw).messages) == expected
    assert parse_prompt(raw).messages == parse_row(raw).messages[:-1]


def test_tags_are_turns_only_in_the_form_of_the_multi_turn_file():
    text = "Human: 你好\nAssistant: 你好！\nHuman: 1+1=?\n\nAssistant:"
    assert turns(parse_row({"instruction": text, "output": "2"})) == ["你好", "你好！", "1+1=?", "2"]
    for plain in ("Human: 和 Assistant: 是什么意思？", "解释\nHuman: a\nAssistant:", "Human: a\nAssistant: b"):
        assert turns(parse_row({"instruction": plain, "output": "b"})) == [plain, "b"]
    with pytest.raises(RowError, match="alternate"):
        parse_row({"instruction": "Human: a\nHuman: b\nAssistant:", "output": "c"})


def test_system_text_is_the_first_message():
    chat = [{"role": "system", "content": "说短些"}, {"role": "user", "content": "你好"}]
    assert parse_prompt({"messages": chat}).messages == (Message("system", "说短些"), Message("user", "你好"))
    for bad, reason in (([chat[1], chat[0]], "at the start"), (chat[:1], "only a system message")):
        with pytest.raises(RowError, match=reason):
            parse_prompt({"messages": bad})


def test_a_seed_task_is_a_row_an_instance(tmp_path):
    tasks = [
        {"instruction": "翻译", "instances": [{"input": "猫", "output": "cat"}, {"input": "", "output": "?"}]},
        {"instruction": "空", "instances": []},
        {"instruction": "半", "instances": [{"input": "a", "output": ""}, {"input": "b", "output": "c"}]},
    ]
    (tmp_path / "seed").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    rows = list(read_rows(str(tmp_path / "seed"), parse_row))
    assert [line for _, line, _ in rows] == [1, 1, 2, 3, 3]
    assert [turns(row) for _, _, row in rows[:2]] == [["翻译\n猫", "cat"], ["翻译", "?"]]
    assert [isinstance(row, RowError) for _, _, row in rows] == [False, False, True, True, False]


@pytest.mark.parametrize(
    "data",
    [
        LINES.encode(),
        b"\xef\xbb\xbf" + LINES.encode(),
        LINES.replace("\n", "\r\n").encode(),
        LINES.replace("\n", "").encode(),
        LINES.encode("gb18030"),
        gzip.compress(LINES.encode()),
        gzip.compress(LINES.encode("gb18030")),
        ARRAY.encode(),
        ARRAY.replace("\n", "\r\n").encode("gb18030"),
        json.dumps(ROWS).encode(),
        json.dumps(ROWS, ensure_ascii=False).encode("gb18030"),
        "".join(str(row) + "\n" for row in ROWS).encode(),
        "".join(str(row) if number % 3 else json.dumps(row) for number, row in enumerate(ROWS)).encode(),
        b"".join(line.encode("gb18030" if i % 3 else "utf-8") for i, line in enumerate(LINES.splitlines(True))),
        b"".join(line.encode("gb18030" if i > 14 else "utf-8") for i, line in enumerate(LINES.splitlines(True))),
        "".join(json.dumps(ROWS[i : i + 5], ensure_ascii=False, indent=1) for i in range(0, 20, 5)).encode(),
        (json.dumps(ROWS[:10], indent=1) + "\n" + "".join(map(json.dumps, ROWS[10:]))).encode(),
    ],
)
@pytest.mark.parametrize("block_bytes", [600, BLOCK_BYTES])
def test_every_encoding_gives_the_same_rows(tmp_path, data, block_bytes):
    assert read(tmp_path, data, block_bytes) == (ROWS, [])


def test_quotes_and_escapes_of_python_dicts(tmp_path):
    rows = [{"input": "a \"b\" 'c' {d", "target": "it's\n\\"}, {"input": "x", "target": None}]
    assert read(tmp_path, "".join(map(str, rows)).encode()) == (rows, [])
    hostile = ["{'input': __import__('os').getcwd()}", "{'a': " * 5000, "{'a': [1, 2}", "{'a': {[]: 1}}", "{'a', 'b'}"]
    good, bad = read(tmp_path, "\n".join(hostile).encode())
    assert good == [] and [line for line, _ in bad] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"input": "\\ud83d", "target": "x"}', "cannot be written"),
        ("[" * 50000, "nested too deeply"),
        ('{"input": ' + "9" * 5000 + "}", "digits"),
        ('{"input": "a", "target": "b"', "not JSON"),
        ("rubbish", "not JSON"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path, line, reason):
    good, bad = read(tmp_path, f"{json.dumps(ROWS[0])}\n{line}\n{json.dumps(ROWS[1])}\n".encode())
    assert good == ROWS[:2] and len(bad) == 1
    assert bad[0][0] == 2 and reason in bad[0][1]


def test_a_utf8_line_with_a_lost_byte_is_not_taken_for_gb18030(tmp_path):
    lines = LINES.encode().splitlines(keepends=True)
    lines[4] = lines[4].replace("春".encode(), "春".encode()[:2], 1)
    good, bad = read(tmp_path, b"".join(lines))
    assert good == ROWS[:4] + ROWS[5:] and bad == [(5, "bytes that are not UTF-8")]
    good, bad = read(tmp_path, '{"input": "你", "target": "a"}'.encode().replace(b"\xa0", b""))
    assert not good and len(bad) == 1


def test_a_broken_element_costs_no_other(tmp_path):
    for text in (ARRAY, json.dumps(ROWS, ensure_ascii=False)):
        data = text.encode()
        for lost in ('"output": "春风又绿江南岸\\t7"', "第7句", '7句关于春天的诗，\\n要押韵。", "input'):
            at = data.find(lost.encode())
            if at >= 0:
                good, bad = read(tmp_path, data[: at + 3] + data[at + 3 + len(lost.encode()) // 2 :])
                assert [row for row in ROWS if row not in good] in ([ROWS[7]], []) and len(bad) <= 1
                assert len(good) + len(bad) == 20
    good, bad = read(tmp_path, ARRAY.encode()[:-200])
    assert good == ROWS[: len(good)] and 17 <= len(good) < 20 and bad and "JSON" in bad[0][1]
    good, bad = read(tmp_path, ARRAY.encode()[:-1])
    assert good == ROWS and "no end" in bad[0][1]


def test_a_cut_gzip_file_gives_what_it_still_holds(tmp_path):
    data = gzip.compress("".join(json.dumps({"n": i, "x": str(i**40)}) + "\n" for i in range(3000)).encode())
    good, bad = read(tmp_path, data[: len(data) // 2])
    assert 1000 < len(good) < 2000 and [row["n"] for row in good] == list(range(len(good)))
    assert "breaks off" in bad[-1][1] and len(bad) <= 2


def test_endless_lines_and_other_files_are_reported(tmp_path):
    (tmp_path / "endless").write_bytes(b"x" * 9000 + b"\n" + LINES.encode())
    blocks = read_blocks(str(tmp_path / "endless"), block_bytes=1000, longest_line=5000)
    good, bad = sort_out(pair for block in blocks for pair in block.values())
    assert good == ROWS and bad == [(1, "a line longer than 0 MiB")]
    assert read(tmp_path, b"") == ([], [])
    assert read(tmp_path, b"[]") == ([], [])


def test_several_files_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b1.json", "b0.json", "a.json"):
        (tmp_path / name).write_text(json.dumps({"input": name, "target": "x"}))
    paths = input_paths(["b*.json", "a.json", "b0.json"])
    assert paths == ["b0.json", "b1.json", "a.json"]
    assert [turns(row)[0] for _, _, row in read_rows(paths, parse_row)] == paths
    with pytest.raises(UsageError, match=r"c\*.json is not a file, and no file matches it"):
        input_paths(["c*.json"])


@pytest.mark.parametrize(
    "name, encoding", [("a.csv", "utf-8"), ("行 'b'.csv", "gb18030"), ("c.TSV", "utf-8-sig"), ("d.xlsx", None)]
)
def test_a_table_is_refused_with_the_command_that_converts_it(tmp_path, monkeypatch, name, encoding):
    monkeypatch.chdir(tmp_path)
    separator = "\t" if name.endswith("TSV") else ","
    cells = [["问题", "编号"], ["先说时间:\n老王在喝茶", "007"]]
    text = "\n".join(separator.join(f'"{cell}"' for cell in row) for row in cells)
    (tmp_path / name).write_bytes(text.encode(encoding) if encoding else b"PK\x03\x04")
    with pytest.raises(UsageError, match="is a table, and rows are JSON") as refused:
        input_paths([name])
    if not encoding:
        assert "save it as d.csv" in str(refused.value)
        return
    command, output = str(refused.value).partition("convert it with ")[2].rsplit(" and give ", 1)
    subprocess.run(["bash", "-c", command.replace("python", sys.executable, 1)], check=True)
    assert input_paths([output]) == [output]
    assert [value for _, value in read_json_rows(output)] == [dict(zip(*cells, strict=True))]


def test_json_rows_in_a_file_named_like_a_table_are_read(tmp_path):
    (tmp_path / "rows.csv").write_text(LINES, encoding="utf-8")
    assert input_paths([str(tmp_path / "rows.csv")]) == [str(tmp_path / "rows.csv")]
