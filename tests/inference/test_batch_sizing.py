"""One prompt that does not fit in memory is a row with an error: the others are answered, in batches that fit."""

import json

import pytest
import torch
from conftest import TINY

from utils.checkpoint.model import load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.inference import batch_sizing, engine, hf_generate
from utils.inference.batch_sizing import MemoryBudget, group_rows, is_out_of_memory
from utils.inference.engine import Engine
from utils.inference.engine.prefill import TokenSequence
from utils.inference.generate import generate_answers
from utils.inference.hf_generate import generate_plainly
from utils.inference.prompt_reader import PromptRow
from utils.inference.sampling import GREEDY
from utils.inference.stop_strings import StopStrings
from utils.models.templates import template_for

MODEL = "data/chatglm-tiny"
ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    MemoryError("std::bad_alloc"),
    RuntimeError("std::bad_alloc"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    OSError(12, "Cannot allocate memory"),
)


@pytest.fixture(scope="module")
def answer():
    """answer([lengths], batch_size) -> the rows, in order; of those that are short also what they are alone."""
    model, tokenizer = load_model(str(TINY)), load_tokenizer(str(TINY))

    def run(lengths, batch_size=0):
        requests = [
            PromptRow(index, f"{length}", tokenizer.encode("天气" * ((length - 3) // 2) + "?" * (length % 2 == 0)))
            for index, length in enumerate(lengths)
        ]
        assert [len(request.input_ids) for request in requests] == lengths
        template = template_for(tokenizer)
        done = generate_answers(model, tokenizer, template, requests, batch_size, 6, torch.device("cpu"))
        return sorted(done, key=lambda row: row["index"])

    return run


def failing(rows):
    return [row["index"] for row in rows if row["finish_reason"] == "error"]


def tasks(lengths, sequences=1):
    return [[TokenSequence(i, range(length), 0) for _ in range(sequences)] for i, length in enumerate(lengths)]


def room(tokens, strict=False, plain=False, limit=256):
    """For so many tokens of cache."""
    return MemoryBudget(tokens, 1, 0, 0, masked=False, plain=plain, strict=strict, limit=limit)


def sizes(groups):
    return [(len(group.rows), group.slots) for group in groups]


def test_rows_share_batches_where_memory_has_room():
    lengths = [100] * 300 + [2000]
    assert sizes(group_rows(tasks(lengths), room(1 << 20), 0, 1)) == [(301, 256)]
    assert sizes(group_rows(tasks(lengths), room(1 << 20), 64, 1)) == [(301, 64)]
    assert sizes(group_rows(tasks(lengths), room(1 << 20), 0, 2)) == [(301, 151)]  # a replica's share
    assert sizes(group_rows(tasks(lengths[-9:], sequences=3), room(1 << 20), 0, 1)) == [(9, 27)]


def test_long_rows_go_apart_where_they_would_leave_room_for_few():
    lengths = [100] * 300 + [2000] * 5
    assert sizes(group_rows(tasks(lengths), room(128 * 300), 0, 1)) == [(300, 256), (5, 5)]
    assert sizes(group_rows(tasks(lengths), room(3000), 0, 1)) == [(300, 16), (5, 1)]
    # Of twice the length they cost half of the rows at most, which is less than a group costs.
    assert sizes(group_rows(tasks([100] * 300 + [250] * 5), room(128 * 40), 0, 1)) == [(305, 16)]
    # A row for which there is no memory does not take it from others, and is tried alone.
    assert sizes(group_rows(tasks([*lengths, 5000]), room(3000), 0, 1)) == [(300, 16), (5, 1), (1, 1)]
    # What was asked for holds, unless an attempt that fails could not be survived.
    assert sizes(group_rows(tasks(lengths), room(3000), 64, 1)) == [(300, 64), (5, 5)]
    assert sizes(group_rows(tasks(lengths), room(3000, strict=True), 64, 1)) == [(300, 23), (5, 1)]


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_errors_of_memory_are_told_from_others(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape mismatch"), ValueError("out of memory"), OSError(28, "No space left on device")],
    ids=str,
)
def test_other_errors_are_not_of_memory(error):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("batch_size", [0, 1, 4])
def test_a_row_too_long_for_a_device(answer, monkeypatch, batch_size):
    """The cache is what does not fit, for 1000 tokens, which nobody knows beforehand."""
    zeros = torch.zeros

    def limited(*shape, **options):
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        if len(sizes) == 4 and sizes[0] * sizes[2] > 1000:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return zeros(*shape, **options)

    lengths = [5, 2001, 7, 801, 5, 9, 1201, 1201, 15, 5]
    expected = answer(lengths)
    monkeypatch.setattr(torch, "zeros", limited)
    rows = answer(lengths, batch_size)
    assert failing(rows) == [1, 6, 7] and "no memory for a prompt of 2001 tokens" in rows[1]["error"]
    assert [row for row in rows if row["index"] not in (1, 6, 7)] == [
        row for row in expected if row["index"] not in (1, 6, 7)
    ]


@pytest.mark.parametrize("error", [ERRORS[1], ERRORS[3], ERRORS[4]], ids=str)
def test_a_row_too_long_for_the_host(answer, monkeypatch, error):
    """Whatever says so, and where a prompt is read."""
    read = Engine._read

    def limited(engine, batch, slots):
        if max(len(task.input_ids) for task in batch) > 100:
            raise error
        return read(engine, batch, slots)

    monkeypatch.setattr(Engine, "_read", limited)
    assert failing(answer([5, 101, 7, 99])) == [1]


def test_a_row_that_cannot_fit_is_not_tried(answer, monkeypatch):
    """For Linux gives memory that is not there, and kills the process that uses it."""
    monkeypatch.setattr(batch_sizing, "free_bytes", lambda device: 60 << 20)
    tried = []
    pack = engine.pack_prompts
    monkeypatch.setattr(engine, "pack_prompts", lambda batch, *rest: tried.extend(batch) or pack(batch, *rest))
    rows = answer([5, 9001, 7])
    assert failing(rows) == [1] and max(len(task.input_ids) for task in tried) == 7


def test_a_row_too_long_for_generate(monkeypatch):
    """As of a model whose layers are spread over devices."""
    generate = hf_generate._generate_batch

    def limited(model, batch, *rest):
        if sum(len(task.input_ids) for task in batch) > 20:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        generate(model, batch, *rest)

    monkeypatch.setattr(hf_generate, "_generate_batch", limited)
    model, tokenizer = load_model(str(TINY)), load_tokenizer(str(TINY))
    rows = [TokenSequence(i, tokenizer.encode("天气" * number), 3) for i, number in enumerate((1, 1, 2, 3, 20, 30))]
    end, batch_sizes = StopStrings(tokenizer, ()), []
    stops = template_for(tokenizer).stop_ids(tokenizer)
    done = generate_plainly(model, rows, 4, stops, 3, GREEDY, end, torch.device("cpu"), batch_sizes)
    assert [bool(task.answer_ids) for task in done] == [True] * 4 + [False] * 2 and batch_sizes[:2] == [4, 2]


LIMITED = """
import runpy, sys
from utils.inference import batch_sizing
batch_sizing.free_bytes = lambda device: 60 << 20
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_shards_agree_on_what_does_not_fit(run_ranks, tmp_path):
    """Before one of them fails, for which the others would wait."""
    (tmp_path / "limited.py").write_text(LIMITED)
    prompts = ["你好", "天气" * 5000, "谢谢"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    run_ranks(
        2,
        f"{tmp_path}/limited.py chatglm_deepspeed_inference.py --model_name_or_path {MODEL} --tp_size 2 "
        f"--input_path {tmp_path}/rows.jsonl --output_path {tmp_path}/o.jsonl --max_new_tokens 6",
    ).check()
    assert failing([json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]) == [1]
