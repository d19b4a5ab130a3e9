"""
Which sequences wait, run and finish: the engine's decisions in plain Python, without torch and without a model.

Sequences go in. Out come plans for the device: which tokens to prefill into which pages (`PrefillPlan`), and which
slots to decode (`DecodePlan`). The tokens that the device chose come back through `finish`. `Engine` drives it.

A slot is a row of the decode batch; a sequence's memory is its pages, see `pages.py`. It gets pages for its prompt
when it is admitted, and more before each decode plan. Where none are left, the sequence admitted last is preempted: it
waits again, and what it has answered so far is prefilled with its prompt.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from utils.common.numbers import ceil_div
from utils.inference.engine.pages import UNLIMITED_PAGES, HeldPages, PagePool, pages_for

MAX_ATTENDED_TOKENS = 1 << 17  # of prompts prefilled together: without kernels their keys are gathered
GROWTH_PAGES = 1  # for each running sequence, which stay free when another is admitted, so that few are preempted
MIN_FREE_SHARE = 16  # prefill once 1 / 16 of the slots are free: a prefill stalls every running sequence


@dataclass(eq=False)  # compared and hashed by identity: two sequences may have the same tokens
class TokenSequence:
    """
    One prompt and its answer.

    Args:
        sequence_id: with the seed it decides a sampled answer, whatever the batch.
        input_ids: tokens of the prompt, at least one.
        max_new_tokens: limit of the answer's length.
        adapter: number of its adapter among several, from 1; 0 is the base model.
        answer_ids: the answer so far; it ends with the token that stopped it.
    """

    sequence_id: int
    input_ids: Sequence[int]
    max_new_tokens: int
    adapter: int = 0
    answer_ids: list[int] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and answer so far."""
        return [*self.input_ids, *self.answer_ids]

    @property
    def max_cached_tokens(self) -> int:
        """Tokens that the cache has to hold at most: all but the answer's last one."""
        return len(self.input_ids) + self.max_new_tokens - 1


@dataclass(frozen=True)
class StopRule:
    """
    What ends an answer before its `max_new_tokens`.

    Args:
        token_ids: tokens that end an answer; they stay in it.
        find_end: number of tokens up to and including the one that completes a stop string, or None; it is called
            whenever an answer has grown. None where there are no stop strings.
        count_safe: number of tokens before anything that is, or may become, a stop string. Without it, an answer that
            may have stop strings is given out whole, at its end.
    """

    token_ids: frozenset[int]
    find_end: Callable[[Sequence[int]], int | None] | None = None
    count_safe: Callable[[Sequence[int]], int] | None = None

    def apply(self, sequence: TokenSequence, new_ids: Sequence[int]) -> bool:
        """Append tokens up to the end of the answer, and return whether it has ended."""
        ended = False
        for token in new_ids:
            sequence.answer_ids.append(token)
            ended = token in self.token_ids or len(sequence.answer_ids) == sequence.max_new_tokens
            if ended:
                break
        end = self.find_end(sequence.answer_ids) if self.find_end else None
        if end is not None:
            del sequence.answer_ids[end:]
        return ended or end is not None

    def finish_reason(self, answer_ids: Sequence[int]) -> str:
        """Return why a complete answer ended: "stop" for a token or a stop string, "length" for its limit."""
        if answer_ids[-1] in self.token_ids or (self.find_end and self.find_end(answer_ids) is not None):
            return "stop"
        return "length"

    def count_final(self, answer_ids: Sequence[int], ended: bool) -> int:
        """Return how many tokens of an answer can be given out because no stop string will cut them off."""
        if self.find_end is None or (ended and (self.count_safe is None or self.find_end(answer_ids) is None)):
            return len(answer_ids)
        return self.count_safe(answer_ids) if self.count_safe else 0


