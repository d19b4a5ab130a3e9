"""Journals and finished outputs: which old answers count, and what is never lost or overwritten."""

import json
import os
import shutil

import pytest
from conftest import TINY
from safetensors.torch import load_file, save_file
from test_answers import SCRIPT, make_adapter

from utils.common.errors import RunError, UsageError
from utils.inference.answer_journal import RECORD_PREFIX, hash_of
from utils.inference.answer_writer import AnswerFile
from utils.inference.prompt_reader import PromptRow

SETTINGS = {"model": "m", "max_new_tokens": 16}
PROMPTS = [PromptRow(index, f"问题{index}\n", [5, index]) for index in range(3)]
ANSWERS = [
    {
        "index": 0,
        "prompt": "问题0\n",
        "answer": '答案"{}',
        "finish_reason": "stop",
        "prompt_tokens": 2,
        "answer_tokens": 3,
    },
    {
        "index": 1,
        "prompt": "问题1\n",
        "answer": "a\rb",
        "finish_reason": "length",
        "prompt_tokens": 2,
        "answer_tokens": 1,
    },
    {
        "index": 2,
        "prompt": "问题2\n",
        "answer": "a\r\nb,c",
        "finish_reason": "stop",
        "prompt_tokens": 2,
        "answer_tokens": 4,
    },
]


def keep(path, settings=SETTINGS, prompts=PROMPTS, answers=ANSWERS, finish=False, **options) -> AnswerFile:
    """Write answers as a command does: to its end with `finish`, otherwise as if killed before."""
    file = AnswerFile(path, settings, **options)
    file.begin(prompts)
    file.open()
    for answer in answers:
        file.add(answer)
    file.close()
    if finish:
        file.finish(answers)
        file.end()
    return file


def known(path, settings=SETTINGS, prompts=PROMPTS) -> dict:
    return AnswerFile(path, settings).known(prompts)


def flips(path):
    """Flip one bit of every byte of a file, of a newline each of its eight, one at a time; yields the position."""
    data = path.read_bytes()
    for position, byte in enumerate(data):
        for bit in range(8) if byte in b"\n" else [position % 8]:
            path.write_bytes(data[:position] + bytes([byte ^ 1 << bit]) + data[position + 1 :])
            yield position
    path.write_bytes(data)


def test_a_flipped_bit_loses_its_record_alone(tmp_path):
    """In an answer, a checksum, a newline or the record of the settings."""
    keep(tmp_path / "o.jsonl")
    journal = tmp_path / "o.jsonl.partial-0"
    first = journal.read_bytes().index(b"\n")
    for position in flips(journal):
        answers = known(tmp_path / "o.jsonl")
        least = 3 if position <= first else 2
        assert len(answers) >= least and all(answers[i] == ANSWERS[i] for i in answers), position
    assert len(known(tmp_path / "o.jsonl")) == 3


@pytest.mark.parametrize("name, least", [("o.jsonl", 2), ("o.csv", 0)])
def test_a_flipped_bit_in_the_output(tmp_path, name, least):
    """The row is answered again; a damaged quote of a table can cost the rows after it. The damaged file is kept."""
    keep(tmp_path / name, finish=True)
    assert known(tmp_path / name) == dict(enumerate(ANSWERS))
    for position in flips(tmp_path / name):
        answers = known(tmp_path / name)
        assert least <= len(answers) <= 3 and all(answers[i] == ANSWERS[i] for i in answers), position
    changed = (tmp_path / name).read_bytes().replace("答案".encode(), "咎案".encode())
    (tmp_path / name).write_bytes(changed)
    assert sorted(known(tmp_path / name)) == [1, 2]
    keep(tmp_path / name, finish=True)
    assert (tmp_path / f"{name}.previous-1").read_bytes() == changed
    assert known(tmp_path / name) == dict(enumerate(ANSWERS))


def test_an_output_without_its_marker_is_no_answer(tmp_path):
    keep(tmp_path / "o.jsonl", finish=True)
    marker = tmp_path / ".o.jsonl.settings.json"
    whole = marker.read_bytes()
    for broken in (b"[" * 100_000, b"[]", b'{"model": "m", "max_new_tokens": 16}', whole[:-9], b"\xff", None):
        marker.unlink() if broken is None else marker.write_bytes(broken)
        assert known(tmp_path / "o.jsonl") == {}
    marker.write_bytes(whole)
    assert len(known(tmp_path / "o.jsonl")) == 3


