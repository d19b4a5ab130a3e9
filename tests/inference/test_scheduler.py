"""The scheduler without a model: a device whose tokens are known, and what every schedule must keep to."""

import ast
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.common.numbers import ceil_div
from utils.inference.engine import scheduler as scheduler_module
from utils.inference.engine.model_runner import captured_batch_sizes
from utils.inference.engine.pages import PAGE_TOKENS, HeldPages, PagePool, pages_for
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
        self.tables: list[list[int]] = [[] for _ in self.slots]  # the pages of each slot
        self.cache: dict[tuple[int, int], int] = {}  # (page, place) -> token
        self.plans: list[PrefillPlan] = []
        self.batch_sizes: list[int] = []

    def prefill(self, plan: PrefillPlan) -> None:
        assert plan.chunks and len(set(plan.sequences)) == len(plan.chunks)
        tokens = sum(chunk.stop - chunk.start for chunk in plan.chunks)
        assert tokens <= self.limits.prefill_tokens or not self.limits.splits_prompts and len(plan.chunks) == 1
        slots = [chunk.slot for chunk in plan.chunks if chunk.slot is not None]
        assert len(set(slots)) == len(slots) and len(slots) >= len(plan.chunks) - 1
        for chunk in plan.chunks:
            sequence = chunk.sequence
            self.write(chunk.pages, sequence.token_ids, chunk.start, chunk.stop)
            self.check_cached(chunk.pages, sequence.token_ids[: chunk.stop])
            if chunk.slot is not None:
                assert chunk.stop == len(sequence.token_ids) - 1
                self.slots[chunk.slot], self.chosen[chunk.slot] = sequence, len(sequence.answer_ids)
                self.tables[chunk.slot] = list(chunk.pages)
        self.plans.append(plan)

    def write(self, pages: list[int], tokens: list[int], start: int, stop: int) -> None:
        for index in range(start, stop):
            self.cache[pages[index // PAGE_TOKENS], index % PAGE_TOKENS] = tokens[index]

    def check_cached(self, pages: list[int], tokens: list[int]) -> None:
        """The tokens that a sequence attends to are its own."""
        for index, token in enumerate(tokens):
            assert self.cache[pages[index // PAGE_TOKENS], index % PAGE_TOKENS] == token

    def decode(self) -> list[list[int]]:
        plan = self.scheduler.plan_decode()
        for slot in plan.emptied:
            self.slots[slot], self.tables[slot] = None, []
        for source, target in plan.moves:
            assert target < plan.batch_size <= source and self.scheduler.running[source] is None
            self.slots[target], self.chosen[target] = self.slots[source], self.chosen[source]
            self.tables[target] = self.tables[source]
            self.slots[source], self.tables[source] = None, []
        for slot, number, page in plan.pages:
            assert len(self.tables[slot]) == number and 0 < page < self.limits.pages
            self.tables[slot].append(page)
        for slot, sequence in enumerate(plan.sequences):
            assert self.slots[slot] is sequence
        assert not any(self.slots[plan.batch_size :])
        assert len(self.scheduler.in_flight) <= 2
        running = [sequence for sequence in plan.sequences if sequence]
        assert running == [sequence for sequence in self.scheduler.running if sequence]
        assert plan.batch_size == decode_batch_size(self.limits, len(running))
        self.batch_sizes.append(plan.batch_size)
        return [self.decode_slot(slot) for slot in range(plan.batch_size)]

    def decode_slot(self, slot: int) -> list[int]:
        sequence, tokens = self.slots[slot], []
        if sequence is None:  # a device computes something here too
            return [-1] * self.limits.decode_steps
        length = self.lengths[sequence.sequence_id]
        answer = [token_of(sequence, place, length) for place in range(self.chosen[slot] + self.limits.decode_steps)]
        for _ in range(self.limits.decode_steps):
            count = min(length, sequence.max_new_tokens)
            known = [*sequence.input_ids, *answer[: min(self.chosen[slot], count)]]
            if len(known) <= PAGE_TOKENS * len(self.tables[slot]):
                self.write(self.tables[slot], known, len(known) - 1, len(known))
            else:
                assert self.chosen[slot] >= count  # it has ended, and its last token goes to the scratch page
            self.check_cached(self.tables[slot], known[:-1])
            tokens.append(answer[self.chosen[slot]])
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
            if results and (self.scheduler.must_finish_oldest() or not decodes):
                done += self.scheduler.finish(results.popleft())


def test_it_needs_no_torch():
    tree = ast.parse(Path(scheduler_module.__file__).read_text(encoding="utf-8"))
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    ours = ["utils.common.numbers", "utils.inference.engine.pages"]
    assert sorted(modules) == ["collections", "collections.abc", "dataclasses", "itertools", *ours]


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
    batch_sizes = tuple({1, ceil_div(max_batch_size, 3), max_batch_size}) if few_batch_sizes else ()
    limits = SchedulerLimits(max_batch_size, prefill_tokens, decode_steps, tuple(sorted(batch_sizes)))
    sequences = [TokenSequence(i, range(prompt), most) for i, (prompt, _, most) in enumerate(rows)]
    lengths = {i: length for i, (_, length, _) in enumerate(rows)}
    device = KnownDevice(limits, lengths, StopRule(frozenset({STOP})))
    done = device.answer(sequences)
    assert sorted(sequence.sequence_id for sequence in done) == list(range(len(rows)))
    for sequence in done:
        length = lengths[sequence.sequence_id]
        count = min(length, sequence.max_new_tokens)
        assert sequence.answer_ids == [token_of(sequence, place, length) for place in range(count)]
    begun = [chunk.sequence for plan in device.plans for chunk in plan.chunks if chunk.slot is not None]
    assert begun == sequences  # taken in their order
    if few_batch_sizes:
        assert set(device.batch_sizes) <= set(batch_sizes)
    assert not device.scheduler.unfinished()


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 300), st.integers(1, 150)), min_size=1, max_size=12),
    max_batch_size=st.integers(1, 8),
    decode_steps=st.integers(1, 4),
    prefill_tokens=st.integers(1, 400),
    spare_pages=st.integers(0, 9),
    splits_prompts=st.booleans(),
)
def test_every_sequence_is_answered_once_whatever_the_memory(
    rows, max_batch_size, decode_steps, prefill_tokens, spare_pages, splits_prompts
):
    """Rows are (beginning of the prompt, its tokens, tokens of the answer); those that begin alike share pages."""
    sequences = [
        TokenSequence(i, [10 + start] * 130 + [*range(20, tokens)], 150) for i, (start, tokens, _) in enumerate(rows)
    ]
    pages = 1 + max(pages_for(sequence.max_cached_tokens) for sequence in sequences) + spare_pages
    limits = SchedulerLimits(max_batch_size, prefill_tokens, decode_steps, pages=pages, splits_prompts=splits_prompts)
    lengths = {i: length for i, (_, _, length) in enumerate(rows)}
    device = KnownDevice(limits, lengths, StopRule(frozenset({STOP})))
    done = device.answer(sequences)
    assert sorted(sequence.sequence_id for sequence in done) == list(range(len(rows)))
    for sequence in done:
        length = lengths[sequence.sequence_id]
        assert sequence.answer_ids == [token_of(sequence, place, length) for place in range(length)]
    scheduler = device.scheduler
    assert scheduler.pool.available == pages - 1 and not scheduler.held and not scheduler.pool.holders
    if not splits_prompts:
        assert not scheduler.pool.page_of


