"""Batch inference by its script: kinds of files, resuming, sampling, stop strings, several adapters, little memory."""

import csv
import json
import sys

import kill_inference
import pytest
import torch
from conftest import TEXTS, TINY

from utils.checkpoint.model import Checkpoint, load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.inference.answer_writer import AnswerFile
from utils.inference.batch_generator import AnswerSettings, BatchGenerator, PromptCodec
from utils.inference.engine.model_runner import ModelRunner
from utils.inference.placement import prepare_for_decoding
from utils.inference.prompt_reader import PromptRow, read_prompt_rows
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
    """As Excel writes it, in any encoding; a text with a newline and a comma is one cell."""
    file = tmp_path / "rows.csv"
    with file.open("w", encoding=encoding, newline="") as table:
        writer = csv.writer(table)
        writer.writerows([("编号", "text"), *enumerate(TEXTS)])
    answers, _ = answer(file, "--prompt_column text", "answers.csv")
    assert [row["answer"] for row in answers] == expected
    assert [row["prompt"] for row in answers] == list(TEXTS)
    assert [row["index"] for row in answers] == ["0", "1", "2", "3", "4"]


def test_a_template_turns_columns_into_prompts(answer, tmp_path, expected):
    file = tmp_path / "rows.csv"
    file.write_text("task,text\n改成一个问题,小明今天在公园放风筝\n找出句子里的地点,老师昨天在图书馆看书\n")
    answers, _ = answer(file, "--prompt_template '{task}:\n{text}'")
    assert [row["answer"] for row in answers] == expected[:2]


