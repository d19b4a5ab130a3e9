"""What a run of batch inference reports: the summary's keys, and out of memory on a sharded model."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools.random_checkpoint import random_model
from utils.common.errors import RankError
from utils.inference.batch_generator import AnswerSettings
from utils.inference.batch_sizing import BatchPlan
from utils.inference.engine.model_runner import ModelRunner
from utils.inference.engine.scheduler import StopRule, TokenSequence
from utils.inference.engine_generate import EngineGenerator, EngineStats, SequenceQueue
from utils.inference.generate import Job, settings_of, summarise
from utils.inference.placement import prepare_for_decoding
from utils.inference.sampling import GREEDY, Sampling


def test_the_summary_has_its_keys_and_their_older_names():
    rows = [SimpleNamespace(index=index) for index in range(4)]
    output = SimpleNamespace(path=Path("answers.jsonl"))
    known = {0: {"index": 0, "finish_reason": "stop"}}
    job = Job(template=None, requests=rows, settings=AnswerSettings(), output=output, known=known, batch_size=0)
    answers = [
        {"finish_reason": "stop", "prompt_tokens": 3, "answer_tokens": 5},
        {"finish_reason": "length", "prompt_tokens": 4, "answer_tokens": 10},
        {"finish_reason": "error"},
    ]
    stats = [EngineStats(1.0, 0.5, [64, 32]), EngineStats(3.0, 1.5, [64])]
    assert summarise(job, answers, stats, seconds=12.0) == {
        "output_path": "answers.jsonl",
        "rows": 4,
        "errors": 1,
        "answered_before": 1,
        "batch_size": 32,
        "new_tokens": 15,
        "prompt_tokens": 7,
        "seconds": 10.0,
        "compile_seconds": 2.0,
        "preparation_seconds": 2.0,
        "prefill_seconds": 1.0,
        "reading_seconds": 1.0,
        "new_tokens_per_second": 1.5,
        "finish_reasons": {"stop": 1, "length": 1, "error": 1},
    }


def test_the_keys_of_settings_in_journals():
    """Journals of earlier versions are resumed by them."""
    settings = AnswerSettings(9, Sampling(0.5, 4, 0.9, 1.1, 7), 2, ("停",), ("a", "b"))
    assert settings_of(settings, dtype="torch.float32") == {
        "max_new_tokens": 9,
        "sampling": {"temperature": 0.5, "top_k": 4, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 7},
        "sequences": 2,
        "stop": ("停",),
        "adapters": ("a", "b"),
        "dtype": "torch.float32",
    }


class FullDevice(ModelRunner):
    def prefill(self, plan):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("is_sharded", [False, True])
def test_out_of_memory_on_a_sharded_model_ends_the_run(is_sharded):
    """The other processes of a replica do not know of it; alone, a process tries with less, then gives up the row."""
    model = random_model("tiny-glm", "cpu", torch.float32, seed=0).eval()
    prepare_for_decoding(model)
    generator = EngineGenerator(model, StopRule(frozenset({1})), GREEDY, is_sharded, FullDevice)
    sequences = [TokenSequence(number, [5, 6, 7], 4) for number in range(2)]
    done = generator.run(sequences, BatchPlan(2, "", max_seq_len=7, cache_tokens=128))
    if is_sharded:
        with pytest.raises(
            RankError, match="out of memory with 2 rows and 128 cached tokens at once: .* smaller --batch_size"
        ):
            list(done)
    else:
        assert set(done) == set(sequences) and not any(sequence.answer_ids for sequence in sequences)
        assert generator.stats.batch_sizes == [2, 1, 1]


def test_sequences_are_put_back_in_order():
    short, middle, long = (TokenSequence(number, range(tokens), 8) for number, tokens in enumerate((5, 50, 500)))
    queue = SequenceQueue([short, middle, long])
    assert list(queue.up_to(128)) == [short, middle] and queue.first() is long
    queue.put_back([middle, short])
    assert list(queue.up_to()) == [short, middle, long] and queue.first() is None