def test_the_sequence_admitted_last_is_preempted():
    """It waits before the others, loses its tokens in flight, and comes again with its answer so far."""
    limits = SchedulerLimits(4, 200, decode_steps=4, pages=1 + 4)
    scheduler = Scheduler(limits, StopRule(frozenset({STOP})))
    first, second, third = (TokenSequence(number, [number] * 54, 20) for number in range(1, 4))
    source = iter([first, second, third])
    (plan,) = scheduler.plan_prefills(source)
    assert plan.sequences == [first, second] and scheduler.waiting == deque([third])  # two pages stay, to grow
    scheduler.pool.total = 1 + 3
    scheduler.plan_decode()
    scheduler.plan_decode()  # up to 53 + 8 tokens
    scheduler.finish([[1, 2, 3, 4], [5, 6, 7, 8]])
    plan = scheduler.plan_decode()
    assert scheduler.running == [first, None, None, None] and scheduler.waiting == deque([second, third])
    assert plan.sequences == [first] and plan.emptied == [1] and len(plan.pages) == 1
    for tokens in ([[1, 2, 3, 4], [0, 9, 9, 9]], [[9, 0, 9, 9]]):
        complete = scheduler.finish(tokens)
    assert complete == [first] and second.answer_ids == [5, 6, 7, 8]
    (plan,) = scheduler.plan_prefills(source)
    assert [(chunk.sequence, chunk.start, chunk.stop) for chunk in plan.chunks] == [(second, 0, 57), (third, 0, 53)]


