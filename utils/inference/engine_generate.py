"""Batches through the engine: for models that lie on one device, whole or as this process's shard."""

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from transformers import PreTrainedModel

from utils.common.errors import RankError
from utils.inference.batch_sizing import BatchGroup, columns_of, is_out_of_memory
from utils.inference.engine import Engine
from utils.inference.engine.prefill import TokenSequence
from utils.inference.sampling import Sampling
from utils.inference.stop_strings import StopStrings
from utils.inference.work_queue import Replica


@dataclass
class EngineStats:
    """Where the seconds went."""

    preparing: float = 0.0  # compiling layers, capturing graphs
    reading: float = 0.0  # prompts
    batch_sizes: list[int] = field(default_factory=list)


class TaskQueue:
    """Tasks in the order of their lengths, which may be given back."""

    def __init__(self, tasks: Iterable[TokenSequence]):
        self.tasks, self.returned = iter(tasks), deque()

    def first(self) -> TokenSequence | None:
        if not self.returned:
            self.returned.extend(islice(self.tasks, 1))
        return self.returned[0] if self.returned else None

    def give_back(self, tasks: Iterable[TokenSequence]) -> None:
        self.returned.extendleft(sorted(tasks, key=lambda task: -len(task.input_ids)))

    def up_to(self, columns: int) -> Iterator[TokenSequence]:
        """Takes tasks as long as they need no more columns."""
        while (task := self.first()) is not None and columns_of(task) <= columns:
            yield self.returned.popleft()


def generate_by_engine(
    model: PreTrainedModel,
    source: Iterable[TokenSequence],
    group: BatchGroup,
    stop_ids: Sequence[int],
    sampling: Sampling,
    end: StopStrings,
    replica: Replica,
    clock: EngineStats,
) -> Iterator[TokenSequence]:
    """
    By the engine. Where memory runs out, half the tokens of cache from there on, in rows that are no longer than the
    next ones need; a task that finds none alone comes back without an answer.
    """
    queue = TaskQueue(source)
    slots, columns = group.slots, group.columns
    room = slots * columns  # tokens
    while (task := queue.first()) is not None:
        if columns_of(task) > columns:
            columns = columns_of(task)
            slots = max(1, min(slots, room // columns))
        clock.batch_sizes.append(slots)
        engine, lacking = None, False
        try:
            engine = Engine(model, slots, columns, stop_ids, sampling, end.find)
            yield from engine.answer(queue.up_to(columns))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            lacking = True
        finally:
            if engine:
                clock.preparing += engine.preparing
                clock.reading += engine.reading
        if not lacking:
            continue
        tried = f"out of memory with {slots} rows of up to {columns} tokens at once"
        if replica.group is not None:  # the others of a sharded model do not know of it
            raise RankError(f"{tried}: the same command with a smaller --batch_size goes on where this one was")
        queue.give_back(engine.unfinished() if engine else [])
        del engine
        torch.cuda.empty_cache()
        task = queue.first()
        if slots == 1 and columns == columns_of(task):
            yield next(queue.up_to(columns))
            continue
        room = slots * columns // 2
        columns = max(columns_of(task), min(2 * columns_of(task), columns, room))
        slots = max(1, min(slots, room // columns))
        print(f"{tried}: going on with {slots} of up to {columns}", file=sys.stderr, flush=True)
