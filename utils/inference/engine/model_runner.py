"""
The engine's device side: plans of the `Scheduler` in, chosen tokens out.

It holds the KV cache, the per-slot decode state, the compiled functions and the CUDA graphs. On a GPU a decode step of
each batch size and a prefill of each padded length are graphs, so the host only copies inputs and replays; kernel by
kernel it would start them slower than the GPU computes. `models` has what depends on the architecture.

Shapes: B sequences of a decode step, R sequences and N tokens of a prefill, K key/value heads, D head size.
"""

import time
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from utils.common.numbers import ceil_div
from utils.inference.engine.attention import (
    PAGED_ATTENTION,
    decode_attention,
    has_decode_kernels,
    prefill_attention,
)
from utils.inference.engine.compiled import CompiledFunctions
from utils.inference.engine.cuda_graphs import CudaGraphs
from utils.inference.engine.kv_cache import DecodeState, DecodeStateShape, LayerKVCache, PromptPages
from utils.inference.engine.models import serve
from utils.inference.engine.pages import pages_for
from utils.inference.engine.prefill import MAX_HOST_PREFILL_TOKENS, MAX_PREFILL_TOKENS, PrefillBatch, pack_chunks
from utils.inference.engine.scheduler import (
    MAX_ATTENDED_TOKENS,
    DecodePlan,
    PrefillPlan,
    SchedulerLimits,
    StopRule,
)
from utils.inference.sampling import GREEDY, Sampling
from utils.kernels import load_next_token
from utils.lora.multi_lora import AdapterChoice, adapter_choice_of

SEQ_LEN_MULTIPLE = 128  # tokens that a decode step reads without kernels: few shapes compile
GPU_DECODE_STEPS = 4  # between two times at which the host reads tokens back
COMPILED_BLOCKS = 4  # compiled together: one's last sum and the next one's norm become one kernel; more gained nothing

FINE_BATCH_SIZES_FROM = 512  # slots, from which on those of no sequence would cost more than another graph

EventPair = tuple[torch.cuda.Event, torch.cuda.Event]


def round_seq_len(tokens: int) -> int:
    """Return the longest sequence of an engine that has room for `tokens`."""
    return ceil_div(tokens, SEQ_LEN_MULTIPLE) * SEQ_LEN_MULTIPLE


def captured_batch_sizes(largest: int, compiles: bool) -> tuple[int, ...]:
    """
    Return the batch sizes that are captured as CUDA graphs, ascending.

    Args:
        compiles: whether each one is also compiled, which takes seconds: then few.
    """
    sizes, size = set(), largest
    while size not in sizes:
        sizes.add(size)
        if size >= FINE_BATCH_SIZES_FROM and not compiles:
            sizes.add(ceil_div(3 * size, 4))
        size = ceil_div(size, 4 if compiles else 2)
    return tuple(sorted(sizes))


@dataclass(frozen=True)
class EngineConfig:
    """
    How an engine serves its sequences.

    Args:
        max_batch_size: number of slots, so of running sequences.
        max_seq_len: tokens of the longest prompt and its answer together.
        compile_layers: None compiles on a GPU. CUDA graphs are captured on a GPU in any case.
        decode_steps: between two times at which the host reads tokens back; None is 4 on a GPU and 1 elsewhere. With
            more than one, the next ones start before the host reads.
        cache_tokens: that the KV cache holds, of all sequences; None is enough for the longest in every slot. With
            fewer, running sequences are preempted when it is full.
    """

    max_batch_size: int
    max_seq_len: int
    stop: StopRule
    sampling: Sampling = GREEDY
    compile_layers: bool | None = None
    decode_steps: int | None = None
    cache_tokens: int | None = None

    @property
    def pages(self) -> int:
        """Pages of the cache, the scratch page included."""
        longest = pages_for(round_seq_len(self.max_seq_len))
        return 1 + (self.max_batch_size * longest if self.cache_tokens is None else pages_for(self.cache_tokens))


@dataclass(frozen=True)
class DecodeResult:
    """Decode steps in flight. `token_ids` (batch size, steps) is valid on the host once `ready` has fired."""

    token_ids: torch.Tensor
    ready: torch.cuda.Event | None  # None on the CPU
    prefills: list[EventPair]  # of the prefills before these steps