def test_a_sequence_that_the_whole_cache_cannot_hold():
    scheduler = Scheduler(SchedulerLimits(4, 100, pages=1 + 2), StopRule(frozenset({STOP})))
    with pytest.raises(MemoryError, match="no memory for a sequence of 200 tokens"):
        list(scheduler.plan_prefills(iter([TokenSequence(0, range(200), 5)])))
    scheduler = Scheduler(SchedulerLimits(4, 200, pages=1 + 2), StopRule(frozenset({STOP})))
    list(scheduler.plan_prefills(iter([TokenSequence(0, range(129), 5)])))
    with pytest.raises(MemoryError, match="no memory for one sequence"):
        scheduler.plan_decode()


def test_prompts_that_begin_alike_share_pages():
    """Those of one prefill, those after it, and a chat's next turn, which begins with the last turn's answer."""
    scheduler = Scheduler(SchedulerLimits(4, 1000), StopRule(frozenset({STOP})))
    common = list(range(1000, 1500))
    first, second, third = (TokenSequence(number, [*common, *[number] * 30], 100) for number in range(3))
    other = TokenSequence(3, second.input_ids, 100, adapter=1)
    (plan,) = scheduler.plan_prefills(iter([first, second]))
    assert [(chunk.start, chunk.stop) for chunk in plan.chunks] == [(0, 529), (448, 529)]
    assert plan.chunks[0].pages[:7] == plan.chunks[1].pages[:7] and plan.chunks[0].pages[7] != plan.chunks[1].pages[7]
    (plan,) = scheduler.plan_prefills(iter([third, other]))
    assert [(chunk.start, chunk.stop) for chunk in plan.chunks] == [(448, 529), (0, 529)]  # an adapter's are its own
    assert scheduler.prefilled_tokens == 2 * 529 + 2 * 81
    scheduler.plan_decode()
    answer = [*range(1, 70), STOP]
    assert scheduler.finish([[token] for token in (5, 6, 7, 8)]) == []
    while first.answer_ids[-1] != STOP:
        scheduler.plan_decode()
        scheduler.finish([[answer[len(first.answer_ids)]], [6], [7], [8]])
    (plan,) = scheduler.plan_prefills(iter([TokenSequence(4, [*first.token_ids, 1, 2, 3], 10)]))
    assert [(chunk.start, chunk.stop) for chunk in plan.chunks] == [(576, 602)]  # nine pages of 599 cached tokens


def test_a_prompt_that_found_too_few_pages_is_hashed_again_once_there_are_more(monkeypatch):
    scheduler = Scheduler(SchedulerLimits(4, 1000, pages=1 + 6), StopRule(frozenset({STOP})))
    short, long = TokenSequence(1, range(60), 20), TokenSequence(2, range(100, 420), 20)  # one page, five
    source, asked, hold = iter([short, long]), [], scheduler.pool.hold
    monkeypatch.setattr(scheduler.pool, "hold", lambda *args: asked.append(args) or hold(*args))
    for token in (7, 7, 7, STOP):
        list(scheduler.plan_prefills(source))
        assert len(asked) == 2 and scheduler.running[0] is short and scheduler.waiting == deque([long])
        scheduler.plan_decode()
        scheduler.finish([[token]])
    list(scheduler.plan_prefills(source))
    assert len(asked) == 3 and scheduler.running[0] is long


def test_pages_that_nobody_holds_are_taken_when_needed():
    """The longest unused first, and of one sequence the last."""
    pool = PagePool(total=1 + 4)
    old, new = pool.hold(range(128), 0, 0), pool.hold(range(500, 628), 0, 0)
    pool.publish(old, range(128), 0)
    pool.publish(new, range(500, 628), 0)
    pool.release(old)
    pool.release(new)
    assert pool.available == 4
    held = pool.hold(range(900, 930), 0, 0)
    assert held.pages == [old.pages[1]]
    assert pool.hold(range(128), 0, 0).pages == [old.pages[0], new.pages[1]]
    assert pool.hold(range(64), 5, reserve=1) is None


