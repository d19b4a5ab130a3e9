"""
Which sequences wait, run and finish: the engine's decisions in plain Python, without torch and without a model.

Sequences go in. Out come plans for the device: which prompts to prefill into which slots (`PrefillPlan`), and which
slots to decode (`DecodePlan`). The tokens that the device chose come back through `finish`. `Engine` drives it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from utils.common.numbers import ceil_div

MIN_FREE_SHARE = 16  # prefill once 1 / 16 of the slots are free: a prefill stalls every running sequence
GRAPH_SIZE_RATIO = 4  # between captured batch sizes: each one costs seconds to compile and capture


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
        prefill_tokens: most tokens of prompts that are prefilled together; a longer prompt goes alone.
        decode_steps: that one `DecodePlan` stands for. With more than one, the next plan starts before the tokens of
            the one before are read back, so the device never waits for the host.
        few_batch_sizes: decode only batch sizes max_batch_size / 4^k, because each is compiled and captured.
    """

    max_batch_size: int
    prefill_tokens: int
    decode_steps: int = 1
    few_batch_sizes: bool = False


@dataclass(frozen=True)
class PrefillPlan:
    """Prompts to prefill together, and the slot of each."""

    sequences: list[TokenSequence]
    slots: list[int]


@dataclass(frozen=True)
class DecodePlan:
    """
    Decode steps for the first slots.

    Args:
        sequences: what each of the slots 0 to `batch_size` - 1 holds, or None.
        moves: (from, to) slots to copy before the first step.
        longest: tokens of the longest running sequence after the last step.
    """

    sequences: list[TokenSequence | None]
    moves: list[tuple[int, int]]
    longest: int

    @property
    def batch_size(self) -> int:
        """Slots that the step computes."""
        return len(self.sequences)


def decode_batch_size(limits: SchedulerLimits, running: int) -> int:
    """Return the smallest allowed batch size >= `running`."""
    if not limits.few_batch_sizes:
        return running
    size = limits.max_batch_size
    while running <= (smaller := ceil_div(size, GRAPH_SIZE_RATIO)) < size:
        size = smaller
    return size


class Scheduler:
    """Decides what the engine prefills and decodes next. `running` has one entry a slot."""

    def __init__(self, limits: SchedulerLimits, stop: StopRule):
        self.limits, self.stop = limits, stop
        self.running: list[TokenSequence | None] = [None] * limits.max_batch_size
        self.waiting: deque[TokenSequence] = deque()
        self.in_flight: deque[DecodePlan] = deque()  # started, and not finished
        self.min_free = ceil_div(limits.max_batch_size, MIN_FREE_SHARE)

    @property
    def has_running(self) -> bool:
        """Whether any slot has a sequence."""
        return any(self.running)

    def plan_prefills(self, source: Iterator[TokenSequence]) -> Iterator[PrefillPlan]:
        """
        Take sequences for the free slots out of `source`, in its order, and yield which to prefill together.

        Nothing is taken while only a few slots are free. The sequences of a plan are running once it is yielded.
        """
        free = [slot for slot, sequence in enumerate(self.running) if sequence is None]
        if len(free) < self.min_free:
            return
        self.waiting.extend(islice(source, len(free) - len(self.waiting)))
        while self.waiting:
            batch = self._next_prefill_batch()
            slots, free = free[: len(batch)], free[len(batch) :]
            for slot, sequence in zip(slots, batch, strict=True):
                self.running[slot] = sequence
            yield PrefillPlan(batch, slots)

    def _next_prefill_batch(self) -> list[TokenSequence]:
        batch, tokens = [], 0
        while self.waiting:
            tokens += len(self.waiting[0].input_ids) - 1  # the last one is left for the first decode step
            if batch and tokens > self.limits.prefill_tokens:
                break
            batch.append(self.waiting.popleft())
        return batch

    def needs_decoding(self) -> bool:
        """Whether any sequence may need tokens beyond the steps already in flight."""
        decoding = {sequence for plan in self.in_flight for sequence in plan.sequences}
        return any(
            len(sequence.answer_ids) + self.limits.decode_steps * (sequence in decoding) < sequence.max_new_tokens
            for sequence in self.running
            if sequence
        )

    def must_finish_oldest(self) -> bool:
        """Whether the oldest plan is to be finished before the next one starts."""
        return len(self.in_flight) > int(self.limits.decode_steps > 1)

    def plan_decode(self) -> DecodePlan:
        """Plan the next decode steps, which are in flight from now on. At least one sequence must run."""
        size, moves = self._compact()
        longest = max(len(sequence.input_ids) + len(sequence.answer_ids) for sequence in self.running if sequence)
        longest += self.limits.decode_steps * (1 + len(self.in_flight))
        plan = DecodePlan(self.running[:size], moves, longest)
        self.in_flight.append(plan)
        return plan

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
        slots = {sequence: slot for slot, sequence in enumerate(self.running) if sequence}
        complete = []
        for sequence, ids in zip(plan.sequences, token_ids, strict=True):
            slot = slots.get(sequence)  # None if it was complete before this plan's steps
            if slot is not None and self.stop.apply(sequence, ids):
                self.running[slot] = None
                complete.append(sequence)
        return complete

    def cancel(self, sequence: TokenSequence) -> None:
        """Take a sequence out of its slot or the queue, if it is in one; `finish` will drop its tokens in flight."""
        if sequence in self.running:
            self.running[self.running.index(sequence)] = None
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def unfinished(self) -> list[TokenSequence]:
        """Return the sequences taken and not complete, their answers cleared, for a caller that retries them."""
        sequences = [sequence for sequence in self.running if sequence]
        for sequence in sequences:
            sequence.answer_ids.clear()
        return [*sequences, *self.waiting]
