"""Rows shared out over the replicas of a model: each takes the next few from one queue when it has room."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

import torch
from torch.distributed.distributed_c10d import _get_default_store

MOST_AT_ONCE = 16  # rows
SHARES = 16  # so often at least a replica comes back for more
_queues = count()
T = TypeVar("T")


@dataclass(frozen=True)
class Replica:
    """The model that this process holds, whole or a part of it, among the others of its kind."""

    replicas: int = 1
    first: bool = True  # whether this process speaks for its replica
    leader: int = 0  # the rank of the one that does
    group: torch.distributed.ProcessGroup | None = None  # the replica's processes, over gloo, where it has several

    @property
    def processes(self) -> int:
        """Those that share it."""
        return 1 if self.group is None else torch.distributed.get_world_size(self.group)


SINGLE_REPLICA = Replica()


def share_of_rows(rows: Sequence[T], replica: Replica) -> Iterator[T]:
    """
    This replica's part of `rows`, which must be the same everywhere: each row goes to one replica, in order. A lone
    replica has them all. Every process must call it, and those of one replica ask for rows together.
    """
    number = next(_queues)
    if replica.replicas == 1:
        yield from rows
        return
    store = _get_default_store()
    step = min(max(len(rows) // (SHARES * replica.replicas), 1), MOST_AT_ONCE)
    while True:
        begin = torch.tensor(store.add(f"rows.{number}", step) - step if replica.first else 0)
        if replica.group is not None:
            torch.distributed.broadcast(begin, replica.leader, group=replica.group)
        if begin >= len(rows):
            return
        yield from rows[int(begin) : int(begin) + step]


class SharedCount:
    """Counts what all replicas have done."""

    def __init__(self, name: str, replica: Replica):
        self.name, self.shared, self.value = f"{name}.{next(_queues)}", replica.replicas > 1, 0

    def add(self, amount: int) -> int:
        """The sum of all that was added, by every process."""
        if self.shared:
            return _get_default_store().add(self.name, amount)
        self.value += amount
        return self.value
