"""
How many sequences share a batch, and how much KV cache they get in the free memory: sequences in, a `BatchPlan` out.

The cache is pages, so a sequence costs its own tokens, and one engine serves rows of all lengths. Rows at once are as
many as the memory holds of average length, half answered; where that was too many, the engine preempts some. A
sequence that cannot fit is not tried where the attempt would be fatal: on a host, where Linux hands out memory that
does not exist and then kills the process, and on a sharded model, whose other processes would wait for the one that
failed. `BatchGenerator` calls this.
"""

import errno
import os
import re
import resource
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import psutil
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from utils.common.numbers import ceil_div
from utils.common.processes import world_size
from utils.distributed.collectives import gather_from_all
from utils.inference.engine import can_serve
from utils.inference.engine.attention import has_decode_kernels
from utils.inference.engine.models import serve
from utils.inference.engine.pages import PAGE_TOKENS, pages_for
from utils.inference.engine.prefill import MAX_HOST_PREFILL_TOKENS, MAX_PREFILL_TOKENS
from utils.inference.engine.scheduler import MAX_ATTENDED_TOKENS, TokenSequence
from utils.inference.work_queue import Replica

MAX_GPU_BATCH_SIZE = 1024  # with more, a step is bound by arithmetic, and a row waits longer for its answer
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


def cache_tokens_of(sequence: TokenSequence) -> int:
    """Return the tokens of the KV cache that a sequence needs at most: its pages'."""
    return pages_for(sequence.max_cached_tokens) * PAGE_TOKENS


@dataclass(frozen=True)
class MemoryBudget:
    """
    The memory for KV cache and activations, and what a sequence takes of it.

    Args:
        free: bytes.
        token_bytes: of one token of one sequence in the cache.
        gather_bytes: of one cached token that a prefill attends to, gathered from the pages of one layer where
            attention has no kernel.
        prefill_bytes: of one token of a prompt during prefill.
        prefill_tokens: that are prefilled together.
        splits_prompts: whether a longer prompt is prefilled in chunks; else it is prefilled whole.
        repeat_bytes: of one such token where attention has no kernel, which repeats key heads for their query heads.
        has_mask: whether prefill takes a mask of queries x keys.
        pads: whether transformers' `generate` serves, which pads prompts and grows its cache by copies.
        skips: whether sequences that do not fit are not tried, see the top of this file.
        max_batch_size: whatever the memory.
    """

    free: int
    token_bytes: int
    gather_bytes: int
    prefill_bytes: int
    prefill_tokens: int
    splits_prompts: bool
    repeat_bytes: int
    has_mask: bool
    pads: bool
    skips: bool
    max_batch_size: int

    @classmethod
    def of(cls, model: PreTrainedModel, device: torch.device, replica: Replica) -> "MemoryBudget":
        """Return the smallest budget of all processes, so that all plan the same; every process must call."""
        config, has_kernels = model.config, has_decode_kernels(device, model.dtype)
        on_gpu = model.get_input_embeddings().weight.device.type == "cuda"
        intermediate_size = getattr(config, "intermediate_size", 4 * config.hidden_size)
        pads = not can_serve(model)
        served = serve(model.get_base_model() if isinstance(model, PeftModel) else model)
        token_bytes = ceil_div(served.cache_bytes_per_token, replica.processes)
        gather_bytes = ceil_div(token_bytes, config.num_hidden_layers)
        heads = config.num_attention_heads
        group = heads // (getattr(config, "num_key_value_heads", None) or heads)
        return cls(
            free=int(USABLE_SHARE * min(gather_from_all(free_bytes(device)))),
            token_bytes=token_bytes,
            gather_bytes=0 if has_kernels else gather_bytes,
            prefill_bytes=(6 * config.hidden_size + 3 * intermediate_size) * model.dtype.itemsize,
            prefill_tokens=MAX_PREFILL_TOKENS if has_kernels else MAX_HOST_PREFILL_TOKENS,
            splits_prompts=served.splits_prompts and not pads,
            repeat_bytes=0 if has_kernels else group * gather_bytes,
            has_mask=not has_kernels,
            pads=pads,
            skips=device.type == "cpu" or replica.group is not None,
            max_batch_size=MAX_GPU_BATCH_SIZE if on_gpu else MAX_CPU_BATCH_SIZE,
        )

    def cache_tokens_beside(self, prompt_tokens: int) -> int:
        """Return how many cached tokens fit beside the prefill of prompts of up to that length."""
        tokens = self.prefill_tokens if self.splits_prompts else max(prompt_tokens, self.prefill_tokens)
        keys = max(prompt_tokens, tokens)
        gathered = max(prompt_tokens, min(MAX_ATTENDED_TOKENS, prompt_tokens * self.max_batch_size))
        prefill = tokens * self.prefill_bytes + prompt_tokens * self.repeat_bytes
        prefill += self.has_mask * MASK_BYTES * tokens * keys
        prefill += self.splits_prompts * gathered * self.gather_bytes
        return max(self.free - prefill, 0) // self.token_bytes

    def fits(self, sequence: TokenSequence) -> bool:
        """Whether a sequence fits that has the memory for itself."""
        if self.pads:
            return self.padded_batch_size(sequence) > 0
        return cache_tokens_of(sequence) <= self.cache_tokens_beside(len(sequence.input_ids))

    def padded_batch_size(self, longest: TokenSequence) -> int:
        """Return how many sequences `generate` can take at once if `longest` is the longest; 0 if not even itself."""
        tokens, cache = len(longest.input_ids), self.token_bytes * (len(longest.input_ids) + longest.max_new_tokens)
        return self.free // (2 * cache + tokens * self.prefill_bytes + MASK_BYTES * tokens**2)


