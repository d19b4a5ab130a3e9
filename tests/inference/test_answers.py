"""What goes into batch inference and what comes out: kinds of files, resuming, sampling, stop texts, adapters."""

import csv
import json
import sys

import kill_inference
import pytest
import torch
from conftest import TEXTS, TINY

from utils.checkpoint.model import Checkpoint, load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.errors import UsageError
from utils.data.row_schema import ColumnMap
from utils.inference.answer_writer import AnswerFile
from utils.inference.engine import Engine
from utils.inference.generate import AnswerSettings, generate_answers
from utils.inference.prompt_reader import PromptForm, PromptRow, read_requests
from utils.inference.sampling import Sampling
from utils.lora.adapter import AdapterOrigin, LoraSettings, attach_adapter, save_adapter
from utils.models.templates import template_for

SCRIPT = "chatglm_milti_gpu_inference.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("answers") / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def answer(run_script, tmp_path):
    """answer(input, "--flags") -> (rows of the output, what was printed); one output file a test."""

    def run(input_path, flags="", output="answers.jsonl", code=0):
        result = run_script(
            f"{SCRIPT} --model_name_or_path {TINY} --input_path {input_path} --output_path {tmp_path / output} "
            f"--max_new_tokens 16 {flags}"
        )
        assert result.code == code, result.out + result.err
        if code:
            return result.err
        text = (tmp_path / output).read_text(encoding="utf-8")
        if output.endswith(".csv"):
            return list(csv.DictReader(text.splitlines(keepends=True))), json.loads(result.out.splitlines()[-1])
        return [json.loads(line) for line in text.splitlines()], json.loads(result.out.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def expected(run_script, rows, tmp_path_factory):
    output = tmp_path_factory.mktemp("expected") / "answers.jsonl"
    run_script(
        f"{SCRIPT} --model_name_or_path {TINY} --input_path {rows} --output_path {output} --max_new_tokens 16"
    ).check()
    return [json.loads(line)["answer"] for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
def test_csv_in_and_out(answer, tmp_path, expected, encoding):
    """As Excel writes it, in whichever encoding; a text with a newline and a comma is one cell."""
    file = tmp_path / "rows.csv"
    with file.open("w", encoding=encoding, newline="") as table:
        writer = csv.writer(table)
        writer.writerows([("编号", "text"), *enumerate(TEXTS)])
    found, _ = answer(file, "--prompt_column text", "answers.csv")
    assert [row["answer"] for row in found] == expected
    assert [row["prompt"] for row in found] == list(TEXTS)
    assert [row["index"] for row in found] == ["0", "1", "2", "3", "4"]


def test_a_template_makes_prompts_of_columns(answer, tmp_path, expected):
    file = tmp_path / "rows.csv"
    file.write_text("task,text\n改成一个问题,小明今天在公园放风筝\n找出句子里的地点,老师昨天在图书馆看书\n")
    found, _ = answer(file, "--prompt_template '{task}:\n{text}'")
    assert [row["answer"] for row in found] == expected[:2]


def test_a_column_that_is_not_there(answer, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("a,b\n1,2\n")
    assert "no column text, but a, b" in answer(file, "--prompt_template '把{text}改写'", code=2)
    assert "--prompt_column" in answer(file, code=2)
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text('{"text": "你好"}\n{"other": 1}\n')
    found, summary = answer(jsonl, "--prompt_column text")
    assert [row["finish_reason"] for row in found] == ["stop", "error"] and summary["errors"] == 1
    assert 'no column "text"' in found[1]["error"]


def test_text_is_a_prompt_a_line(answer, tmp_path, expected):
    file = tmp_path / "rows.txt"
    file.write_text("你好\n\n谢谢\n")
    assert [row["answer"] for row in answer(file)[0]] == [expected[2], expected[4]]


@pytest.fixture(scope="module")
def read():
    """read(file, form) -> its requests, without a model."""
    tokenizer = load_tokenizer(str(TINY))
    return lambda file, *form: read_requests(str(file), tokenizer, template_for(tokenizer), *form)


def test_a_line_of_text_ends_at_its_newline_alone(read, tmp_path):
    text = "a\u2028b\u2029c\x85d\x0ce\x0bf\x1cg\x1dh\x1ei"
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "rows.txt").write_bytes(f"\ufeff{text}{end}{end}二{end}".encode())
        assert [request.prompt for request in read(tmp_path / "rows.txt")] == [text, "二"]
    with pytest.raises(UsageError, match="rows.txt has no column q, but line"):
        read(tmp_path / "rows.txt", PromptForm(columns=ColumnMap.parse("prompt=q")))
    (tmp_path / "rows.csv").write_text(f"prompt\r{text}\r二\r", newline="")
    assert [request.prompt for request in read(tmp_path / "rows.csv")] == [text, "二"]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": text}, ensure_ascii=False) + "\r\n", newline="")
    assert [request.prompt for request in read(tmp_path / "rows.jsonl")] == [text]


@pytest.mark.parametrize(
    "table, words",
    [
        ('prompt,id\n一,1\n"二,2\n三,3\n四,4\n', r":3: a quote \(\"\) .* is not closed"),
        ('prompt,id\n一,1\n"二,2\n三,3\n"四",4\n', r":3: a quote .* line 5"),
        ('prompt,id\n"一"说,1\n', r":2: a quote .* is not closed before a separator"),
        ('"prompt,id\n一,1\n', ":1: a quote"),
        ("prompt,prompt\n一,1\n", "several columns are named prompt"),
        (",,\n一,1,2\n", "no names of columns"),
        ("", "no names of columns"),
        ("prompt,id\n", "has no rows"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_table_that_is_none_is_refused(read, tmp_path, table, words, kind):
    (tmp_path / f"rows.{kind}").write_text(table.replace(",", "\t") if kind == "tsv" else table)
    with pytest.raises(UsageError, match=words):
        read(tmp_path / f"rows.{kind}")


def test_cells_of_a_table(read, tmp_path):
    """A quote inside a cell is one; blank lines are no rows; a row without a cell, or with one more, is an error."""
    table = '\n,prompt , id\n0,他说"好",1\n\n1,"a ""b""\r\nc",2\n2,d\n3,e,5,6\n'
    (tmp_path / "rows.csv").write_text(table, newline="")
    good, quoted, fewer, more = read(tmp_path / "rows.csv")
    assert (good.prompt, quoted.prompt) == ('他说"好"', 'a "b"\r\nc')
    assert fewer.error.endswith("rows.csv:7: 2 cells, but 3 columns")
    assert more.error.endswith("rows.csv:8: 4 cells, but 3 columns")


@pytest.mark.parametrize("output", ["answers.jsonl", "answers.csv"])
def test_the_same_command_answers_what_is_left(answer, rows, tmp_path, expected, output):
    first, summary = answer(rows, "--batch_size 2", output)
    assert summary["answered_before"] == 0 and not list(tmp_path.glob("*.partial*"))
    again, summary = answer(rows, "", output)
    assert again == first and summary["answered_before"] == 5 and summary["new_tokens"] == 0
    more = tmp_path / "more.jsonl"
    more.write_text('{"prompt": "您好"}\n' + "".join(rows.read_text().splitlines(keepends=True)[1:]))
    changed, summary = answer(more, "", output)
    assert summary["answered_before"] == 4 and changed[1:] == first[1:] and changed[0] != first[0]
    _, summary = answer(rows, "--overwrite", output)
    assert summary["answered_before"] == 0


def test_a_killed_command_goes_on(answer, rows, tmp_path, expected, monkeypatch):
    """Its journal ends in the middle of a line."""
    finished, _ = answer(rows, output="finished.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "close", lambda self: sys.exit("killed"))
        answer(rows, code="killed")
    journal = tmp_path / "answers.jsonl.partial-0"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    journal.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    assert "max_new_tokens differ" in answer(rows, "--max_new_tokens 5", code=2)
    assert journal.exists()
    found, summary = answer(rows)
    assert found == finished and summary["answered_before"] == 1
    assert not journal.exists()


def test_journals_of_several_processes_are_one(tmp_path):
    settings, requests = {"a": 1}, [PromptRow(0, "p0", [1]), PromptRow(1, "p1", [1])]
    for process in range(2):
        file = AnswerFile(tmp_path / "out.jsonl", settings, process)
        file.known(requests)
        file.open()
        file.add({"index": process, "prompt": f"p{process}", "answer": "x", "finish_reason": "stop"})
        file.close()
    assert list(AnswerFile(tmp_path / "out.jsonl", settings).known(requests)) == [0, 1]
    for changed in (PromptRow(1, "changed", [1]), PromptRow(1, "p1", [2]), PromptRow(1, "p1", [1], adapter="b")):
        assert list(AnswerFile(tmp_path / "out.jsonl", settings).known([requests[0], changed])) == [0]


SAMPLED = "--temperature 6 --top_p 0.95 --top_k 50 --repetition_penalty 1.1"


def test_a_seed_decides_whatever_the_batch_and_the_placement(answer, rows, tmp_path):
    """The engine with several batch sizes, and `generate` on an offloaded model, choose the same tokens."""
    first, _ = answer(rows, f"{SAMPLED} --seed 3 --batch_size 1", "a.jsonl")
    assert answer(rows, f"{SAMPLED} --seed 3 --batch_size 3", "b.jsonl")[0] == first
    offloaded = f"--max_memory cpu=6MiB --offload_folder {tmp_path}/offload"
    assert answer(rows, f"{SAMPLED} --seed 3 {offloaded}", "c.jsonl")[0] == first
    assert answer(rows, f"{SAMPLED} --seed 4", "d.jsonl")[0] != first


def test_several_answers_a_row(answer, rows):
    found, _ = answer(rows, f"{SAMPLED} --num_return_sequences 3")
    assert all(len(row["answers"]) == 3 for row in found)
    assert all(row["answer"] == row["answers"][0]["answer"] for row in found)
    assert any(len({part["answer"] for part in row["answers"]}) > 1 for row in found)


def test_stop_texts_end_answers(answer, rows, tmp_path, expected):
    text = expected[0][3:5]
    found, _ = answer(rows, f"--stop {text} 没有这个")
    assert found[0]["answer"] == expected[0][: expected[0].index(text)]
    assert found[0]["finish_reason"] == "stop"
    offloaded = f"--max_memory cpu=6MiB --offload_folder {tmp_path}/offload"
    assert answer(rows, f"--stop {text} 没有这个 {offloaded}", "b.jsonl")[0] == found


def test_sampling_follows_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(4000, 4)
    rows, counts = torch.arange(4000), torch.zeros(4000, dtype=torch.int64)
    chosen = Sampling(temperature=2.0).choose(logits, None, rows, counts)
    shares = torch.bincount(chosen, minlength=4) / 4000
    assert (shares - (logits[0] / 2).softmax(0)).abs().max() < 0.025
    assert set(Sampling(1.0, top_k=2).choose(logits, None, rows, counts).tolist()) == {2, 3}
    assert set(Sampling(1.0, top_p=0.7).choose(logits, None, rows, counts).tolist()) == {2, 3}
    assert Sampling().choose(logits, None, rows, counts).eq(3).all()


def test_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(0)
    logits, ids = torch.randn(3, 9), torch.randint(0, 9, (3, 4))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone()).argmax(-1)
    seen = torch.zeros(3, 9, dtype=torch.bool).scatter_(1, ids, True)
    chosen = Sampling(repetition_penalty=1.7).choose(logits, seen, torch.arange(3), torch.zeros(3).long())
    assert chosen.equal(expected)


def make_adapter(directory, seed: int, rank: int) -> None:
    model = attach_adapter(load_model(str(TINY)), LoraSettings(rank, 32, 0.0, ["query_key_value", "dense"]), seed=seed)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(model, directory, AdapterOrigin("native", Checkpoint.open(str(TINY)).fingerprint(), str(TINY)))


def test_each_row_takes_its_adapter(answer, rows, tmp_path, expected):
    """In one batch, of different ranks, answered as each adapter alone answers; also beside offloaded weights."""
    alone = {"base": expected}
    for seed, name in enumerate(("甲", "b"), start=1):
        make_adapter(tmp_path / name, seed, rank=2 * seed)
        found, _ = answer(rows, f"--adapter_path {tmp_path / name}", f"{name}.jsonl")
        alone[name] = [row["answer"] for row in found]
    assert len({tuple(answers) for answers in alone.values()}) == 3
    names = ["甲", "b", "base", "b", "甲"]
    mixed = tmp_path / "mixed.jsonl"
    rows_ = [{"prompt": text, "adapter": name} for text, name in zip(TEXTS, names, strict=True)]
    mixed.write_text("".join(json.dumps(row) + "\n" for row in [*rows_, {"prompt": "你好", "adapter": "c"}]))
    flags = f"--adapter_path {tmp_path}/甲 {tmp_path}/b"
    found, _ = answer(mixed, flags, "mixed-answers.jsonl")
    assert [row["answer"] for row in found[:5]] == [alone[name][i] for i, name in enumerate(names)]
    assert [row["adapter"] for row in found[:5]] == names
    assert "not one of 甲, b, base" in found[5]["error"]
    offloaded = f"--max_memory cpu=6MiB --offload_folder {tmp_path}/offload"
    assert answer(mixed, f"{flags} {offloaded}", "offloaded.jsonl")[0] == found


def test_out_of_memory_halves_the_batch(rows, expected, monkeypatch, capsys):
    """The error is raised where a GPU raises it: in a step, with some rows answered and others on their way."""
    steps = Engine._compute_step

    def limited(engine, size, width):
        if size > 2 and engine.state.lengths.max() > 12:
            raise torch.OutOfMemoryError("out of memory")
        steps(engine, size, width)

    monkeypatch.setattr(Engine, "_compute_step", limited)
    model, tokenizer = load_model(str(TINY)), load_tokenizer(str(TINY))
    template = template_for(tokenizer)
    requests = read_requests(str(rows), tokenizer, template)
    settings = AnswerSettings(max_new_tokens=16)
    done = list(generate_answers(model, tokenizer, template, requests, 5, 16, torch.device("cpu"), settings))
    assert "going on with 2" in capsys.readouterr().err
    assert [row["answer"] for row in sorted(done, key=lambda row: row["index"])] == expected


def test_no_memory_for_one_row(rows, expected, monkeypatch):
    read = Engine._read

    def limited(engine, batch, slots):
        if max(len(task.input_ids) for task in batch) > 12:
            raise torch.OutOfMemoryError("out of memory")
        return read(engine, batch, slots)

    monkeypatch.setattr(Engine, "_read", limited)
    model, tokenizer = load_model(str(TINY)), load_tokenizer(str(TINY))
    template = template_for(tokenizer)
    requests = read_requests(str(rows), tokenizer, template)
    settings = AnswerSettings(max_new_tokens=16, sequences=2)  # one error a row, not one an answer
    done = list(generate_answers(model, tokenizer, template, requests, 5, 16, torch.device("cpu"), settings))
    done.sort(key=lambda row: row["index"])
    assert len(done) == len(TEXTS)
    lengths = [len(request.input_ids) for request in requests]
    assert any(length > 12 for length in lengths) and any(length <= 12 for length in lengths)
    for row, length, text in zip(done, lengths, expected, strict=True):
        assert row["answer"] == (None if length > 12 else text)
        assert ("no memory" in row.get("error", "")) == (length > 12)


def test_killed_inference_loses_nothing(tmp_path):
    assert kill_inference.torture(tmp_path, kills=1, seed=1)["kills"] == 1


JOURNALIST = """
import json, os, sys, time
fault, source, out = sys.argv[1], *(sys.argv[sys.argv.index(flag) + 1] for flag in ("--input_path", "--output_path"))
journal, known = out + ".partial-0", {}
if fault != "does not read its journal" and os.path.exists(journal):
    whole = [line for line in open(journal) if line.endswith("\\n")]
    known = {row["index"]: row for row in map(json.loads, whole)}
before = len(known)
if fault == "answers otherwise after a kill":
    print(file=open(out, "w")) if before else None
size = 1 << 20 if fault == "writes its journal at the end" else 1
with open(journal, "w" if fault == "begins its journal anew" else "a", buffering=size) as file:
    for index, prompt in enumerate(open(source)):
        if index not in known:
            time.sleep(0.02)
            known[index] = {"index": index, "answer": prompt}
            print(json.dumps(known[index]), file=file)
with open(out + ".tmp", "w") as file:
    json.dump([known[index]["answer"] for index in sorted(known)], file)
os.replace(out + ".tmp", out)
os.remove(journal)
print(json.dumps({"answered_before": before}))
"""


@pytest.mark.parametrize(
    "fault, words",
    [
        ("none", None),
        ("writes its journal at the end", "a kill would lose the others"),
        ("does not read its journal", "answered again|were reused"),
        ("begins its journal anew", "answers are lost"),
        ("answers otherwise after a kill", "not that of a run without a kill"),
    ],
)
def test_the_harness_finds_a_program_that_loses_answers(tmp_path, fault, words):
    """By a program that does nothing but keep answers, with each fault that it can have."""
    (tmp_path / "journalist.py").write_text(JOURNALIST)
    script = f"{tmp_path}/journalist.py '{fault}'"
    if words is None:
        assert kill_inference.torture(tmp_path, kills=2, seed=1, script=script)["taken_over"] > 0
        return
    with pytest.raises(RuntimeError, match=words):
        kill_inference.torture(tmp_path, kills=2, seed=1, script=script)


def test_the_benchmark_runs(run_script):
    command = (
        "benchmarks/inference_throughput.py --shape tiny-glm --batch_size 3 --prompt_tokens 9 --new_tokens 6 "
        "--job 6 --agreement"
    )
    result = json.loads(run_script(command).check().out.splitlines()[-1])
    assert result["tokens_per_second"] > 0 and result["job"]["rows"] == 6
    assert result["engine_agreement"] == 1.0
