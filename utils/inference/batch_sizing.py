"""
How many sequences, and of what lengths, share a batch in the free memory: sequences in, groups of them out.

Every sequence of a batch takes a KV-cache slot as long as the longest one needs. A long sequence would thus leave
memory for few others, so it gets a group of its own, but only then: a group is an engine of its own, with layers to
compile and graphs to capture. A sequence that cannot fit is not tried where the attempt would be fatal: on a host,
where Linux hands out memory that does not exist and then kills the process, and on a sharded model, whose other
processes would wait for the one that failed. `BatchGenerator` calls this.
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

from utils.common.numbers import ceil_div
from utils.common.processes import world_size
from utils.distributed.collectives import gather_from_all
from utils.inference.engine import can_serve
from utils.inference.engine.attention import has_decode_kernels
from utils.inference.engine.kv_cache import kv_bytes_per_token
from utils.inference.engine.model_runner import round_to_slot
from utils.inference.engine.prefill import MAX_MASKED_PREFILL_TOKENS, MAX_PREFILL_TOKENS
from utils.inference.engine.scheduler import TokenSequence
from utils.inference.work_queue import Replica

MAX_GPU_BATCH_SIZE = 256  # with more, too many slots are empty when a job of some thousand rows ends
MAX_CPU_BATCH_SIZE = 16
USABLE_SHARE = 0.9  # of the free memory: the counts are not exact
MASK_BYTES = 8  # per pair of tokens: a mask as bool, the same as float32, and a copy in between
BATCH_SIZE_MULTIPLE = 16  # batch sizes above it that memory dictates are rounded down
UNLIMITED_BYTES = 1 << 62
OUT_OF_MEMORY_TEXT = re.compile(
    "out of memory|(?:can't|cannot) allocate|bad_alloc|could not create a memory|alloc_failed", re.I
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the host is out of memory, as torch, C++ or Python report it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY_TEXT.search(str(error)) is not None


def free_bytes(device: torch.device) -> int:
    """Memory this process may still take: a GPU's, or its share of the host's within container and process limits."""
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
    """Free bytes of each control group around this process; file pages that it can give back count as free."""
    limits = [UNLIMITED_BYTES]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if not kinds:  # version 2
            root, names, cache = Path("/sys/fs/cgroup"), ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in kinds.split(","):
            root, cache = Path("/sys/fs/cgroup/memory"), "total_inactive_file"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = root / path.lstrip("/")
        for directory in (group, *group.parents)[: len(group.parts) - len(root.parts) + 1]:
            with suppress(OSError, ValueError):  # not visible in the container; or "max", which is no limit
                limit, used = (int((directory / name).read_text()) for name in names)
                state = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
                limits.append(limit - used + int(state.get(cache, 0)))
    return limits


def slot_tokens(sequence: TokenSequence) -> int:
    """Tokens of the KV-cache slot that a sequence needs, as the engine rounds them."""
    return round_to_slot(len(sequence.input_ids) + sequence.max_new_tokens)


@dataclass(frozen=True)
class MemoryBudget:
    """
    The memory for KV cache and activations, and what a sequence takes of it.

    Args:
        free: bytes.
        token_bytes: of one token of one sequence in the cache.
        prefill_bytes: of one token of a prompt during prefill.
        prefill_tokens: that are prefilled together, unless one prompt has more.
        has_mask: whether prefill takes a mask of tokens x tokens.
        pads: whether transformers' `generate` serves, which pads prompts and grows its cache by copies.
        skips: whether sequences that do not fit are not tried, see the top of this file.
        max_batch_size: whatever the memory.
    """

    free: int
    token_bytes: int
    prefill_bytes: int
    prefill_tokens: int
    has_mask: bool
    pads: bool
    skips: bool
    max_batch_size: int

    @classmethod
    def of(cls, model: PreTrainedModel, device: torch.device, replica: Replica) -> "MemoryBudget":
        """Return the smallest budget of all processes, so that all form the same groups; every process must call."""
        config, has_kernels = model.config, has_decode_kernels(device, model.dtype)
        on_gpu = model.get_input_embeddings().weight.device.type == "cuda"
        intermediate_size = getattr(config, "intermediate_size", 4 * config.hidden_size)
        return cls(
            free=int(USABLE_SHARE * min(gather_from_all(free_bytes(device)))),
            token_bytes=ceil_div(kv_bytes_per_token(model), replica.processes),
            prefill_bytes=(6 * config.hidden_size + 3 * intermediate_size) * model.dtype.itemsize,
            prefill_tokens=MAX_PREFILL_TOKENS if has_kernels else MAX_MASKED_PREFILL_TOKENS,
            has_mask=not has_kernels,
            pads=not can_serve(model),
            skips=device.type == "cpu" or replica.group is not None,
            max_batch_size=MAX_GPU_BATCH_SIZE if on_gpu else MAX_CPU_BATCH_SIZE,
        )

    def batch_size_for(self, longest: TokenSequence) -> int:
        """Return how many sequences fit if `longest` is the longest; 0 if it does not fit itself."""
        tokens, cache = len(longest.input_ids), self.token_bytes * slot_tokens(longest)
        if self.pads:
            return self.free // (2 * cache + tokens * self.prefill_bytes + MASK_BYTES * tokens**2)
        tokens = max(tokens, self.prefill_tokens)
        prefill = tokens * self.prefill_bytes + self.has_mask * MASK_BYTES * tokens**2
        return max(self.free - prefill, 0) // cache


@dataclass(frozen=True)
class BatchGroup:
    """Prompts that share batches of `batch_size`; `rows` has a list for each prompt, with a sequence an answer."""

    rows: list[list[TokenSequence]]
    batch_size: int

    @property
    def max_seq_len(self) -> int:
        """Tokens of a slot for the longest."""
        return slot_tokens(self.rows[-1][0])

    def share(self, replicas: int) -> int:
        """Sequences of one replica."""
        return ceil_div(len(self.rows), replicas) * len(self.rows[0])


def describe_groups(groups: Sequence[BatchGroup], batch_size: int, replicas: int) -> str:
    """
    Return the batch size of each group and why it is not another.

    >>> sequence = TokenSequence(0, [1] * 10, 20)
    >>> describe_groups([BatchGroup([[sequence]] * 5, 5)], 4000, 1)
    '5 (--batch_size 4000: no more rows are left)'
    """
    if not groups:
        return "none: no row fits into memory"
    lines = []
    for group in groups:
        if group.batch_size == batch_size:
            why = "--batch_size"
        elif group.batch_size == group.share(replicas):
            why = f"--batch_size {batch_size}: no more rows are left" if batch_size else "all rows at once"
        elif batch_size:
            why = f"--batch_size {batch_size} is more than memory holds"
        else:
            is_most = group.batch_size in (MAX_GPU_BATCH_SIZE, MAX_CPU_BATCH_SIZE)
            why = "with more, little is gained" if is_most else "as many as memory holds"
        size = f"{group.batch_size} ({why})"
        lines.append(f"{size}, up to {group.max_seq_len:,} tokens" if len(groups) > 1 else size)
    return "\n".join(lines)


def group_rows(
    rows: Sequence[list[TokenSequence]], budget: MemoryBudget, batch_size: int, replicas: int
) -> list[BatchGroup]:
    """
    Split prompts into groups wherever one group would halve the batch size that the shortest prompts could have.

    Args:
        rows: a list for each prompt with its sequences, sorted by length.
        batch_size: what the user asked for; 0 is as many as fit.
    """

    def share_of(prompts: int) -> int:
        """Sequences of one replica."""
        return ceil_div(prompts, replicas) * len(rows[0])

    groups: list[BatchGroup] = []
    most = batch_size or budget.max_batch_size
    first = 0
    while first < len(rows):
        for_shortest, end = budget.batch_size_for(rows[first][0]), first + 1
        while end < len(rows):
            wanted = min(most, for_shortest, share_of(end + 1 - first))
            if budget.batch_size_for(rows[end][0]) < max(1, wanted // 2):
                break
            end += 1
        group, share = list(rows[first:end]), share_of(end - first)
        tries_any_size = batch_size and not budget.skips
        size = most if tries_any_size else max(1, min(most, budget.batch_size_for(group[-1][0])))
        if not batch_size and BATCH_SIZE_MULTIPLE < size < share:
            size -= size % BATCH_SIZE_MULTIPLE
        groups.append(BatchGroup(group, min(size, share)))
        first = end
    return groups
