"""
Share rows out over replicas: each fetches the next few when it is free.

In: the same rows on every process. Out: this replica's share, while it works. Called by batch inference. The queue is
a counter in the launcher's store. Replicas share nothing else: a slow one takes fewer rows, and no process serves the
others. A replica is one process, unless tensor parallelism shards the model over several, which then fetch together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

import torch
from torch.distributed.distributed_c10d import _get_default_store

MAX_FETCH = 16  # rows: the most that one replica has left when the queue is empty
MIN_FETCHES = 16  # per replica, so that the tail stays balanced
_key_numbers = count()  # every process makes its queues and counters in the same order: the number names them
T = TypeVar("T")


@dataclass(frozen=True)
class Replica:
    """This process's data-parallel replica: how many there are, its leader, its tensor-parallel group."""

    replicas: int = 1
    first: bool = True  # whether this process is the leader, which fetches rows and writes answers
    leader: int = 0  # its rank
    group: torch.distributed.ProcessGroup | None = None  # the replica's processes, over gloo; None for a single one
    reason: str = ""  # of its number of processes, for the header

    @property
    def processes(self) -> int:
        """Number of processes that share this replica."""
        return 1 if self.group is None else torch.distributed.get_world_size(self.group)


SINGLE_REPLICA = Replica()


def fetch_share(rows: Sequence[T], replica: Replica) -> Iterator[T]:
    """
    Yield this replica's share of `rows`, in order; each row goes to one replica.

    Every process must call it with the same rows. Those of one replica must iterate together.
    """
    number = next(_key_numbers)
    if replica.replicas == 1:
        yield from rows
        return
    store = _get_default_store()
    fetch_size = min(max(len(rows) // (MIN_FETCHES * replica.replicas), 1), MAX_FETCH)
    while True:
        start = torch.tensor(store.add(f"rows.{number}", fetch_size) - fetch_size if replica.first else 0)
        if replica.group is not None:
            torch.distributed.broadcast(start, replica.leader, group=replica.group)
        if start >= len(rows):
            return
        yield from rows[int(start) : int(start) + fetch_size]


class SharedCount:
    """A counter that all replicas add to."""

    def __init__(self, name: str, replica: Replica):
        self.key, self.shared, self.value = f"{name}.{next(_key_numbers)}", replica.replicas > 1, 0

    def add(self, amount: int) -> int:
        """Add `amount`, and return the sum over all processes."""
        if self.shared:
            return _get_default_store().add(self.key, amount)
        self.value += amount
        return self.value
