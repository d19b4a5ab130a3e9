"""What batch inference says: what was resolved, what is odd about the request, and the command to type next."""

import json

import pytest
from conftest import TINY

SCRIPT = f"chatglm_milti_gpu_inference.py --model_name_or_path {TINY}"


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "你好", "target": "您好"}\n{"q": "?"}\n{"prompt": "谢谢", "target": "不客气"}\n')
    return path


def test_a_run_says_what_it_resolved_and_what_is_next(run_script, rows, tmp_path):
    command = f"{SCRIPT} --input_path {rows} --output_path {tmp_path}/o.jsonl --batch_size 4000"
    result = run_script(f"{command} --max_new_tokens 600").check()
    assert "\x1b" not in result.out and result.err == ""
    lines = [line.strip() for line in result.out.splitlines()]
    facts = dict(line.split("  ", 1) for line in lines if "  " in line)
    facts = {name: fact.strip() for name, fact in facts.items()}
    assert facts["model"].startswith(f"{TINY} (ChatGLM-6B, 6.5 MiB") and facts["template"] == "native (default)"
    assert facts["answers"] == "greedy; at most 600 new tokens" and "made for 512 tokens" in facts["note"]
    assert "3 rows, " in result.out and "1 of them cannot be used; the first:" in lines
    words = " ".join(result.out.replace("\\\n", "").split())  # long facts and commands may continue below
    assert f"{rows}:2: no known columns among q" in words
    assert facts["batch size"] == "2 (--batch_size 4000: no more rows are left)"
    assert "2 of 3 have an answer" in result.out
    scoring = f"python tools/evaluate.py --input_path {rows} --model_name_or_path {TINY}"
    assert f"next, score such answers beside the targets: {scoring} {{" in words
    assert json.loads(lines[-1])["errors"] == 1
    assert not any(len(line) > 100 for line in lines[:-1] if "/" not in line)

    again = run_script(f"{command} --temperature 0.5 --top_k 3 --max_new_tokens 1").check().out
    again = " ".join(again.split())
    assert f"{tmp_path}/o.jsonl has answers of another command (--max_new_tokens was 600 and is 1" in again
    assert "--temperature was 0.0 and is 0.5, --top_k was 0 and is 3" in again
    assert "sampled, temperature 0.5, top_k 3, seed 0; at most 1" in again and "note" not in again


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--columns response=target", "none of its 3 rows can be used; the first: "),
        ("--adapter_path nowhere", "--adapter_path nowhere does not exist"),
        ("--input_path tests", "tests is a directory"),
    ],
)
def test_what_cannot_be_served_is_said_before_the_model_loads(run_script, rows, tmp_path, flags, words):
    rows.write_text('{"target": 1}\n' * 3)
    result = run_script(f"{SCRIPT} --input_path {rows} --output_path {tmp_path}/o.jsonl {flags}")
    assert result.code == 2 and words in result.err and len(result.err.splitlines()) == 1
    assert "loaded in" not in result.out and not (tmp_path / "o.jsonl").exists()