def test_a_journal_cut_in_a_record_is_continued(tmp_path):
    keep(tmp_path / "o.jsonl", answers=ANSWERS[:2])
    journal = tmp_path / "o.jsonl.partial-0"
    whole = journal.read_bytes()
    for length in (0, 5, 40, whole.index(b"\n") + 30):  # in the first line, or the first record: nothing to keep
        journal.write_bytes(whole[:length])
        keep(tmp_path / "o.jsonl", answers=[])
        assert not list(tmp_path.glob("*previous*")) and journal.read_bytes() == whole[: whole.index(b"\n") + 1]
    journal.write_bytes(whole[:-9])
    assert list(known(tmp_path / "o.jsonl")) == [0]
    keep(tmp_path / "o.jsonl", answers=ANSWERS[1:])
    assert known(tmp_path / "o.jsonl") == dict(enumerate(ANSWERS))


def test_records_of_any_depth_and_kind(tmp_path):
    """With checksums that are right."""
    keep(tmp_path / "o.jsonl")
    with (tmp_path / "o.jsonl.partial-0").open("ab") as journal:
        for body in (b'"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'"settings": 1', b"}", b'"version": {}}'):
            journal.write(RECORD_PREFIX + hash_of(body).encode() + b'", ' + body + b"\n")
    assert known(tmp_path / "o.jsonl") == dict(enumerate(ANSWERS))


def test_what_earlier_versions_wrote_is_answered_again(tmp_path, capsys):
    """It is neither refused nor removed, but does not say which weights and tokens its answers come from."""
    rows = "".join(json.dumps(answer) + "\n" for answer in ANSWERS)
    (tmp_path / "o.jsonl").write_text(rows)
    (tmp_path / ".o.jsonl.settings.json").write_text(json.dumps(SETTINGS))
    journals = [json.dumps({"settings": SETTINGS}) + "\n" + rows, "no journal\n"]
    for process, text in enumerate(journals):
        (tmp_path / f"o.jsonl.partial-{process}").write_text(text)
    assert known(tmp_path / "o.jsonl") == {}
    keep(tmp_path / "o.jsonl", finish=True)
    assert capsys.readouterr().out.count("has no answers with checksums") == 2
    kept = [(tmp_path / f"o.jsonl.previous-{number}").read_text() for number in (1, 2, 3)]
    assert kept == [*journals, rows] and len(known(tmp_path / "o.jsonl")) == 3


def test_another_result_is_kept_aside(tmp_path, capsys):
    output, other = tmp_path / "o.jsonl", SETTINGS | {"max_new_tokens": 5}
    keep(output, finish=True)
    first = output.read_bytes()
    keep(output, finish=True)
    assert not list(tmp_path.glob("*previous*"))
    keep(output, other, answers=[answer | {"answer": "别的"} for answer in ANSWERS], finish=True)
    assert (tmp_path / "o.jsonl.previous-1").read_bytes() == first
    out = capsys.readouterr().out
    assert "of another command (--max_new_tokens was 16 and is 5): it is kept as o.jsonl.previous-1" in out
    keep(output, SETTINGS, PROMPTS[:1], ANSWERS[:1], finish=True)  # other rows, as of another input
    keep(output, SETTINGS, finish=True)  # has all answers of the output that it replaces
    assert sorted(path.name for path in tmp_path.glob("*previous*")) == ["o.jsonl.previous-1", "o.jsonl.previous-2"]
    keep(output, other, finish=True, overwrite=True)
    assert len(list(tmp_path.glob("*previous*"))) == 2 and not list(tmp_path.glob("*partial*"))


def test_an_unfinished_command_is_refused_and_named(tmp_path):
    keep(tmp_path / "o.jsonl", SETTINGS | {"model": "n"})
    with pytest.raises(UsageError, match="--model was n and is m; give another"):
        known(tmp_path / "o.jsonl")
    journal = tmp_path / "o.jsonl.partial-0"
    journal.write_bytes(journal.read_bytes().replace(b"version", b"wersion"))
    with pytest.raises(UsageError, match="other settings; give another"):
        known(tmp_path / "o.jsonl")


def test_overwrite_forgets_every_journal(tmp_path):
    """Also those of more processes than there are now."""
    for process in range(2):
        keep(tmp_path / "o.jsonl", answers=ANSWERS[process : process + 1], process=process)
    keep(tmp_path / "o.jsonl", answers=ANSWERS[2:], overwrite=True)
    assert list(known(tmp_path / "o.jsonl")) == [2]


