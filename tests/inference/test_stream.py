"""Sequences that come and go while others run, their tokens as they are chosen, and who waits for them."""

import asyncio
import contextlib
import threading
import time

import pytest
from conftest import GOLDEN, TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import NEVER, random_glm, random_glm4, sequences_of, trained_chatglm
from test_scheduler import STOP, token_of

from utils.checkpoint.tokenizer import load_tokenizer
from utils.inference.engine import Engine
from utils.inference.engine.model_runner import EngineConfig, ModelRunner
from utils.inference.engine.scheduler import SchedulerLimits, StopRule, TokenSequence
from utils.inference.engine.stream import EngineServer
from utils.inference.placement import prepare_for_decoding
from utils.inference.sampling import GREEDY, Sampling
from utils.inference.stop_strings import StopStrings, decode


class KnownRunner:
    """A device without a model: `choose(sequence, place)` is its token."""

    def __init__(self, choose, config: EngineConfig):
        self.choose, self.max_seq_len, self.pages, self.on_gpu = choose, config.max_seq_len, config.pages, False
        self.limits = SchedulerLimits(config.max_batch_size, 100, config.decode_steps)
        self.slots: list[TokenSequence | None] = [None] * config.max_batch_size
        self.chosen = [0] * config.max_batch_size

    def prefill(self, plan) -> None:
        for slot, sequence in zip(plan.slots, plan.sequences, strict=True):
            self.slots[slot], self.chosen[slot] = sequence, 0

    def decode(self, plan) -> list[list[int]]:
        for source, target in plan.moves:
            self.slots[target], self.chosen[target] = self.slots[source], self.chosen[source]
        tokens = []
        for slot, sequence in enumerate(self.slots[: plan.batch_size]):
            places = range(self.chosen[slot], self.chosen[slot] + self.limits.decode_steps)
            tokens.append([self.choose(sequence, place) if sequence else -1 for place in places])
            self.chosen[slot] = places.stop
        return tokens

    def wait(self, tokens: list[list[int]]) -> list[list[int]]:
        return tokens


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    events=st.lists(st.tuples(st.sampled_from(["add", "cancel", "step"]), st.integers(0, 11)), max_size=60),
    slots=st.integers(1, 5),
    decode_steps=st.integers(1, 4),
)
def test_any_order_of_adding_and_cancelling(lengths, events, slots, decode_steps):
    """Every sequence that is not cancelled gets its own tokens once, in order; of a cancelled one no more come."""
    config = EngineConfig(slots, 30, StopRule(frozenset({STOP})), decode_steps=decode_steps)
    engine = Engine(
        lambda sequence, place: token_of(sequence, place, lengths[sequence.sequence_id]), config, KnownRunner
    )
    sequences = [TokenSequence(number, [1, 2], 9) for number in range(len(lengths))]
    added, cancelled, ended, received = set(), set(), {}, {sequence: [] for sequence in sequences}

    def step():
        for tokens in engine.step():
            assert tokens.sequence not in cancelled and tokens.sequence not in ended
            received[tokens.sequence] += tokens.token_ids
            if tokens.finish_reason:
                ended[tokens.sequence] = tokens.finish_reason

    for event, number in events:
        sequence = sequences[number % len(sequences)]
        if event == "add" and sequence not in added:
            added.add(sequence)
            engine.add(sequence)
        elif event == "cancel" and sequence in added:
            cancelled |= {sequence} - ended.keys()
            engine.cancel(sequence)
        else:
            step()
    while engine.has_work:
        step()
    assert ended.keys() == added - cancelled and not engine.given
    for sequence, reason in ended.items():
        length = lengths[sequence.sequence_id]
        expected = [token_of(sequence, place, length) for place in range(min(length, 9))]
        assert received[sequence] == sequence.answer_ids == expected
        assert reason == ("stop" if length <= 9 else "length")


def alone(model, prompts, sampling=GREEDY, max_new_tokens=12) -> list[list[int]]:
    """Return the answer of each prompt in an engine of its own."""
    answers = []
    for sequence in sequences_of(prompts, max_new_tokens):
        (done,) = Engine(model, EngineConfig(1, 64, NEVER, sampling)).answer([sequence])
        answers.append(done.answer_ids)
    return answers


