"""The scheduler without a model: a device whose tokens are known, and what every schedule must keep to."""

import ast
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.inference.engine import scheduler as scheduler_module
from utils.inference.engine.scheduler import (
    PrefillPlan,
    Scheduler,
    SchedulerLimits,
    StopRule,
    TokenSequence,
    decode_batch_size,
)

STOP = 0


def token_of(sequence: TokenSequence, place: int, length: int) -> int:
    """The token that the device chooses: its own for each sequence and place, and STOP at the end."""
    return STOP if place == length - 1 else 1000 * sequence.sequence_id + place + 1


class KnownDevice:
    """
    Runs a scheduler's plans as `ModelRunner` does, and checks that each is possible.

    Args:
        lengths: by sequence_id, the tokens after which its answer stops by itself.
    """

    def __init__(self, limits: SchedulerLimits, lengths: dict[int, int], stop: StopRule):
        self.limits, self.lengths, self.stop = limits, lengths, stop
        self.scheduler = Scheduler(limits, stop)
        self.slots: list[TokenSequence | None] = [None] * limits.max_batch_size
        self.chosen = [0] * limits.max_batch_size  # tokens of the answer in each slot
        self.plans: list[PrefillPlan] = []
        self.batch_sizes: list[int] = []

    def prefill(self, plan: PrefillPlan) -> None:
        tokens = sum(len(sequence.input_ids) - 1 for sequence in plan.sequences)
        assert tokens <= self.limits.prefill_tokens or len(plan.sequences) == 1
        assert len(set(plan.slots)) == len(plan.slots) == len(plan.sequences) > 0
        for slot, sequence in zip(plan.slots, plan.sequences, strict=True):
            self.slots[slot], self.chosen[slot] = sequence, 0
        self.plans.append(plan)

    def decode(self) -> list[list[int]]:
        plan = self.scheduler.plan_decode()
        for source, target in plan.moves:
            assert target < plan.batch_size <= source and self.scheduler.running[source] is None
            self.slots[target], self.chosen[target] = self.slots[source], self.chosen[source]
        for slot, sequence in enumerate(plan.sequences):
            assert sequence is None or self.slots[slot] is sequence
        assert len(self.scheduler.in_flight) <= 2
        running = [sequence for sequence in plan.sequences if sequence]
        assert running == [sequence for sequence in self.scheduler.running if sequence]
        assert plan.batch_size == decode_batch_size(self.limits, len(running))
        self.batch_sizes.append(plan.batch_size)
        tokens = []
        for slot in range(plan.batch_size):
            tokens.append([])
            for _ in range(self.limits.decode_steps):
                sequence = self.slots[slot]  # in a slot that was never used a device computes something too
                length = self.lengths[sequence.sequence_id] if sequence else 0
                tokens[-1].append(token_of(sequence, self.chosen[slot], length) if sequence else -1)
                self.chosen[slot] += 1
        return tokens

    def answer(self, sequences: list[TokenSequence]) -> list[TokenSequence]:
        """The loop of `Engine.answer`."""
        source, results, done = iter(sequences), deque(), []
        while True:
            for plan in self.scheduler.plan_prefills(source):
                self.prefill(plan)
            if not self.scheduler.has_running:
                return done
            decodes = self.scheduler.needs_decoding()
            if decodes:
                results.append(self.decode())
            if self.scheduler.must_finish_oldest() or not decodes:
                done += self.scheduler.finish(results.popleft())


def test_it_needs_no_torch():
    tree = ast.parse(Path(scheduler_module.__file__).read_text(encoding="utf-8"))
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert sorted(modules) == ["collections", "collections.abc", "dataclasses", "itertools", "utils.common.numbers"]


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(1, 12)), max_size=30),
    max_batch_size=st.integers(1, 20),
    decode_steps=st.integers(1, 4),
    prefill_tokens=st.integers(1, 60),
    few_batch_sizes=st.booleans(),
)
def test_every_sequence_is_answered_once_whatever_the_limits(
    rows, max_batch_size, decode_steps, prefill_tokens, few_batch_sizes
):
    """Rows are (prompt tokens, tokens until the model stops, max_new_tokens)."""
    limits = SchedulerLimits(max_batch_size, prefill_tokens, decode_steps, few_batch_sizes)
    sequences = [TokenSequence(i, range(prompt), most) for i, (prompt, _, most) in enumerate(rows)]
    lengths = {i: length for i, (_, length, _) in enumerate(rows)}
    device = KnownDevice(limits, lengths, StopRule(frozenset({STOP})))
    done = device.answer(sequences)
    assert sorted(sequence.sequence_id for sequence in done) == list(range(len(rows)))
    for sequence in done:
        length = lengths[sequence.sequence_id]
        count = min(length, sequence.max_new_tokens)
        assert sequence.answer_ids == [token_of(sequence, place, length) for place in range(count)]
    assert [sequence for plan in device.plans for sequence in plan.sequences] == sequences  # taken in their order
    if few_batch_sizes:
        assert len(set(device.batch_sizes)) <= 4  # 20, 5, 2, 1
    assert not device.scheduler.unfinished()