@pytest.mark.parametrize(
    "slots, compiles, expected",
    [
        (64, True, (1, 4, 16, 64)),
        (64, False, (1, 2, 4, 8, 16, 32, 64)),
        (6, True, (1, 2, 6)),
        (6, False, (1, 2, 3, 6)),
        (1024, False, (1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024)),
        (1, False, (1,)),
    ],
)
def test_batch_sizes(slots, compiles, expected):
    sizes = captured_batch_sizes(slots, compiles)
    assert sizes == expected
    limits = SchedulerLimits(slots, 100, batch_sizes=sizes)
    for running in range(1, slots + 1):
        assert decode_batch_size(limits, running) == min(size for size in sizes if size >= running)
    assert decode_batch_size(SchedulerLimits(slots, 100), slots) == slots


def running_scheduler(limits: SchedulerLimits, lengths: dict[int, int]) -> Scheduler:
    """A scheduler with sequences in some slots: slot -> max_new_tokens."""
    scheduler = Scheduler(limits, StopRule(frozenset({STOP})))
    for slot, length in lengths.items():
        scheduler.running[slot] = sequence = TokenSequence(slot, [1, 2, 3], length)
        scheduler.held[sequence] = HeldPages([], [], 2)
        scheduler.pool.extend(scheduler.held[sequence], 1)
    return scheduler


def test_compaction_fills_the_first_slots():
    scheduler = running_scheduler(SchedulerLimits(8, 100), {1: 5, 4: 5, 7: 5})
    plan = scheduler.plan_decode()
    assert plan.batch_size == 3 and plan.moves == [(4, 0), (7, 2)]
    assert [sequence.sequence_id for sequence in plan.sequences] == [4, 1, 7]
    assert plan.longest == 4  # three tokens of the prompt, and the one that the step adds


def test_nothing_moves_while_the_batch_size_stays():
    scheduler = running_scheduler(SchedulerLimits(8, 100, batch_sizes=(2, 8)), {1: 5, 4: 5, 7: 5})
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
    assert plan.chunks[0].slot == 0
    assert not scheduler.finish([[8, 9]])  # of the sequence before
    assert plan.sequences[0].answer_ids == []


def test_prefill_waits_for_enough_free_slots():
    """32 slots wait for two, so that prefills, which stall all sequences, are few."""
    scheduler = running_scheduler(SchedulerLimits(32, 100), dict.fromkeys(range(31), 20))
    source = iter([TokenSequence(number, [1, 2], 20) for number in range(5)])
    assert not list(scheduler.plan_prefills(source))
    scheduler.running[3] = None
    (plan,) = scheduler.plan_prefills(source)
    assert [chunk.slot for chunk in plan.chunks] == [3, 31] and [
        sequence.sequence_id for sequence in plan.sequences
    ] == [0, 1]


def test_long_prompts_are_prefilled_alone():
    """Whole where their tokens attend in both directions."""
    scheduler = Scheduler(SchedulerLimits(16, 10, splits_prompts=False), StopRule(frozenset()))
    sequences = [TokenSequence(number, range(tokens), 5) for number, tokens in enumerate((5, 5, 4, 40, 2, 30))]
    plans = list(scheduler.plan_prefills(iter(sequences)))
    assert [[sequence.sequence_id for sequence in plan.sequences] for plan in plans] == [[0, 1], [2], [3], [4], [5]]
    assert [chunk.slot for plan in plans for chunk in plan.chunks] == list(range(6))


def test_long_prompts_are_prefilled_in_chunks_between_decode_steps():
    scheduler = running_scheduler(SchedulerLimits(16, 10), {0: 20})
    source = iter([TokenSequence(number, range(tokens), 5) for number, tokens in enumerate((4, 25, 6, 3), 1)])
    chunks = []
    for _ in range(3):
        plans = list(scheduler.plan_prefills(source))
        chunks.append([[(c.sequence.sequence_id, c.slot, c.start, c.stop) for c in plan.chunks] for plan in plans])
        scheduler.plan_decode()
        scheduler.finish([[7]] * len(scheduler.in_flight[0].sequences))
    assert chunks == [
        [[(1, 1, 0, 3)], [(2, None, 0, 10)]],
        [[(2, None, 10, 20)]],
        [[(2, 2, 20, 24), (3, 3, 0, 5)], [(4, 4, 0, 2)]],
    ]


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
    source = iter([TokenSequence(number, [1, 2, 3, 4], 5) for number in range(1, 4)])
    next(scheduler.plan_prefills(source))  # fails on the device
    unfinished = [*scheduler.unfinished(), *source]
    assert [sequence.sequence_id for sequence in unfinished] == [0, 1, 2, 3]
    assert not any(sequence.answer_ids for sequence in unfinished)
