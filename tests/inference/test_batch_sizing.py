"""One prompt that does not fit in memory becomes an error row; the others are answered, in batches that fit."""

import json

import pytest
import torch
from conftest import TINY

from utils.checkpoint.model import load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.inference import batch_sizing
from utils.inference.batch_generator import AnswerSettings, BatchGenerator, PromptCodec
from utils.inference.batch_sizing import BatchPlan, MemoryBudget, is_out_of_memory, plan_batches
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
    """Prompts of the given lengths whose answers have one token, so that all they need is the prompt's."""
    return [[TokenSequence(i, range(length), 1) for _ in range(sequences)] for i, length in enumerate(lengths)]


def budget(tokens, **others):
    """Memory for `tokens` tokens of KV cache."""
    nothing = dict.fromkeys(("gather_bytes", "repeat_bytes", "prefill_bytes", "prefill_tokens"), 0)
    kinds = {"splits_prompts": True, "has_mask": False, "pads": False, "skips": False, "max_batch_size": 256}
    return MemoryBudget(tokens, token_bytes=1, **nothing | kinds | others)


def test_rows_of_all_lengths_share_a_batch():
    lengths = [100] * 300 + [2000]
    plan = plan_batches(rows_of(lengths), budget(1 << 20), 0, 1)
    assert str(plan) == "256 (with more, little is gained)" and plan.max_seq_len == 2001
    assert plan.cache_tokens == 255 * 128 + 2048  # what they can need, not all that is free
    assert str(plan_batches(rows_of(lengths), budget(1 << 20), 64, 1)) == "64 (--batch_size)"
    assert str(plan_batches(rows_of(lengths), budget(1 << 20), 0, 2)) == "151 (all rows at once)"  # of a replica
    assert plan_batches(rows_of(lengths[-9:], sequences=3), budget(1 << 20), 0, 1).batch_size == 27
    assert (
        str(plan_batches(rows_of([10] * 5), budget(1 << 20), 4000, 1))
        == "5 (--batch_size 4000: no more rows are left)"
    )
    assert str(plan_batches([], budget(1 << 20), 0, 1)) == "none: no row fits into memory"


def test_memory_holds_rows_of_average_length():
    rows = rows_of([100] * 300 + [2000] * 5)  # 159.5 tokens on average, in whole pages
    plan = plan_batches(rows, budget(160 * 100), 0, 1)
    assert str(plan) == "96 (as many as memory holds)" and plan.cache_tokens == 160 * 100
    plan = plan_batches(rows, budget(160 * 50), 200, 1)
    assert str(plan) == "50 (--batch_size 200 is more than memory holds)"
    # A row that does not fit takes no memory from others, and is tried alone.
    plan = plan_batches([*rows, *rows_of([9000])], budget(160 * 50), 0, 1)
    assert plan.batch_size == 48 and plan.cache_tokens == 160 * 50 and plan.max_seq_len == 9001
    assert plan_batches(rows_of([9000]), budget(3000), 0, 1).cache_tokens == 9024
    # An answer is half as long as it may be, on average.
    rows = [[TokenSequence(number, range(50), 130)] for number in range(40)]
    assert plan_batches(rows, budget(1290), 0, 1).batch_size == 10


def test_what_a_prefill_leaves_for_the_cache():
    costs = {"prefill_bytes": 2, "prefill_tokens": 10, "gather_bytes": 3, "has_mask": True, "max_batch_size": 4}
    assert budget(10000, **costs).cache_tokens_beside(20) == 10000 - 10 * 2 - 8 * 10 * 20 - 3 * 80  # in two chunks
    assert budget(10000, **costs, splits_prompts=False).cache_tokens_beside(20) == 10000 - 20 * 2 - 8 * 20 * 20
    assert budget(10000, **costs, repeat_bytes=5).cache_tokens_beside(20) == 10000 - 10 * 2 - 20 * 5 - 8 * 200 - 3 * 80
    assert budget(100, **costs).cache_tokens_beside(20) == 0
    row = TokenSequence(0, range(20), 13)  # one page
    assert budget(20 * 2 + 8 * 20 * 20 + 64, **costs, splits_prompts=False).fits(row)
    assert not budget(20 * 2 + 8 * 20 * 20 + 63, **costs, splits_prompts=False).fits(row)


def test_rows_that_generate_pads():
    """A batch is as large as its longest row allows."""
    lengths = [10] * 30 + [30] * 10
    rows, memory = rows_of(lengths), budget(16000, pads=True)
    plan = plan_batches(rows, memory, 0, 1)
    assert memory.padded_batch_size(rows[0][0]) == 19 and memory.padded_batch_size(rows[-1][0]) == 2
    assert str(plan) == "16 (as many as memory holds)"

    class Recorder(HfGenerator):
        def generate_batch(self, batch):
            sizes.append((len(batch), len(batch[-1].input_ids)))

    sizes = []
    generator = Recorder(None, StopRule(frozenset()), GREEDY, 0, torch.device("cpu"))
    done = list(generator.run([row for (row,) in rows], plan))
    assert [sequence.sequence_id for sequence in done] == list(range(40))
    assert sizes == [(16, 10), (14, 10), *[(2, 30)] * 5]


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
        def __init__(self, model, config):
            if config.cache_tokens > 1000:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(model, config)

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
    done = generator.run(rows, BatchPlan(4, ""))
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