@pytest.mark.parametrize(
    "slots, few, expected",
    [
        (64, True, {1: 1, 2: 4, 4: 4, 5: 16, 16: 16, 17: 64, 64: 64}),
        (64, False, {1: 1, 17: 17, 64: 64}),
        (6, True, {1: 1, 2: 2, 3: 6, 6: 6}),
        (1, True, {1: 1}),
    ],
)
def test_batch_sizes(slots, few, expected):
    limits = SchedulerLimits(slots, 100, few_batch_sizes=few)
    assert {running: decode_batch_size(limits, running) for running in expected} == expected


def running_scheduler(limits: SchedulerLimits, lengths: dict[int, int]) -> Scheduler:
    """A scheduler with sequences in some slots: slot -> max_new_tokens."""
    scheduler = Scheduler(limits, StopRule(frozenset({STOP})))
    for slot, length in lengths.items():
        scheduler.running[slot] = TokenSequence(slot, [1, 2, 3], length)
    return scheduler


def test_compaction_fills_the_first_slots():
    scheduler = running_scheduler(SchedulerLimits(8, 100), {1: 5, 4: 5, 7: 5})
    plan = scheduler.plan_decode()
    assert plan.batch_size == 3 and plan.moves == [(4, 0), (7, 2)]
    assert [sequence.sequence_id for sequence in plan.sequences] == [4, 1, 7]
    assert plan.longest == 4  # three tokens of the prompt, and the one that the step adds


def test_nothing_moves_while_the_batch_size_stays():
    scheduler = running_scheduler(SchedulerLimits(8, 100, few_batch_sizes=True), {1: 5, 4: 5, 7: 5})
    plan = scheduler.plan_decode()
    assert plan.batch_size == 8 and not plan.moves and plan.sequences == scheduler.running


def test_it_looks_behind_only_with_several_steps():
    for steps, plans in ((1, 1), (4, 2)):
        scheduler = running_scheduler(SchedulerLimits(2, 100, decode_steps=steps), {0: 20, 1: 20})
        started = 0
        while not scheduler.must_finish_oldest():
            scheduler.plan_decode()
            started += 1
        assert started == plans
        assert scheduler.in_flight[-1].longest == 3 + plans * steps


def test_no_steps_are_started_that_no_sequence_can_use():
    scheduler = running_scheduler(SchedulerLimits(2, 100, decode_steps=4), {0: 4, 1: 3})
    assert scheduler.needs_decoding()
    scheduler.plan_decode()
    assert not scheduler.needs_decoding()  # all their tokens are in flight
    done = scheduler.finish([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert [sequence.answer_ids for sequence in done] == [[1, 2, 3, 4], [5, 6, 7]]
    assert not scheduler.has_running


def test_steps_in_flight_for_a_slots_former_sequence_are_dropped():
    scheduler = running_scheduler(SchedulerLimits(1, 100, decode_steps=2), {0: 20})
    scheduler.plan_decode()
    scheduler.plan_decode()
    assert [sequence.answer_ids for sequence in scheduler.finish([[7, STOP]])] == [[7, STOP]]
    (plan,) = scheduler.plan_prefills(iter([TokenSequence(1, [1], 20)]))
    assert plan.slots == [0]
    assert not scheduler.finish([[8, 9]])  # of the sequence before
    assert plan.sequences[0].answer_ids == []


def test_prefill_waits_for_enough_free_slots():
    """32 slots wait for two, so that prefills, which stall all sequences, are few."""
    scheduler = running_scheduler(SchedulerLimits(32, 100), dict.fromkeys(range(31), 20))
    source = iter([TokenSequence(number, [1, 2], 20) for number in range(5)])
    assert not list(scheduler.plan_prefills(source))
    scheduler.running[3] = None
    (plan,) = scheduler.plan_prefills(source)
    assert plan.slots == [3, 31] and [sequence.sequence_id for sequence in plan.sequences] == [0, 1]


def test_long_prompts_are_prefilled_alone():
    scheduler = Scheduler(SchedulerLimits(16, 10), StopRule(frozenset()))
    sequences = [TokenSequence(number, range(tokens), 5) for number, tokens in enumerate((5, 5, 4, 40, 2, 30))]
    plans = list(scheduler.plan_prefills(iter(sequences)))
    assert [[sequence.sequence_id for sequence in plan.sequences] for plan in plans] == [[0, 1], [2], [3], [4], [5]]
    assert [slot for plan in plans for slot in plan.slots] == list(range(6))


def test_a_stop_string_cuts_the_answer_where_it_is_complete():
    stop = StopRule(frozenset({STOP}), lambda ids: ids.index(5) + 1 if 5 in ids else None)
    sequence = TokenSequence(0, [1], 20)
    assert not stop.apply(sequence, [3, 4])
    assert stop.apply(sequence, [5, 6, STOP, 7])
    assert sequence.answer_ids == [3, 4, 5]


def test_after_a_failed_prefill_nothing_is_lost():
    """`unfinished` returns sequences in a failed prefill, those that decode and those that wait."""
    scheduler = running_scheduler(SchedulerLimits(8, 4), {0: 20})
    scheduler.running[0].answer_ids.append(7)
    prefills = scheduler.plan_prefills(iter([TokenSequence(number, [1, 2, 3, 4], 5) for number in range(1, 4)]))
    next(prefills)  # fails on the device
    unfinished = scheduler.unfinished()
    assert [sequence.sequence_id for sequence in unfinished] == [0, 1, 2, 3]
    assert not any(sequence.answer_ids for sequence in unfinished)