@pytest.mark.parametrize("build", [trained_chatglm, random_glm, random_glm4])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, top_p=0.9, repetition_penalty=1.2, seed=5)])
def test_sequences_added_while_others_run_answer_as_alone(build, sampling):
    model, prompts = build()
    prepare_for_decoding(model)
    expected = alone(model, prompts, sampling)
    for decode_steps in (1, 3):
        engine = Engine(model, EngineConfig(3, 64, NEVER, sampling, decode_steps=decode_steps))
        waiting, received = sequences_of(prompts, 12), [[] for _ in prompts]
        cancelled = TokenSequence(99, prompts[1], 40)
        engine.add(cancelled)
        steps = 0
        while waiting or engine.has_work:
            if waiting and steps % 2 == 0:
                engine.add(waiting.pop(0))
            if steps == 5:
                assert cancelled in engine.scheduler.running
                engine.cancel(cancelled)
            for tokens in engine.step():
                if tokens.sequence is not cancelled:
                    received[tokens.sequence.sequence_id] += tokens.token_ids
            steps += 1
            assert steps <= 5 or cancelled not in engine.scheduler.running
        assert received == expected


def test_an_answer_takes_no_more_sequences_than_it_has_slots():
    """Replicas share the queue that it takes from."""
    config = EngineConfig(2, 30, StopRule(frozenset({STOP})), decode_steps=2)
    engine, taken = Engine(lambda sequence, place: token_of(sequence, place, 5), config, KnownRunner), []

    def source():
        for number in range(7):
            taken.append(number)
            yield TokenSequence(number, [1, 2], 9)

    done = [len(taken) for _ in engine.answer(source())]
    assert len(done) == 7 and all(count <= complete + 2 for complete, count in enumerate(done))


@pytest.mark.parametrize(
    "checkpoint", [TINY, GOLDEN / "glm-4-9b-chat-tiny", GOLDEN / "chatglm3-6b-tiny"], ids=lambda path: path.name
)
@pytest.mark.parametrize("decode_steps", [1, 3])
@pytest.mark.parametrize(
    "text, shown",
    [
        ("今天在家里问:你好", "今天在家里"),
        ("今天问问题,问他", "今天问问题,问他"),  # begins like a stop string and is none
        ("今天END", "今天"),
        ("问:今天", ""),
        ("今天🙂龘问:🙂", "今天🙂龘"),  # several tokens a character
        ("今天在家里问", "今天在家里问"),  # the end is no stop string
    ],
)
def test_tokens_of_a_stop_string_are_not_given_out(checkpoint, decode_steps, text, shown):
    tokenizer = load_tokenizer(str(checkpoint))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert decode(tokenizer, ids) == text
    strings = StopStrings(tokenizer, ("问:", "END"))
    stop = StopRule(frozenset({-1}), strings.find, strings.count_safe)
    config = EngineConfig(1, 64, stop, decode_steps=decode_steps)
    engine = Engine(lambda sequence, place: ids[place] if place < len(ids) else -1, config, KnownRunner)
    engine.add(TokenSequence(0, [1, 2], len(ids)))
    received, reason = [], None
    while engine.has_work:
        for tokens in engine.step():
            received += tokens.token_ids
            reason = tokens.finish_reason
            assert shown.startswith(decode(tokenizer, received).rstrip("\ufffd"))
    assert decode(tokenizer, received) == shown and reason == ("length" if shown == text else "stop")


def test_without_count_safe_an_answer_comes_whole():
    stop = StopRule(frozenset({STOP}), lambda ids: ids.index(3) + 1 if 3 in ids else None)
    engine = Engine(lambda sequence, place: place + 1, EngineConfig(1, 30, stop, decode_steps=1), KnownRunner)
    engine.add(TokenSequence(0, [1, 2], 9))
    steps = []
    while engine.has_work:
        steps += engine.step()
    assert [(tokens.token_ids, tokens.finish_reason) for tokens in steps] == [([1, 2, 3], "stop")]


@pytest.fixture(scope="module")
def served():
    """A prepared model, 20 prompts and their answers."""
    model, prompts = random_glm()
    prepare_for_decoding(model)
    prompts = [[*prompt, 10 + number] for number in range(3) for prompt in prompts][:20]
    return model, prompts, alone(model, prompts)


def start(model, runner_type=ModelRunner, slots=4) -> EngineServer:
    return EngineServer(Engine(model, EngineConfig(slots, 64, NEVER, decode_steps=2), runner_type))


async def consume(server, sequence, delay=0.0, most=64) -> list[int]:
    """Return the first `most` tokens of an answer, or all."""
    received = []
    async for tokens in server.generate(sequence):
        received += tokens.token_ids
        if len(received) >= most:
            break
        await asyncio.sleep(delay)
    return received


