"""Answers do not depend on the memory: on preemption, on chunks of prompts, on pages that rows share."""

from collections import Counter

import pytest
import torch
from engine_models import (
    NEVER,
    KernelRunner,
    put_torch_for_kernels,
    random_glm,
    random_glm4,
    sequences_of,
    trained_chatglm,
)

from utils.inference.engine import Engine, model_runner
from utils.inference.engine.model_runner import EngineConfig, ModelRunner
from utils.inference.placement import prepare_for_decoding
from utils.inference.sampling import GREEDY, Sampling

SAMPLED = Sampling(temperature=1.5, top_k=40, repetition_penalty=1.2, seed=3)
RUNNERS = pytest.mark.parametrize("runner_type", [ModelRunner, KernelRunner], ids=["masks", "kernels"])


def answers_of(model, prompts, runner_type=ModelRunner, new_tokens=20, **config) -> tuple[list[list[int]], Engine]:
    """The answers in the order of the prompts, and the engine with a counter `chunks` of what it prefilled of each."""
    chunks = Counter()

    class Recorder(runner_type):
        def prefill(self, plan):
            chunks.update(chunk.sequence.sequence_id for chunk in plan.chunks)
            super().prefill(plan)

    engine = Engine(model, EngineConfig(**{"max_batch_size": 7, "stop": NEVER, "max_seq_len": 704} | config), Recorder)
    engine.chunks = chunks
    done = engine.answer(sequences_of(prompts, new_tokens))
    return [sequence.answer_ids for sequence in sorted(done, key=lambda sequence: sequence.sequence_id)], engine


@RUNNERS
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("build", [trained_chatglm, random_glm, random_glm4])
def test_preemption_changes_no_answer(build, sampling, runner_type, monkeypatch):
    model, prompts = build()
    prepare_for_decoding(model)
    settings = {"sampling": sampling, "new_tokens": 80}
    expected, engine = answers_of(model, prompts, **settings)
    assert set(engine.chunks.values()) == {1}
    put_torch_for_kernels(monkeypatch)
    for decode_steps in (1, 3):
        answers, engine = answers_of(
            model, prompts, runner_type, cache_tokens=5 * 64, decode_steps=decode_steps, **settings
        )
        assert max(engine.chunks.values()) > 1
        assert answers == expected


@RUNNERS
def test_long_prompts_in_chunks_are_answered_the_same(runner_type, monkeypatch):
    model, prompts = random_glm4()
    prompts += [torch.randint(10, 900, (length,)).tolist() for length in (600, 101, 40)]
    prepare_for_decoding(model)
    expected, engine = answers_of(model, prompts, sampling=SAMPLED)
    assert set(engine.chunks.values()) == {1}
    put_torch_for_kernels(monkeypatch)
    for name in ("MAX_HOST_PREFILL_TOKENS", "MAX_PREFILL_TOKENS"):
        monkeypatch.setattr(model_runner, name, 100)
    answers, engine = answers_of(model, prompts, runner_type, sampling=SAMPLED, max_batch_size=3, decode_steps=2)
    assert engine.chunks == Counter(dict.fromkeys(range(10), 1) | {7: 6})
    assert answers == expected


def test_a_prompt_of_chatglm_stays_whole(monkeypatch):
    monkeypatch.setattr(model_runner, "MAX_HOST_PREFILL_TOKENS", 5)
    model, prompts = trained_chatglm()
    prepare_for_decoding(model)
    long = [*prompts[0][:2] * 100, *prompts[0]]
    _, engine = answers_of(model, [long, long])
    assert engine.scheduler.prefilled_tokens == 2 * (len(long) - 1) and set(engine.chunks.values()) == {1}


@RUNNERS
def test_rows_that_begin_alike_compute_it_once(runner_type, monkeypatch):
    """500 common tokens are 7 full pages of 64, which only the first row prefills."""
    model, prompts = random_glm()
    common = torch.randint(10, 900, (500,)).tolist()
    prompts = [common + prompt for prompt in prompts]
    prepare_for_decoding(model)
    alone, own_tokens = [], 0
    for prompt in prompts:
        (answer,), engine = answers_of(model, [prompt])
        alone.append(answer)
        own_tokens += engine.scheduler.prefilled_tokens
    put_torch_for_kernels(monkeypatch)
    for max_batch_size in (1, 2, 7):
        answers, engine = answers_of(model, prompts, runner_type, max_batch_size=max_batch_size)
        assert engine.scheduler.prefilled_tokens == own_tokens - (len(prompts) - 1) * 7 * 64
        assert answers == alone


def test_a_prompt_that_is_cached_whole():
    """The first decode step computes its last token, the prefill nothing."""
    model, _ = random_glm()
    prepare_for_decoding(model)
    prompt = torch.randint(10, 900, (129,)).tolist()
    answers, engine = answers_of(model, [prompt, prompt], max_batch_size=1)
    assert engine.scheduler.prefilled_tokens == 128 and answers[0] == answers[1]


def test_compiled_layers_attend_to_cached_tokens(monkeypatch):
    """Their writes into the cache come before they read it, in chunks and in pages that another row has filled."""
    model, _ = random_glm4()
    prepare_for_decoding(model)
    first = torch.randint(10, 900, (300,)).tolist()
    prompts = [first, [*first[:200], 5, 6, 7]]
    expected, _ = answers_of(model, prompts, new_tokens=4)
    put_torch_for_kernels(monkeypatch)
    monkeypatch.setattr(model_runner, "MAX_PREFILL_TOKENS", 128)
    answers, engine = answers_of(model, prompts, KernelRunner, new_tokens=4, max_batch_size=1, compile_layers=True)
    assert engine.chunks == {0: 3, 1: 1} and engine.scheduler.prefilled_tokens == 299 + 202 - 192
    assert answers == expected