@dataclass(frozen=True)
class BatchPlan:
    """
    How rows are served.

    Args:
        batch_size: sequences at once; 0 without rows.
        why: of the batch size, for a person.
        max_seq_len: tokens of the longest prompt and its answer.
        cache_tokens: that the KV cache has room for.
        padded_batch_size: see `MemoryBudget`; of the batch that a sequence is the longest of.
    """

    batch_size: int
    why: str
    max_seq_len: int = 0
    cache_tokens: int = 0
    padded_batch_size: Callable[[TokenSequence], int] | None = None

    def __str__(self) -> str:
        return f"{self.batch_size} ({self.why})" if self.batch_size else f"none: {self.why}"


def plan_batches(
    rows: Sequence[list[TokenSequence]], budget: MemoryBudget, batch_size: int, replicas: int
) -> BatchPlan:
    """
    Return how to serve rows in the memory.

    Args:
        rows: a list for each prompt with its sequences, sorted by length.
        batch_size: what the user asked for; 0 is as many as fit.
    """
    if not rows:
        return BatchPlan(0, "no row fits into memory")
    fitting = [row for row in rows if budget.fits(row[0])] or rows[:1]  # the others are tried alone
    longest = fitting[-1][0]
    share, most = ceil_div(len(rows), replicas) * len(rows[0]), batch_size or budget.max_batch_size
    capacity = budget.cache_tokens_beside(len(longest.input_ids))
    if budget.pads:
        held = budget.padded_batch_size(rows[0][0])
    else:
        pages = sum(pages_for(len(row[0].input_ids) + row[0].max_new_tokens // 2) for row in fitting)
        held = capacity * len(fitting) // (pages * PAGE_TOKENS)
    size = max(1, min(most, held, share))
    if not batch_size and BATCH_SIZE_MULTIPLE < size == held:
        size -= size % BATCH_SIZE_MULTIPLE
    if size == batch_size:
        why = "--batch_size"
    elif size == share:
        why = f"--batch_size {batch_size}: no more rows are left" if batch_size else "all rows at once"
    elif batch_size:
        why = f"--batch_size {batch_size} is more than memory holds"
    else:
        why = "with more, little is gained" if size == most else "as many as memory holds"
    at_once = islice((sequence for row in reversed(fitting) for sequence in row), size)
    needed = sum(map(cache_tokens_of, at_once))
    return BatchPlan(
        size,
        why,
        max_seq_len=len(rows[-1][0].input_ids) + rows[-1][0].max_new_tokens,
        cache_tokens=max(min(needed, capacity), cache_tokens_of(longest)),
        padded_batch_size=budget.padded_batch_size if budget.pads else None,
    )
