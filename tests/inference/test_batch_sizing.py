"""One prompt that does not fit in memory becomes an error row; the others are answered, in batches that fit."""

import json

import pytest
import torch
from conftest import TINY

from utils.checkpoint.model import load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.inference import batch_sizing
from utils.inference.batch_generator import AnswerSettings, BatchGenerator, PromptCodec
from utils.inference.batch_sizing import BatchGroup, MemoryBudget, group_rows, is_out_of_memory
from utils.inference.engine.model_runner import ModelRunner
from utils.inference.engine.scheduler import StopRule, TokenSequence
from utils.inference.hf_generate import HfGenerator
from utils.inference.placement import prepare_for_decoding
from utils.inference.prompt_reader import PromptRow
from utils.inference.sampling import GREEDY
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
    """answer([lengths], batch_size, runner_type) -> the answers in the order of their rows; a length is a prompt's."""
    model, tokenizer = load_model(str(TINY)), load_tokenizer(str(TINY))
    prepare_for_decoding(model)
    codec = PromptCodec(tokenizer, template_for(tokenizer))

    def run(lengths, batch_size=0, runner_type=ModelRunner):
        rows = [
            PromptRow(index, f"{length}", tokenizer.encode("天气" * ((length - 3) // 2) + "?" * (length % 2 == 0)))
            for index, length in enumerate(lengths)
        ]
        assert [len(row.input_ids) for row in rows] == lengths
        generator = BatchGenerator(model, codec, AnswerSettings(max_new_tokens=6), torch.device("cpu"))
        generator.backend.runner_type = runner_type
        return sorted(generator.run(rows, batch_size), key=lambda answer: answer["index"])

    return run


def failing(answers):
    return [answer["index"] for answer in answers if answer["finish_reason"] == "error"]


def rows_of(lengths, sequences=1):
    return [[TokenSequence(i, range(length), 0) for _ in range(sequences)] for i, length in enumerate(lengths)]


def budget(tokens, skips=False):
    """Memory for `tokens` tokens of KV cache."""
    return MemoryBudget(
        tokens,
        token_bytes=1,
        prefill_bytes=0,
        prefill_tokens=0,
        has_mask=False,
        pads=False,
        skips=skips,
        max_batch_size=256,
    )


def sizes(groups):
    return [(len(group.rows), group.batch_size) for group in groups]


def test_rows_share_batches_where_memory_has_room():
    lengths = [100] * 300 + [2000]
    assert sizes(group_rows(rows_of(lengths), budget(1 << 20), 0, 1)) == [(301, 256)]
    assert sizes(group_rows(rows_of(lengths), budget(1 << 20), 64, 1)) == [(301, 64)]
    assert sizes(group_rows(rows_of(lengths), budget(1 << 20), 0, 2)) == [(301, 151)]  # a replica's share
    assert sizes(group_rows(rows_of(lengths[-9:], sequences=3), budget(1 << 20), 0, 1)) == [(9, 27)]


def test_long_rows_get_their_own_group_if_they_halve_the_batch_size():
    lengths = [100] * 300 + [2000] * 5
    assert sizes(group_rows(rows_of(lengths), budget(128 * 300), 0, 1)) == [(300, 256), (5, 5)]
    assert sizes(group_rows(rows_of(lengths), budget(3000), 0, 1)) == [(300, 16), (5, 1)]
    # Rows of twice the length at most halve the batch size, which costs less than a group.
    assert sizes(group_rows(rows_of([100] * 300 + [250] * 5), budget(128 * 40), 0, 1)) == [(305, 16)]
    # A row that does not fit takes no memory from others, and is tried alone.
    assert sizes(group_rows(rows_of([*lengths, 5000]), budget(3000), 0, 1)) == [(300, 16), (5, 1), (1, 1)]
    # The user's batch size holds, unless a failed attempt would be fatal.
    assert sizes(group_rows(rows_of(lengths), budget(3000), 64, 1)) == [(300, 64), (5, 5)]
    assert sizes(group_rows(rows_of(lengths), budget(3000, skips=True), 64, 1)) == [(300, 23), (5, 1)]


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_out_of_memory_is_recognised(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape mismatch"), ValueError("out of memory"), OSError(28, "No space left on device")],
    ids=str,
)
def test_other_errors_are_not_out_of_memory(error):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("batch_size", [0, 1, 4])
def test_a_row_too_long_for_a_device(answer, batch_size):
    """The KV cache has no memory for more than 1000 tokens, which nothing says before it is allocated."""

    class SmallDevice(ModelRunner):
        def prefill(self, plan):
            if not self.caches and self.max_batch_size * self.max_seq_len > 1000:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().prefill(plan)

    lengths = [5, 2001, 7, 801, 5, 9, 1201, 1201, 15, 5]
    expected = answer(lengths)
    answers = answer(lengths, batch_size, SmallDevice)
    assert failing(answers) == [1, 6, 7] and "no memory for a prompt of 2001 tokens" in answers[1]["error"]
    assert [row for row in answers if row["index"] not in (1, 6, 7)] == [
        row for row in expected if row["index"] not in (1, 6, 7)
    ]


@pytest.mark.parametrize("error", [ERRORS[1], ERRORS[3], ERRORS[4]], ids=str)
def test_a_row_too_long_for_the_host(answer, error):
    """Whichever library reports it, in a prefill."""

    class SmallHost(ModelRunner):
        def prefill(self, plan):
            if max(len(sequence.input_ids) for sequence in plan.sequences) > 100:
                raise error
            super().prefill(plan)

    assert failing(answer([5, 101, 7, 99], runner_type=SmallHost)) == [1]


def test_a_row_that_cannot_fit_is_not_tried(answer, monkeypatch):
    """Linux would hand out memory that does not exist, and kill the process that uses it."""
    monkeypatch.setattr(batch_sizing, "free_bytes", lambda device: 60 << 20)
    tried = []

    class Recorder(ModelRunner):
        def prefill(self, plan):
            tried.extend(len(sequence.input_ids) for sequence in plan.sequences)
            super().prefill(plan)

    assert failing(answer([5, 9001, 7], runner_type=Recorder)) == [1]
    assert sorted(tried) == [5, 7]


def test_a_row_too_long_for_generate():
    """With a model whose layers are spread over devices."""

    class SmallHost(HfGenerator):
        def generate_batch(self, batch):
            if sum(len(sequence.input_ids) for sequence in batch) > 20:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            super().generate_batch(batch)

    model, tokenizer = load_model(str(TINY)), load_tokenizer(str(TINY))
    stop = StopRule(frozenset(template_for(tokenizer).stop_ids(tokenizer)))
    generator = SmallHost(model, stop, GREEDY, tokenizer.pad_token_id, torch.device("cpu"))
    rows = [TokenSequence(i, tokenizer.encode("天气" * number), 3) for i, number in enumerate((1, 1, 2, 3, 20, 30))]
    done = generator.run(rows, BatchGroup([[row] for row in rows], batch_size=4))
    assert [bool(sequence.answer_ids) for sequence in done] == [True] * 4 + [False] * 2
    assert generator.stats.batch_sizes[:2] == [4, 2]


LIMITED = """
import runpy, sys
from utils.inference import batch_sizing
batch_sizing.free_bytes = lambda device: 60 << 20
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_shards_agree_on_what_does_not_fit(run_ranks, tmp_path):
    """Before one of them fails, because the others would wait for it."""
    (tmp_path / "limited.py").write_text(LIMITED)
    prompts = ["你好", "天气" * 5000, "谢谢"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    run_ranks(
        2,
        f"{tmp_path}/limited.py chatglm_deepspeed_inference.py --model_name_or_path {MODEL} --tp_size 2 "
        f"--input_path {tmp_path}/rows.jsonl --output_path {tmp_path}/o.jsonl --max_new_tokens 6",
    ).check()
    assert failing([json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]) == [1]