@dataclass(frozen=True)
class SchedulerLimits:
    """
    What plans must keep to; the device decides it, see `ModelRunner.limits`.

    Args:
        max_batch_size: number of slots, so of running sequences.
        prefill_tokens: most tokens of prompts that are prefilled together; a longer prompt goes alone, in chunks.
        decode_steps: that one `DecodePlan` stands for. With more than one, the next plan starts before the tokens of
            the one before are read back, so the device never waits for the host.
        batch_sizes: that may be decoded, ascending, the last one `max_batch_size`; empty: any.
        pages: of the KV cache.
        splits_prompts: whether a token of a prompt attends only to those before it. Else a prompt is prefilled whole,
            and shares no pages.
    """

    max_batch_size: int
    prefill_tokens: int
    decode_steps: int = 1
    batch_sizes: tuple[int, ...] = ()
    pages: int = UNLIMITED_PAGES
    splits_prompts: bool = True


@dataclass(frozen=True)
class PromptChunk:
    """
    Tokens of one sequence to prefill: those of its prompt and answer so far from `start` up to `stop`.

    Args:
        slot: where it decodes from now on; None if more chunks follow.
        pages: of all tokens up to `stop`, at least.
    """

    sequence: TokenSequence
    slot: int | None
    start: int
    stop: int
    pages: list[int]


@dataclass(frozen=True)
class PrefillPlan:
    """Tokens to prefill together. A later chunk may share pages that an earlier one fills."""

    chunks: list[PromptChunk]

    @property
    def sequences(self) -> list[TokenSequence]:
        """Whose they are."""
        return [chunk.sequence for chunk in self.chunks]

    @property
    def slots(self) -> list[int | None]:
        """Where they decode from now on; None if more chunks follow."""
        return [chunk.slot for chunk in self.chunks]


@dataclass(frozen=True)
class DecodePlan:
    """
    Decode steps for the first slots.

    Args:
        sequences: what each of the slots 0 to `batch_size` - 1 holds, or None.
        emptied: slots that no sequence has since the last plan, to be cleared first.
        moves: (from, to) slots, to be moved next.
        pages: (slot, number among its pages, page) to write into the page table after that.
        longest: tokens of the longest running sequence after the last step.
    """

    sequences: list[TokenSequence | None]
    emptied: list[int]
    moves: list[tuple[int, int]]
    pages: list[tuple[int, int, int]]
    longest: int

    @property
    def batch_size(self) -> int:
        """Slots that the step computes."""
        return len(self.sequences)


def decode_batch_size(limits: SchedulerLimits, running: int) -> int:
    """Return the smallest allowed batch size >= `running`."""
    return next((size for size in limits.batch_sizes if size >= running), running)


