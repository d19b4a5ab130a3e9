"""The data scripts killed at any moment, on a full disk, or without input lose, double or halve no row."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import kill_data_scripts
import pytest
from conftest import ROOT, TINY

from utils.data import raw_reader


def test_killed_at_any_moment(tmp_path):
    """One kill for each script; tests/faults/kill_data_scripts.py makes more."""
    kills = kill_data_scripts.torture(tmp_path, kills=2, seed=1)
    assert sum(kills.values()) == 2 == len(kills)


def write_rows(path):
    lines = [json.dumps({"input": f"问题{i}" * 20, "target": "答" * 100}) + "\n" for i in range(4000)]
    path.write_text("".join(lines))


@pytest.mark.parametrize("flags", ("", "--shuffle", "--dedup near", "--split 0.5,0.5"))
def test_a_full_disk(run_script, small_disk, tmp_path, flags):
    write_rows(tmp_path / "rows")
    output = small_disk / "out.json"
    output.write_text("before")
    result = run_script(f"process_belle_1M_data.py --input {tmp_path}/rows --output {output} {flags}")
    assert result.code == 1 and "No space left on device: free some space" in result.err, result.err
    assert "Traceback" not in result.err and output.read_text() == "before"
    assert [path.name for path in small_disk.iterdir()] == ["out.json"]


def test_a_full_disk_in_tokenising(run_script, small_disk, tmp_path):
    write_rows(tmp_path / "rows")
    command = f"tokenize_dataset_rows_belle.py --jsonl_path {tmp_path}/rows --model_name_or_path {TINY} --num_proc 1"
    result = run_script(f"{command} --save_path {small_disk}/tokens")
    assert result.code == 1 and "No space left on device" in result.err and "Traceback" not in result.err, result.err
    assert not (small_disk / "tokens").exists()


@pytest.mark.parametrize("free_pages, unanswered", [(2, "some"), (5, "none")])
def test_a_full_disk_in_inference(run_script, small_disk, tmp_path, free_pages, unanswered):
    """Full in the journal, or when all is answered, in the output: no answer is computed again."""
    rows = [{"prompt": f"你好{number}" * 4} for number in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = (
        f"chatglm_milti_gpu_inference.py --model_name_or_path {TINY} --input_path {tmp_path}/rows.jsonl "
        "--max_new_tokens 8 --batch_size 4 --output_path"
    )
    run_script(f"{command} {tmp_path}/whole.jsonl").check()
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - free_pages * 4096)
    result = run_script(f"{command} {small_disk}/out.jsonl")
    assert result.code == 1 and "No space left on device: free some space" in result.err, result.err
    assert "Traceback" not in result.err and not (small_disk / "out.jsonl").exists()
    filler.unlink()
    summary = json.loads(run_script(f"{command} {small_disk}/out.jsonl").check().out.splitlines()[-1])
    assert (0 < summary["answered_before"] < 60) if unanswered == "some" else summary["answered_before"] == 60
    assert (small_disk / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_an_output_that_cannot_be_written(run_script, tmp_path):
    source = ROOT / "data" / "sample.train.json"
    (tmp_path / "file").write_text("")
    for command in (
        f"process_belle_1M_data.py --input {source} --output {tmp_path}/file/out.json",
        f"tokenize_dataset_rows_belle.py --jsonl_path {source} --save_path {tmp_path}/file/out "
        f"--model_name_or_path {TINY}",
    ):
        result = run_script(command)
        assert result.code == 2 and "cannot be written: " in result.err, result.err


def harmful_outputs(directory):
    """Names under `directory` that are its input rows.json, or something that a finished file may not replace."""
    (directory / "sub").mkdir()
    (directory / "link.json").symlink_to("rows.json")
    os.link(directory / "rows.json", directory / "hard.json")
    os.mkfifo(directory / "pipe")
    (directory / "null").symlink_to("/dev/null")
    inputs = ("rows.json", "./rows.json", "sub/../rows.json", "link.json", "hard.json")
    return [(name, "is an input") for name in inputs] + [
        *((name, "is a device or a pipe") for name in ("pipe", "null", "/dev/null", "/dev/stdout", "/proc/self/fd/2")),
        *((name, "is a directory") for name in ("sub", "sub/", "new/", ".")),
        ("rows.json/out.json", "is not a directory"),
    ]


def test_an_output_replaces_no_input_and_no_device(run_script, tmp_path):
    content = '{"input": "问", "target": "答"}\n{"input": "bad"}\n'
    (tmp_path / "rows.json").write_text(content)
    names = harmful_outputs(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    for name, words in names:
        result = run_script(f"process_belle_1M_data.py --input rows.json --output {name}", cwd=tmp_path)
        assert result.code == 2 and words in result.err and len(result.err.splitlines()) == 1, (name, result.err)
    # one of several inputs, one of a split, and the list of rejected rows
    (tmp_path / "rows.valid.json").write_text(content)
    os.link(tmp_path / "rows.json", tmp_path / "new.json.rejected.jsonl")
    for flags in ("--output ./rows.valid.json", "--output rows.json --split 0.5,0.5", "--output new.json"):
        result = run_script(f"process_belle_1M_data.py --input 'rows*.json' {flags}", cwd=tmp_path)
        assert result.code == 2 and "is an input" in result.err, (flags, result.err)
    assert (tmp_path / "rows.json").read_text() == (tmp_path / "rows.valid.json").read_text() == content
    (tmp_path / "rows.valid.json").unlink(), (tmp_path / "new.json.rejected.jsonl").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_dataset_replaces_none_of_its_rows(run_script, tokens, tmp_path):
    shutil.copytree(tokens, tmp_path / "tokens")
    (tmp_path / "rows.json").write_text('{"input": "问", "target": "答"}\n')
    shutil.copy(tmp_path / "rows.json", tmp_path / "tokens" / "rows.json")
    (tmp_path / "tokens" / "link.json").symlink_to("../rows.json")
    (tmp_path / "again").symlink_to("tokens")
    (tmp_path / "lost").symlink_to("nowhere")
    for source, target, words in (
        ("tokens/rows.json", "tokens", "which would be lost"),
        ("tokens/rows.json", "again", "which would be lost"),
        ("tokens/link.json", "./tokens", "which would be lost"),
        ("rows.json", "rows.json", "which would be lost"),
        ("rows.json", "lost", "is not a dataset"),
        ("rows.json", "/dev/null", "is not a dataset"),
        ("rows.json", "rows.json/tokens", "is not a directory"),
    ):
        result = run_script(
            f"tokenize_dataset_rows_belle.py --jsonl_path {source} --save_path {target} --model_name_or_path {TINY}",
            cwd=tmp_path,
        )
        assert result.code == 2 and words in result.err and len(result.err.splitlines()) == 1, (target, result.err)
    assert (tmp_path / "tokens" / "rows.json").is_file() and (tmp_path / "tokens" / "link.json").is_file()


def test_an_input_that_disappears(run_script, tmp_path, monkeypatch):
    """It disappears after the check of the names and before the second file is opened."""
    for name in "ab":
        (tmp_path / name).write_bytes((ROOT / "data" / "sample.train.json").read_bytes())
    plain = raw_reader.read_blocks

    def read_blocks(path):
        yield from plain(path)
        Path(tmp_path / "b").unlink(missing_ok=True)

    monkeypatch.setattr(raw_reader, "read_blocks", read_blocks)
    result = run_script(f"process_belle_1M_data.py --input {tmp_path}/a {tmp_path}/b --output {tmp_path}/out")
    assert result.code == 2 and f"{tmp_path}/b is not a file" in result.err and not (tmp_path / "out").exists()