def test_twenty_consumers_at_once(served):
    """One is slow, one leaves its loop and one's task is cancelled; the others' answers are theirs."""
    model, prompts, expected = served

    async def run(server):
        sequences = sequences_of(prompts, 12)
        options = {3: {"delay": 0.02}, 5: {"most": 2}}
        tasks = [
            asyncio.create_task(consume(server, sequence, **options.get(number, {})))
            for number, sequence in enumerate(sequences)
        ]
        endless = asyncio.create_task(consume(server, TokenSequence(99, prompts[0], 50), delay=9))
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        endless.cancel()
        answers = await asyncio.gather(*tasks)
        with pytest.raises(asyncio.CancelledError):
            await endless
        return answers

    with start(model) as server:
        answers = asyncio.run(run(server))
        wait_until(lambda: not server.engine.has_work)
        assert not server.engine.given and not server._consumers
    assert len(answers[5]) >= 2 and answers[5] == expected[5][: len(answers[5])]
    assert [answers[:5], answers[6:]] == [expected[:5], expected[6:]]
    assert not server.is_running


def wait_until(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to pass in 10 seconds")


def test_what_waits_for_a_slow_consumer_comes_together(served):
    model, prompts, expected = served

    async def run(server):
        received = []
        async for tokens in server.generate(sequences_of(prompts, 12)[0]):
            received.append(tokens.token_ids)
            while server.engine.has_work:
                await asyncio.sleep(0.01)
        return received

    with start(model) as server:
        received = asyncio.run(run(server))
    assert len(received) <= 2 and sum(received, []) == expected[0]  # one, where all came before the consumer looked


def test_threads_stream_several_sequences(served):
    model, prompts, expected = served
    with start(model) as server:
        received = [[], []]
        for tokens in server.stream(*sequences_of(prompts[:2], 12)):
            received[tokens.sequence.sequence_id] += tokens.token_ids
        assert received == expected[:2]
        left = sequences_of(prompts[2:4], 50)
        with contextlib.closing(server.stream(*left)) as stream:
            next(stream)
        wait_until(lambda: not server.engine.has_work)
        assert all(len(sequence.answer_ids) < 50 for sequence in left)


def test_an_error_of_the_engine_reaches_everybody(served):
    model, prompts, expected = served

    class FailingRunner(ModelRunner):
        decodes = 0

        def decode(self, plan):
            self.decodes += 1
            if self.decodes == 4:
                raise MemoryError("no memory for a step")
            return super().decode(plan)

    async def run(server):
        consumers = [consume(server, sequence) for sequence in sequences_of(prompts[:6], 50)]
        return await asyncio.gather(*consumers, return_exceptions=True)

    with start(model, FailingRunner) as server:
        results = asyncio.run(run(server))  # four run, two wait
        assert [str(result) for result in results] == ["no memory for a step"] * 6
        assert not server.is_running
        with pytest.raises(MemoryError, match="no memory for a step"):
            next(server.stream(TokenSequence(0, prompts[0], 5)))


def test_closing_ends_those_who_wait(served):
    model, prompts, _ = served
    before = threading.active_count()
    server = start(model)
    stream = server.stream(TokenSequence(0, prompts[0], 50))
    next(stream)
    server.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="the engine's server is closed"):
        list(stream)
    with pytest.raises(RuntimeError, match="the engine's server is closed"):
        next(server.stream(TokenSequence(0, prompts[0], 5)))


def test_an_event_loop_that_is_gone_harms_no_other(served):
    model, prompts, expected = served
    with start(model) as server:
        loop, sequence = asyncio.new_event_loop(), TokenSequence(0, prompts[0], 50)
        tokens = server.generate(sequence)
        loop.run_until_complete(anext(tokens))
        loop.close()
        wait_until(lambda: not server.engine.has_work)
        assert len(sequence.answer_ids) < 50
        (done,) = {each.sequence for each in server.stream(sequences_of(prompts[:2], 12)[1])}
        assert done.answer_ids == expected[1]


@pytest.mark.parametrize(
    "sequence, words",
    [
        (TokenSequence(0, [], 5), "a token of a prompt"),
        (TokenSequence(0, [1], 0), "max_new_tokens of 1"),
        (TokenSequence(0, [1, 2], 127), "129 tokens, more than max_seq_len 128"),
        (TokenSequence(0, [1, 2], 5, answer_ids=[3]), "has an answer already"),
    ],
)
def test_a_sequence_that_cannot_be_answered_is_refused(served, sequence, words):
    with start(served[0]) as server:
        with pytest.raises(ValueError, match=words):
            next(server.stream(sequence))
        assert server.is_running