class Scheduler:
    """
    Decides what the engine prefills and decodes next.

    `running` has one entry a slot. `held` has the pages of all running sequences in the order of their admission, and
    last those of the first waiting one, when its prompt is in part prefilled.
    """

    def __init__(self, limits: SchedulerLimits, stop: StopRule):
        self.limits, self.stop = limits, stop
        self.running: list[TokenSequence | None] = [None] * limits.max_batch_size
        self.waiting: deque[TokenSequence] = deque()
        self.in_flight: deque[DecodePlan] = deque()  # started, and not finished
        self.min_free = ceil_div(limits.max_batch_size, MIN_FREE_SHARE)
        self.pool = PagePool(limits.pages, limits.splits_prompts)
        self.held: dict[TokenSequence, HeldPages] = {}
        self.emptied: set[int] = set()  # slots whose sequence has left since the last decode plan
        # The last sequence that found too few pages, and how many: with no more, its prompt is not hashed again.
        self.refused: tuple[TokenSequence | None, int] = (None, 0)
        self.prefilled_tokens = 0  # so far: what shared pages save is not in it

    @property
    def has_running(self) -> bool:
        """Whether any sequence has pages, so is running or in part prefilled."""
        return bool(self.held)

    def plan_prefills(self, source: Iterator[TokenSequence]) -> Iterator[PrefillPlan]:
        """
        Take sequences for free slots and pages out of `source`, in its order, and yield what to prefill together.

        Nothing is taken while only a few slots are free. The sequences of a plan are running once it is yielded. Where
        chunks of a prompt are still to come, it is not, and decode steps of the others are first.

        Raises:
            MemoryError: a sequence that has the cache for itself finds too few pages.
        """
        continues = bool(self.waiting) and self.waiting[0] in self.held
        if not continues and self.running.count(None) < self.min_free:
            return
        while chunks := self._next_chunks(source):
            self.prefilled_tokens += sum(chunk.stop - chunk.start for chunk in chunks)
            yield PrefillPlan(chunks)
            if chunks[-1].slot is None:
                return

    def _next_chunks(self, source: Iterator[TokenSequence]) -> list[PromptChunk]:
        chunks, room, attended = [], self.limits.prefill_tokens, 0
        for slot in [slot for slot, sequence in enumerate(self.running) if sequence is None]:
            self.waiting.extend(islice(source, 0 if self.waiting else 1))
            if not self.waiting or not self._admit(self.waiting[0]):
                break
            sequence = self.waiting[0]
            held, token_ids = self.held[sequence], sequence.token_ids
            start, stop = held.filled, len(token_ids) - 1  # the last one is left for the first decode step
            attended += stop
            if chunks and (stop - start > room or attended > MAX_ATTENDED_TOKENS):
                break
            if self.limits.splits_prompts:
                stop = min(stop, start + room)
            held.filled = stop
            self.pool.publish(held, token_ids[:stop], sequence.adapter)
            room -= stop - start
            if stop < len(token_ids) - 1:
                return [PromptChunk(sequence, None, start, stop, held.pages)]
            self.running[slot] = self.waiting.popleft()
            chunks.append(PromptChunk(sequence, slot, start, stop, held.pages))
        return chunks

    def _admit(self, sequence: TokenSequence) -> bool:
        """Give a waiting sequence the pages of its prompt, if there are enough."""
        if sequence in self.held:
            return True
        reserve = GROWTH_PAGES * len(self.held)
        refused, too_few = self.refused
        if self.held and sequence is refused and self.pool.available - reserve <= too_few:
            return False
        held = self.pool.hold(sequence.token_ids[:-1], sequence.adapter, reserve)
        if held is not None:
            self.held[sequence] = held
        elif self.held:
            self.refused = sequence, self.pool.available - reserve
        else:
            raise MemoryError(f"no memory for a sequence of {len(sequence.token_ids)} tokens in the KV cache")
        return held is not None

    def needs_decoding(self) -> bool:
        """Whether any sequence may need tokens beyond the steps already in flight."""
        in_flight = self._steps_in_flight()
        return any(
            len(sequence.answer_ids) + in_flight[sequence] < sequence.max_new_tokens
            for sequence in self.running
            if sequence
        )

    def _steps_in_flight(self) -> Counter[TokenSequence | None]:
        steps: Counter[TokenSequence | None] = Counter()
        for plan in self.in_flight:
            steps.update(dict.fromkeys(plan.sequences, self.limits.decode_steps))
        return steps

    def must_finish_oldest(self) -> bool:
        """Whether the oldest plan is to be finished before the next one starts."""
        return len(self.in_flight) > int(self.limits.decode_steps > 1)

    def plan_decode(self) -> DecodePlan:
        """
        Plan the next decode steps, which are in flight from now on. At least one sequence must run.

        Raises:
            MemoryError: a sequence that has the cache for itself finds too few pages.
        """
        new_pages = self._give_pages()
        emptied = [slot for slot in sorted(self.emptied) if self.running[slot] is None]
        self.emptied.clear()
        size, moves = self._compact()
        slots = {sequence: slot for slot, sequence in enumerate(self.running)}
        pages = [
            (slots[sequence], first + number, page)
            for sequence, (first, pages) in new_pages.items()
            for number, page in enumerate(pages)
        ]
        longest = max(len(sequence.input_ids) + len(sequence.answer_ids) for sequence in self.running if sequence)
        longest += self.limits.decode_steps * (1 + len(self.in_flight))
        plan = DecodePlan(self.running[:size], emptied, moves, pages, longest)
        self.in_flight.append(plan)
        return plan

    def _give_pages(self) -> dict[TokenSequence, tuple[int, list[int]]]:
        """Give each running sequence pages for the next steps; return how many it had, and the new ones."""
        in_flight, new_pages, running = self._steps_in_flight(), {}, set(self.running)
        for sequence in [sequence for sequence in self.held if sequence in running]:
            if sequence not in self.held:  # preempted for one admitted earlier
                break
            held = self.held[sequence]
            tokens = len(sequence.input_ids) + len(sequence.answer_ids) - 1
            tokens += in_flight[sequence] + self.limits.decode_steps
            missing = pages_for(min(tokens, sequence.max_cached_tokens)) - len(held.pages)
            while missing > self.pool.available and sequence in self.held:
                self._preempt_last()
            if missing > 0 and sequence in self.held:
                new_pages[sequence] = len(held.pages), self.pool.extend(held, missing)
        return new_pages

    def _preempt_last(self) -> None:
        """Let the sequence admitted last wait again; its steps in flight will be dropped."""
        if len(self.held) == 1:
            raise MemoryError("no memory for one sequence in the KV cache")
        sequence = next(reversed(self.held))
        if sequence in self.running:
            self._leave(sequence)
            self.waiting.appendleft(sequence)
            for plan in self.in_flight:
                plan.sequences[:] = [None if other is sequence else other for other in plan.sequences]
        else:  # in part prefilled, so the first that waits
            self.pool.release(self.held.pop(sequence))

    def _leave(self, sequence: TokenSequence) -> None:
        """Take slot and pages from a running sequence. Those that its known tokens fill are kept for others."""
        slot = self.running.index(sequence)
        self.running[slot] = None
        self.emptied.add(slot)
        held = self.held.pop(sequence)
        self.pool.publish(held, sequence.token_ids[:-1], sequence.adapter)
        self.pool.release(held)

    def _compact(self) -> tuple[int, list[tuple[int, int]]]:
        """Move running sequences into the first slots if the batch size shrinks by it; return it and the moves."""
        busy = [slot for slot, sequence in enumerate(self.running) if sequence]
        size = decode_batch_size(self.limits, len(busy))
        moving = [slot for slot in busy if slot >= size]
        holes = [slot for slot in range(size) if self.running[slot] is None]
        moves = list(zip(moving, holes, strict=False))  # there may be more holes
        for source, target in moves:
            self.running[target], self.running[source] = self.running[source], None
        return size, moves

    def finish(self, token_ids: Sequence[Sequence[int]]) -> list[TokenSequence]:
        """
        Add the tokens of the oldest plan in flight to its sequences, and return those that are complete.

        Args:
            token_ids: (batch size, decode steps) of the plan.
        """
        plan = self.in_flight.popleft()
        complete = []
        for sequence, ids in zip(plan.sequences, token_ids, strict=True):
            # One that was complete before this plan's steps has no pages any more.
            if sequence in self.held and self.stop.apply(sequence, ids):
                self._leave(sequence)
                complete.append(sequence)
        return complete

    def cancel(self, sequence: TokenSequence) -> None:
        """Take a sequence out of its slot or the queue, if it is in one; `finish` will drop its tokens in flight."""
        if sequence in self.running:
            self._leave(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            if sequence in self.held:  # in part prefilled
                self.pool.release(self.held.pop(sequence))

    def unfinished(self) -> list[TokenSequence]:
        """Return the sequences taken and not complete, their answers cleared, for a caller that retries them."""
        sequences = [*filter(None, self.running), *self.waiting]
        for sequence in sequences:
            sequence.answer_ids.clear()
        return sequences