class ModelRunner:
    """
    Runs prefills and decode steps of a model that `prepare_for_decoding` has prepared.

    `compile_seconds` is the time that went into compiling and capturing, `prefill_seconds` into prefill.

    Args:
        model: of any generation, whole on one device or this process's shard, in eval mode. A PEFT model computes with
            its adapter.

    Raises:
        RuntimeError: the model is not prepared.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, config: EngineConfig):
        started = time.perf_counter()
        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        if self.model.config._attn_implementation != PAGED_ATTENTION:
            raise RuntimeError(
                "the model is not prepared for the engine: call utils.inference.placement.prepare_for_decoding first"
            )
        self.served = serve(self.model)
        self.embed, self.head = self.served.embed, self.served.head
        self.device, self.dtype = self.embed.weight.device, self.model.dtype
        self.on_gpu = self.device.type == "cuda"
        self.has_kernels = has_decode_kernels(self.device, self.dtype)
        self.decode_steps = config.decode_steps or (GPU_DECODE_STEPS if self.on_gpu else 1)
        self.max_batch_size, self.max_seq_len = config.max_batch_size, round_seq_len(config.max_seq_len)
        seen_tokens = self.embed.weight.shape[0] if config.sampling.repetition_penalty != 1 else 0
        max_pages = pages_for(self.max_seq_len)
        shape = DecodeStateShape(
            self.max_batch_size, max_pages, self.served.coordinates, self.decode_steps, seen_tokens
        )
        self.state = DecodeState(shape, config.stop.token_ids, self.device)
        self.pages = config.pages
        self.adapter_choice = adapter_choice_of(self.model) or AdapterChoice()
        self.adapter_choice.rows = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self.caches = self.served.new_caches(self.pages, self.state)
        self.fused = self.served.fused_blocks(self.max_seq_len) if self.has_kernels else None
        compiles = self.on_gpu and self.fused is None if config.compile_layers is None else config.compile_layers
        self.compiled = CompiledFunctions(config.sampling, self.state, compiles)
        self.is_greedy = config.sampling.temperature == 0 and config.sampling.repetition_penalty == 1
        self.graphs = CudaGraphs()
        self.prefill_inputs: dict[int, PrefillBatch] = {}  # on the device, by length: what its graph reads
        # Pages of all sequences of a prefill, and the scratch page.
        self.listed_pages = 1 + max(pages_for(MAX_ATTENDED_TOKENS), max_pages) + self.max_batch_size
        self.timed_prefills: list[EventPair] = []  # since the last decode steps
        self.compile_seconds, self.prefill_seconds = time.perf_counter() - started, 0.0

    @property
    def limits(self) -> SchedulerLimits:
        """What a `Scheduler` must keep to."""
        return SchedulerLimits(
            self.max_batch_size,
            prefill_tokens=MAX_PREFILL_TOKENS if self.has_kernels else MAX_HOST_PREFILL_TOKENS,
            decode_steps=self.decode_steps,
            batch_sizes=captured_batch_sizes(self.max_batch_size, compiles=not self.fused) if self.on_gpu else (),
            pages=self.pages,
            splits_prompts=self.served.splits_prompts,
        )

    def prefill(self, plan: PrefillPlan) -> None:
        """Put keys and values of a plan's tokens into their pages, and set the decode state of its last chunks."""
        if not self.on_gpu:
            started = time.perf_counter()
            self._prefill(plan)
            self.prefill_seconds += time.perf_counter() - started
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        compile_seconds = self.compile_seconds
        begin.record()
        self._prefill(plan)
        end.record()
        if self.compile_seconds == compile_seconds:  # else the time is that of compiling
            self.timed_prefills.append((begin, end))

    def _prefill(self, plan: PrefillPlan) -> None:
        self._write_pages(
            [
                (chunk.slot, number, page)
                for chunk in plan.chunks
                if chunk.slot is not None
                for number, page in enumerate(chunk.pages)
            ],
            emptied=[chunk.slot for chunk in plan.chunks if chunk.slot is not None],
        )
        if self.state.seen is not None:
            self._mark_seen(plan)
        batch = self.pack(plan)
        if not batch.tokens:
            self.state.place(batch.to(self.device))
            return
        length = batch.padded_length
        if not self.has_kernels or length > MAX_PREFILL_TOKENS:
            self.compute_prefill(batch.to(self.device))
            return
        batch = batch.padded(self.max_batch_size, self.listed_pages, self.state.unused_slot)
        if length not in self.prefill_inputs:
            inputs = self.prefill_inputs[length] = batch.to(self.device)
            self.compile_seconds += self.graphs.capture(("prefill", length), lambda: self.compute_prefill(inputs))
        self.prefill_inputs[length].copy_from(batch)
        self.graphs.replay(("prefill", length))

    def pack(self, plan: PrefillPlan) -> PrefillBatch:
        """Return a plan's tokens as a batch on the host, not padded."""
        return pack_chunks(
            plan, self.served.position_ids, self.state.unused_slot, self.has_kernels, not self.served.splits_prompts
        )

    def _write_pages(self, entries: list[tuple[int, int, int]], emptied: list[int]) -> None:
        """Clear slots, then write (slot, number, page) into the page table, without waiting for the device."""
        if emptied:
            self.state.clear(self._send(emptied))
        if entries:
            slots, numbers, pages = self._send(list(zip(*entries, strict=True)))
            self.state.page_table[slots, numbers] = pages.int()

    def _send(self, values: list) -> torch.Tensor:
        """Return int64 `values` on the device."""
        tensor = torch.tensor(values)
        return (tensor.pin_memory() if self.on_gpu else tensor).to(self.device, non_blocking=True)

    def _mark_seen(self, plan: PrefillPlan) -> None:
        for chunk in plan.chunks:
            if chunk.slot is not None:
                self.state.seen[chunk.slot, self._send(sorted(set(chunk.sequence.token_ids)))] = True

    def compute_prefill(self, batch: PrefillBatch) -> None:
        """Compute packed prompts; write keys and values into the cache, and sequences into the state."""
        self.state.place(batch)
        self.adapter_choice.rows = batch.token_adapter[None]
        hidden_states = self.embed(batch.token_ids[None])  # (1, N, E)
        if self.fused:
            self._prefill_fused(hidden_states, batch)
            return
        position_ids = self.served.shape_position_ids(batch.position_ids[None])
        position_embeddings = self.served.rotary_emb(hidden_states, position_ids)
        # Copies, whose place in a buffer of the batch's length a compiler cannot take for a length.
        places = batch.token_page.clone(), batch.token_offset.clone()
        gathered = None if self.has_kernels else batch.attention.gathered
        for block, cache in zip(self.served.blocks, self.caches, strict=True):
            attention = {"prompt_pages": PromptPages(cache, *places, gathered), "prompts": batch.attention}
            hidden_states = self.compiled.prefill_block(block, hidden_states, position_embeddings, attention)

    def _prefill_fused(self, hidden_states: torch.Tensor, batch: PrefillBatch) -> None:
        """Compute packed prompts by kernels."""
        tiles, pages = batch.attention.tiles, batch.attention.pages

        def attend(module: torch.nn.Module, cache: LayerKVCache, query: torch.Tensor) -> torch.Tensor:
            return prefill_attention(query, cache.keys, cache.values, tiles, pages, module.scaling)

        places = batch.token_page, batch.token_offset
        self.fused.run(hidden_states, batch.position_ids.t(), self.caches, places, attend)

    def decode(self, plan: DecodePlan) -> DecodeResult:
        """Start the plan's decode steps; on a GPU it returns before they are done, see `wait`."""
        self._write_pages([], plan.emptied)
        if plan.moves:
            self.state.move(*self._send(list(zip(*plan.moves, strict=True))))
        self._write_pages(plan.pages, [])
        width = self.max_seq_len if self.has_kernels else min(round_seq_len(plan.longest), self.max_seq_len)
        for _ in range(self.decode_steps):
            self._decode_step(plan.batch_size, width)
        token_ids = self.state.history[:, : plan.batch_size].t().clone().to("cpu", non_blocking=True)
        ready = torch.cuda.Event() if self.on_gpu else None
        if ready:
            ready.record()
        result = DecodeResult(token_ids, ready, self.timed_prefills)
        self.timed_prefills = []
        return result

    def wait(self, result: DecodeResult) -> list[list[int]]:
        """Return the tokens of started decode steps, (batch size, steps), once the device has chosen them."""
        if result.ready:
            result.ready.synchronize()
        self.prefill_seconds += sum(begin.elapsed_time(end) for begin, end in result.prefills) / 1e3
        return result.token_ids.tolist()

    def _decode_step(self, size: int, width: int) -> None:
        if not self.on_gpu:
            self.compute_decode_step(size, width)
            return
        key = ("decode", size, width)
        if key not in self.graphs:
            state = [*self.state.per_slot(), self.state.history_index]
            before = [tensor.clone() for tensor in state]
            self.compile_seconds += self.graphs.capture(key, lambda: self.compute_decode_step(size, width))
            for tensor, value in zip(state, before, strict=True):  # capturing ran a step
                tensor.copy_(value)
        self.graphs.replay(key)

    def compute_decode_step(self, size: int, width: int) -> None:
        """
        One more token for each of the first `size` slots. Sequences that have ended overwrite their last token.

        Args:
            width: tokens of each sequence that attention reads; the kernels ignore it, they read what is filled.
        """
        state = self.state
        self.adapter_choice.rows = state.adapter[:size, None]
        logits = self._decode_fused(size) if self.fused else self._decode_blocks(size, width)
        seen = None if state.seen is None else state.seen[:size]
        if self.fused and self.is_greedy:
            chosen = load_next_token().argmax(logits)
        else:
            chosen = self.compiled.choose(logits, seen, state.sequence_id[:size], state.answer_length[:size])
        (state.advance_by_kernel if self.fused else self.compiled.advance)(chosen)

    def _decode_fused(self, size: int) -> torch.Tensor:
        """Return the logits (size, V) of a decode step by kernels."""
        state = self.state
        lengths, page_table = state.cache_length[:size], state.page_table[:size]

        def attend(module: torch.nn.Module, cache: LayerKVCache, query: torch.Tensor) -> torch.Tensor:
            return decode_attention(query[:, :, None], cache.keys, cache.values, page_table, lengths, module.scaling)

        hidden_states = self.embed(state.next_token[:size, None])  # (B, 1, E)
        places = page_table, lengths
        hidden_states = self.fused.run(hidden_states, state.position[:size], self.caches, places, attend)
        return self.head(hidden_states)[:, 0]

    def _decode_blocks(self, size: int, width: int) -> torch.Tensor:
        """Return the logits (size, V) of a decode step by the model's blocks."""
        state = self.state
        lengths, page_table = state.cache_length[:size], state.page_table[:size]
        attention = {"page_table": page_table}
        if self.has_kernels:
            attention["cache_lengths"] = lengths
        else:
            attention["cache_mask"] = self._cache_mask(lengths, width)
        hidden_states, position_embeddings = self.compiled.begin_step(
            self.embed,
            self.served.rotary_emb,
            state.next_token[:size],
            self.served.shape_position_ids(state.position[:size, :, None]),
        )
        for cache in self.caches:
            cache.page_table, cache.next_index = page_table, lengths
        blocks = self.served.blocks
        # Smaller batches, which serve only the last sequences, compile sooner one by one.
        together = COMPILED_BLOCKS if size == self.max_batch_size else 1
        for first in range(0, len(blocks), together):
            group = slice(first, first + together)
            hidden_states = self.compiled.run_blocks(
                blocks[group], self.caches[group], hidden_states, position_embeddings, attention
            )
        return self.compiled.end_step(self.served.norm, self.head, hidden_states)

    def _cache_mask(self, lengths: torch.Tensor, width: int) -> torch.Tensor:
        """(B,) indices of the last filled token -> (B, 1, 1, width), 0 or -inf."""
        visible = torch.arange(width, device=self.device) <= lengths[:, None]
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill(~visible, -torch.inf)
        return mask[:, None, None]