def test_a_missing_column(answer, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("a,b\n1,2\n")
    assert "no column text, but a, b" in answer(file, "--prompt_template '把{text}改写'", code=2)
    assert "--prompt_column" in answer(file, code=2)
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text('{"text": "你好"}\n{"other": 1}\n')
    answers, summary = answer(jsonl, "--prompt_column text")
    assert [row["finish_reason"] for row in answers] == ["stop", "error"] and summary["errors"] == 1
    assert 'no column "text"' in answers[1]["error"]


def test_text_is_a_prompt_a_line(answer, tmp_path, expected):
    file = tmp_path / "rows.txt"
    file.write_text("你好\n\n谢谢\n")
    assert [row["answer"] for row in answer(file)[0]] == [expected[2], expected[4]]


@pytest.mark.parametrize("output", ["answers.jsonl", "answers.csv"])
def test_the_same_command_answers_the_remaining_rows(answer, rows, tmp_path, expected, output):
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


def test_a_killed_command_resumes(answer, rows, tmp_path, expected, monkeypatch):
    """Its journal ends in the middle of a line."""
    finished, _ = answer(rows, output="finished.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "close", lambda self: sys.exit("killed"))
        answer(rows, code="killed")
    journal = tmp_path / "answers.jsonl.partial-0"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    journal.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    assert "--max_new_tokens was 16 and is 5; give another" in answer(rows, "--max_new_tokens 5", code=2)
    assert journal.exists()
    answers, summary = answer(rows)
    assert answers == finished and summary["answered_before"] == 1
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


def test_a_seed_decides_in_any_batch_and_placement(answer, rows, tmp_path):
    """The engine with several batch sizes, and `generate` on an offloaded model, choose the same tokens."""
    first, _ = answer(rows, f"{SAMPLED} --seed 3 --batch_size 1", "a.jsonl")
    assert answer(rows, f"{SAMPLED} --seed 3 --batch_size 3", "b.jsonl")[0] == first
    offloaded = f"--max_memory cpu=6MiB --offload_folder {tmp_path}/offload"
    assert answer(rows, f"{SAMPLED} --seed 3 {offloaded}", "c.jsonl")[0] == first
    assert answer(rows, f"{SAMPLED} --seed 4", "d.jsonl")[0] != first


def test_several_answers_a_row(answer, rows):
    answers, _ = answer(rows, f"{SAMPLED} --num_return_sequences 3")
    assert all(len(row["answers"]) == 3 for row in answers)
    assert all(row["answer"] == row["answers"][0]["answer"] for row in answers)
    assert any(len({sample["answer"] for sample in row["answers"]}) > 1 for row in answers)


def test_stop_strings_end_answers(answer, rows, tmp_path, expected):
    text = expected[0][3:5]
    answers, _ = answer(rows, f"--stop {text} 没有这个")
    assert answers[0]["answer"] == expected[0][: expected[0].index(text)]
    assert answers[0]["finish_reason"] == "stop"
    offloaded = f"--max_memory cpu=6MiB --offload_folder {tmp_path}/offload"
    assert answer(rows, f"--stop {text} 没有这个 {offloaded}", "b.jsonl")[0] == answers


def make_adapter(directory, seed: int, rank: int) -> None:
    model = attach_adapter(load_model(str(TINY)), LoraSettings(rank, 32, 0.0, ["query_key_value", "dense"]), seed=seed)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(model, directory, AdapterOrigin("native", Checkpoint.open(str(TINY)).fingerprint(), str(TINY)))


def test_each_row_takes_its_adapter(answer, rows, tmp_path, expected):
    """In one batch, by adapters of different ranks, each row is answered as by its adapter alone; also offloaded."""
    alone = {"base": expected}
    for seed, name in enumerate(("甲", "b"), start=1):
        make_adapter(tmp_path / name, seed, rank=2 * seed)
        answers, _ = answer(rows, f"--adapter_path {tmp_path / name}", f"{name}.jsonl")
        alone[name] = [row["answer"] for row in answers]
    assert len({tuple(answers) for answers in alone.values()}) == 3
    names = ["甲", "b", "base", "b", "甲"]
    mixed = tmp_path / "mixed.jsonl"
    rows_ = [{"prompt": text, "adapter": name} for text, name in zip(TEXTS, names, strict=True)]
    mixed.write_text("".join(json.dumps(row) + "\n" for row in [*rows_, {"prompt": "你好", "adapter": "c"}]))
    flags = f"--adapter_path {tmp_path}/甲 {tmp_path}/b"
    answers, _ = answer(mixed, flags, "mixed-answers.jsonl")
    assert [row["answer"] for row in answers[:5]] == [alone[name][i] for i, name in enumerate(names)]
    assert [row["adapter"] for row in answers[:5]] == names
    assert "not one of 甲, b, base" in answers[5]["error"]
    offloaded = f"--max_memory cpu=6MiB --offload_folder {tmp_path}/offload"
    assert answer(mixed, f"{flags} {offloaded}", "offloaded.jsonl")[0] == answers


@pytest.fixture
def generate(rows):
    """generate(settings, runner_type) -> (the prompts' rows, their answers in the same order), in batches of 5."""

    def run(settings, runner_type):
        model, tokenizer = load_model(str(TINY)), load_tokenizer(str(TINY))
        prepare_for_decoding(model)
        codec = PromptCodec(tokenizer, template_for(tokenizer))
        prompts = read_prompt_rows(str(rows), tokenizer, codec.template)
        generator = BatchGenerator(model, codec, settings, torch.device("cpu"))
        generator.backend.runner_type = runner_type
        return prompts, sorted(generator.run(prompts, batch_size=5), key=lambda answer: answer["index"])

    return run


def test_out_of_memory_halves_the_batch(generate, expected, capsys):
    """The error comes where a GPU raises it: in a decode step, with some rows answered and others not."""

    class SmallDevice(ModelRunner):
        def decode(self, plan):
            if plan.batch_size > 2 and self.state.cache_length.max() > 12:
                raise torch.OutOfMemoryError("out of memory")
            return super().decode(plan)

    _, done = generate(AnswerSettings(max_new_tokens=16), SmallDevice)
    assert "continuing with 2" in capsys.readouterr().err
    assert [answer["answer"] for answer in done] == expected


def test_no_memory_for_one_row(generate, expected):
    class SmallDevice(ModelRunner):
        def prefill(self, plan):
            if max(len(sequence.input_ids) for sequence in plan.sequences) > 12:
                raise torch.OutOfMemoryError("out of memory")
            super().prefill(plan)

    settings = AnswerSettings(max_new_tokens=16, sequences=2)  # one error a row, not one an answer
    requests, done = generate(settings, SmallDevice)
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
        ("does not read its journal", "answered again|taken over"),
        ("begins its journal anew", "answers are lost"),
        ("answers otherwise after a kill", "not that of a run without a kill"),
    ],
)
def test_the_harness_finds_a_program_that_loses_answers(tmp_path, fault, words):
    """With a program that only keeps answers, and has each possible fault."""
    (tmp_path / "journalist.py").write_text(JOURNALIST)
    script = f"{tmp_path}/journalist.py '{fault}'"
    if words is None:
        assert kill_inference.torture(tmp_path, kills=2, seed=1, script=script)["taken_over"] > 0
        return
    with pytest.raises(RuntimeError, match=words):  # at the first kill that is not while the interpreter starts
        kill_inference.torture(tmp_path, kills=20, seed=1, script=script)


def test_the_benchmark_runs(run_script):
    command = (
        "benchmarks/inference_throughput.py --shape tiny-glm --batch_size 3 --prompt_tokens 9 --new_tokens 6 "
        "--job 6 --shared_prefix 130 --agreement"
    )
    result = json.loads(run_script(command).check().out.splitlines()[-1])
    assert result["tokens_per_second"] > 0 and result["job"]["rows"] == 6
    # Each row but the first shares two pages; the last token of each is left to a decode step.
    assert result["job"]["prompt_tokens"] - result["job"]["prefilled_tokens"] == 5 * 128 + 6
    assert result["engine_agreement"] == 1.0