def test_an_output_in_use_is_refused(tmp_path):
    """With any settings, and with --overwrite too; no longer once the command has ended or died."""
    running = keep(tmp_path / "o.jsonl")
    for options in ({}, {"overwrite": True}, {"settings": {}}):
        with pytest.raises(UsageError, match="in use by a command that has not ended"):
            keep(tmp_path / "o.jsonl", **options)
    assert len(known(tmp_path / "o.jsonl")) == 3
    del running
    keep(tmp_path / "o.jsonl", finish=True)


# The tests below run the script.


@pytest.fixture
def answer(run_script, tmp_path):
    """answer("--flags") -> (the answers, the summary), or what a failed command wrote to stderr; model in "m"."""
    shutil.copytree(TINY, tmp_path / "m")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "今天天气怎么样"}\n{"prompt": "小明昨天在公园看书"}\n')

    def run(flags="", code=0, output="o.jsonl"):
        result = run_script(
            f"{SCRIPT} --model_name_or_path {tmp_path}/m --input_path {tmp_path}/rows.jsonl "
            f"--output_path {tmp_path}/{output} --max_new_tokens 12 {flags}"
        )
        assert result.code == code, result.out + result.err
        if code:
            return result.err
        lines = (tmp_path / output).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines], json.loads(result.out.splitlines()[-1])

    return run


def change_weights(directory, change) -> None:
    """In place: the file keeps its size and its times."""
    file = directory / "model.safetensors"
    before, weights = file.stat(), load_file(file)
    save_file({key: change(key, value) for key, value in weights.items()}, file, {"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


def flip_middle(key, value):
    value = value.clone()
    if value.ndim == 2 and "layers." in key:
        value[1:-1] = value[1:-1].flip(0)
    return value


def add_to_biases(key, value):
    return value + 1 if value.ndim == 1 and "norm" not in key else value


def test_a_model_changed_in_place_answers_again(answer, tmp_path):
    before, _ = answer()
    assert answer()[1]["answered_before"] == 2
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    changes = {
        "middle of matrices": lambda: change_weights(tmp_path / "m", flip_middle),
        "biases": lambda: change_weights(tmp_path / "m", add_to_biases),
        "config": lambda: (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"layernorm_epsilon": 0.5})),
        "tokenizer": lambda: (tmp_path / "m" / "tokenizer_config.json").write_text('{"do_lower_case": true}'),
    }
    for name, change in changes.items():
        change()
        changed, summary = answer()
        assert summary["answered_before"] == 0, name
        assert changed == answer("--overwrite", output="p.jsonl")[0], name
        assert answer()[1]["answered_before"] == 2, name
    assert changed != before


def test_an_adapter_changed_in_place_answers_again(answer, tmp_path):
    """The answers in the adapter's directory, where the default paths put them, are no part of the adapter."""
    make_adapter(tmp_path / "output", 1, rank=2)
    flags, output = f"--adapter_path {tmp_path}/output", "output/answers.jsonl"
    before, _ = answer(flags, output=output)
    assert answer(flags, output=output)[1]["answered_before"] == 2
    make_adapter(tmp_path / "output", 2, rank=2)
    changed, summary = answer(flags, output=output)
    assert summary["answered_before"] == 0 and changed != before


def test_an_unfinished_command_resumes_in_the_adapters_directory(answer, tmp_path, monkeypatch):
    def fail(self, answers):
        raise RunError("killed")

    make_adapter(tmp_path / "output", 1, rank=2)
    flags, output = f"--adapter_path {tmp_path}/output", "output/answers.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "finish", fail)
        assert "killed" in answer(flags, code=1, output=output)
    assert f"--adapter_path was {tmp_path}/output and is not given; give another" in answer(code=2, output=output)
    assert answer(flags, output=output)[1]["answered_before"] == 2


@pytest.mark.parametrize("output", ["rows.jsonl", "m", "m/config.json", "link.jsonl", "pipe", "/dev/null"])
def test_an_output_that_would_destroy_something(answer, tmp_path, output):
    (tmp_path / "link.jsonl").symlink_to("rows.jsonl")
    os.mkfifo(tmp_path / "pipe")
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    output = output if output.startswith("/") else tmp_path / output
    error = answer(f"--output_path {output}", code=2)
    assert f"--output_path {output} is " in error and len(error.splitlines()) == 1
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before


def test_most_rows_failing_is_a_failure(answer, tmp_path):
    """The exit code is 1 although the output is complete; the same command has the same outcome."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "你好"}\n{"wrong": "columns"}\n{"wrong": "columns"}\n')
    for _ in range(2):
        assert "2 of 3 rows could not be answered" in answer(code=1)
        rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
        assert [row["finish_reason"] for row in rows] == ["stop", "error", "error"]
