"""What the data scripts say of their input, of what they wrote, and of the command to type next."""

import gzip
import json

from conftest import TINY

from utils.data.input_facts import describe_inputs
from utils.data.row_schema import ColumnMap


def test_files_are_described_by_their_first_block(tmp_path):
    row = {"instruction": "问题一二三四五六", "input": "", "output": "答"}
    line = json.dumps(row, ensure_ascii=False)
    contents = {
        "plain": (line.encode(), "UTF-8, instruction + input -> output"),
        "array": (f"[{line}]".encode("gb18030"), "GB18030, instruction + input -> output"),
        "packed": (gzip.compress(line.encode()), "gzip, UTF-8, instruction + input -> output"),
        "chat": (
            b'\n{"system": "s", "messages": [{"role": "user", "content": "a"}]}\n' * 2,
            "UTF-8, system + messages",
        ),
        "empty": (b"", "0 bytes: it has no rows"),
        "numbers": (b"1\n2\n", "no row that can be read"),
        "others": (b'{"q": "?", "a": "!"}', "no known column among q, a"),
    }
    for name, (data, words) in contents.items():
        (tmp_path / name).write_bytes(data)
        assert words in describe_inputs([str(tmp_path / name)]), name
    mapped = describe_inputs([str(tmp_path / "others")], ColumnMap.parse("prompt=q,response=a"))
    assert mapped.endswith("q -> a)")
    lines = describe_inputs([str(tmp_path / name) for name in contents]).splitlines()
    assert len(lines) == 5 and lines[-1].startswith("and 3 more files (")


def next_command(result, purpose):
    lines = result.check().out.splitlines()
    assert json.loads(lines[-1]) and not any(len(line) > 100 for line in lines if "/" not in line and "{" not in line)
    assert "\x1b" not in result.out
    following = "\n".join(lines[lines.index(f"next, {purpose}:") + 1 :]).replace("\\\n", "")  # as a shell joins lines
    return " ".join(following.splitlines()[0].split()).removeprefix("python ")


def test_each_step_names_the_next_one(run_script, tmp_path):
    (tmp_path / "my rows").mkdir()
    rows = [{"instruction": f"问{number}", "output": "答" * (1 + 30 * (number > 3))} for number in range(8)]
    (tmp_path / "my rows" / "in.json").write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    process = "process_belle_1M_data.py --input 'my rows/in.json' --output 'my rows/out.json' --dedup exact --shuffle"
    result = run_script(process, cwd=tmp_path)
    command = next_command(result, "tokenise them")
    assert "read 9 = written 8 + rejected 0 + skipped 1 (1 duplicates)" in result.out
    assert "my rows/out.json (8 rows, " in result.out and "my rows/in.json (" in result.out
    flags = f"--model_name_or_path {TINY} --max_seq_length 20 --skip_overlength"
    result = run_script(f"{command} {flags}", cwd=tmp_path)
    training = next_command(result, "train on it")
    assert f"--dataset_path 'my rows/out.tokens' --model_name_or_path {TINY}" in training
    assert f"{TINY} (ChatGLM-6B)" in result.out and "longer rows are skipped" in result.out
    assert "4 of 8 rows (50 %) are longer than --max_seq_length 20 and were left out" in " ".join(result.out.split())


def test_files_without_rows(run_script, tmp_path):
    (tmp_path / "empty.json").touch()
    process = f"process_belle_1M_data.py --input {tmp_path}/empty.json --output {tmp_path}/out.json"
    tokenize = f"tokenize_dataset_rows_belle.py --jsonl_path {tmp_path}/empty.json --save_path {tmp_path}/tokens"
    for command in (process, f"{tokenize} --model_name_or_path {TINY}"):
        result = run_script(command)
        assert result.code == 1 and "empty.json (0 bytes: it has no rows)" in result.words
        assert "has no rows" in result.err and len(result.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty.json"]
