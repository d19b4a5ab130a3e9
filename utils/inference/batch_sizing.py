"""
How many rows, of which lengths, are answered at once in the memory that is free: rows in, groups of them out.

Every row of a batch takes the cache of the longest, so long rows go apart from short ones where together they would
leave memory for few; and a row that does not fit is found before it is tried where an attempt would not be survived.
"""

import errno
import os
import re
import resource
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from utils.common.processes import world_size
from utils.distributed.collectives import gather_from_all
from utils.inference.engine import MOST_MASKED, WIDTH_GRAIN, can_serve, column_bytes, has_kernels
from utils.inference.engine.prefill import MOST_READ, TokenSequence
from utils.inference.work_queue import Replica

MOST_SLOTS = 256
CPU_SLOTS = 16
USABLE = 0.9  # of what is free: counts are not exact
MASK_BYTES = 8  # of a pair of tokens: a mask as bool, the same as float32, and one on the way
FULL = re.compile("out of memory|(?:can't|cannot) allocate|bad_alloc|could not create a memory|alloc_failed", re.I)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was not there: a device's, or the host's as torch, C++ and Python say it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and FULL.search(str(error)) is not None


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take: a GPU's, or the host's within the limits of container and process."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    free = min(psutil.virtual_memory().available, *_free_to_containers())
    free //= int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        free = min(free, address_space - psutil.Process().memory_info().vms)
    return max(free, 0)


def _free_to_containers() -> list[int]:
    """What each control group around this process has left; pages of files that it can give back count as free."""
    found = [1 << 62]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if not kinds:
            root, names, cache = Path("/sys/fs/cgroup"), ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in kinds.split(","):
            root, cache = Path("/sys/fs/cgroup/memory"), "total_inactive_file"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = root / path.lstrip("/")
        for directory in (group, *group.parents)[: len(group.parts) - len(root.parts) + 1]:
            with suppress(OSError, ValueError):  # outside of what the container sees; "max", which is no limit
                most, used = (int((directory / name).read_text()) for name in names)
                state = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
                found.append(most - used + int(state.get(cache, 0)))
    return found


def columns_of(task: TokenSequence) -> int:
    """Of the cache that a row takes, as the engine rounds them."""
    return -(-(len(task.input_ids) + task.max_new_tokens) // WIDTH_GRAIN) * WIDTH_GRAIN


@dataclass(frozen=True)
class MemoryBudget:
    """The memory for caches and for what is computed, in bytes; and what a row takes of it."""

    free: int
    column: int  # of one token of one row in the cache
    token: int  # of one token of a prompt while it is read
    most_read: int  # tokens that are read at once, unless one prompt has more
    masked: bool  # whether prompts are read with a mask of tokens x tokens
    plain: bool  # whether transformers' `generate` serves: it pads prompts, and grows its cache by copies
    strict: bool  # whether what does not fit is not tried: Linux ends a process; other shards would wait for ever
    limit: int  # rows at once

    @classmethod
    def of(cls, model: PreTrainedModel, device: torch.device, replica: Replica) -> "MemoryBudget":
        """The least that any process has, so that all make the same groups; every process must call it."""
        config, kernels = model.config, has_kernels(device, model.dtype)
        on_gpu = model.get_input_embeddings().weight.device.type == "cuda"
        inner = getattr(config, "intermediate_size", 4 * config.hidden_size)
        return cls(
            free=int(USABLE * min(gather_from_all(free_bytes(device)))),
            column=-(-column_bytes(model) // replica.processes),
            token=(6 * config.hidden_size + 3 * inner) * model.dtype.itemsize,
            most_read=MOST_READ if kernels else MOST_MASKED,
            masked=not kernels,
            plain=not can_serve(model),
            strict=device.type == "cpu" or replica.group is not None,
            limit=MOST_SLOTS if on_gpu else CPU_SLOTS,
        )

    def slots(self, task: TokenSequence) -> int:
        """How many rows fit, the longest of which is `task`."""
        tokens, cache = len(task.input_ids), self.column * columns_of(task)
        if self.plain:
            return self.free // (2 * cache + tokens * self.token + MASK_BYTES * tokens**2)
        tokens = max(tokens, self.most_read)
        return max(self.free - tokens * self.token - self.masked * MASK_BYTES * tokens**2, 0) // cache


@dataclass(frozen=True)
class BatchGroup:
    """Rows that share batches, with the answers of one row in one list, and how many there are in a batch."""

    rows: list[list[TokenSequence]]
    slots: int

    @property
    def columns(self) -> int:
        return columns_of(self.rows[-1][0])


def group_rows(
    rows: Sequence[list[TokenSequence]], room: MemoryBudget, batch_size: int, replicas: int
) -> list[BatchGroup]:
    """
    Args:
        rows: in the order of their lengths.
        batch_size: what was asked for; 0 is as many as fit.

    Returns:
        One group, unless that would leave memory for less than half as many rows at once as the shortest rows' own:
        for every group costs time, on a GPU that of compiling and capturing.
    """

    def share_of(number: int) -> int:
        """Answers that a replica makes of so many rows."""
        return -(-number // replicas) * len(rows[0])

    groups: list[BatchGroup] = []
    most = batch_size or room.limit
    first = 0
    while first < len(rows):
        of_shortest, end = room.slots(rows[first][0]), first + 1
        while end < len(rows):
            wanted = min(most, of_shortest, share_of(end + 1 - first))
            if room.slots(rows[end][0]) < max(1, wanted // 2):
                break
            end += 1
        group, share = list(rows[first:end]), share_of(end - first)
        slots = most if batch_size and not room.strict else max(1, min(most, room.slots(group[-1][0])))
        if not batch_size and 16 < slots < share:
            slots -= slots % 16
        groups.append(BatchGroup(group, min(slots, share)))
        first = end
    return groups
