"""
The engine's device side: plans of the `Scheduler` in, chosen tokens out.

It holds the KV cache, the per-slot decode state, the compiled functions and the CUDA graphs. On a GPU a prefill of
each padded length and a decode step of each batch size are graphs, so the host only copies inputs and replays.

Shapes: B sequences of a decode step, R sequences and N tokens of a prefill, K key/value heads, D head size.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from utils.common.numbers import ceil_div
from utils.inference.engine.attention import SLOT_ATTENTION, has_decode_kernels
from utils.inference.engine.compiled import CompiledFunctions
from utils.inference.engine.cuda_graphs import CudaGraphs
from utils.inference.engine.kv_cache import DecodeState, DecodeStateShape, LayerKVCache
from utils.inference.engine.prefill import MAX_MASKED_PREFILL_TOKENS, MAX_PREFILL_TOKENS, PrefillBatch, pack_prompts
from utils.inference.engine.scheduler import DecodePlan, PrefillPlan, SchedulerLimits, StopRule
from utils.inference.sampling import GREEDY, Sampling
from utils.lora.multi_lora import AdapterChoice, adapter_choice_of
from utils.models.modeling_chatglm import ChatGLMForConditionalGeneration, derive_position_ids

SEQ_LEN_MULTIPLE = 128  # tokens: of a slot, and of what a decode step reads without kernels; few shapes compile
GPU_DECODE_STEPS = 4  # between two times at which the host reads tokens back
COMPILED_BLOCKS = 4  # compiled together: one's last sum and the next one's norm become one kernel; more gained nothing

EventPair = tuple[torch.cuda.Event, torch.cuda.Event]


def round_to_slot(tokens: int) -> int:
    """Return the tokens of a slot that holds `tokens`."""
    return ceil_div(tokens, SEQ_LEN_MULTIPLE) * SEQ_LEN_MULTIPLE


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
    """

    max_batch_size: int
    max_seq_len: int
    stop: StopRule
    sampling: Sampling = GREEDY
    compile_layers: bool | None = None
    decode_steps: int | None = None


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
        if self.model.config._attn_implementation != SLOT_ATTENTION:
            raise RuntimeError(
                "the model is not prepared for the engine: call utils.inference.placement.prepare_for_decoding first"
            )
        self.has_prefix = isinstance(self.model, ChatGLMForConditionalGeneration)
        self.body = self.model.base_model
        self.norm = self.body.final_layernorm if self.has_prefix else self.body.norm
        self.head = self.model.get_output_embeddings()
        self.embed = self.model.get_input_embeddings()
        self.device, self.dtype = self.embed.weight.device, self.model.dtype
        self.on_gpu = self.device.type == "cuda"
        self.has_kernels = has_decode_kernels(self.device, self.dtype)
        self.decode_steps = config.decode_steps or (GPU_DECODE_STEPS if self.on_gpu else 1)
        self.max_batch_size, self.max_seq_len = config.max_batch_size, round_to_slot(config.max_seq_len)
        seen_tokens = self.head.weight.shape[0] if config.sampling.repetition_penalty != 1 else 0
        shape = DecodeStateShape(self.max_batch_size, 2 if self.has_prefix else 1, self.decode_steps, seen_tokens)
        self.state = DecodeState(shape, config.stop.token_ids, self.device)
        self.caches: list[LayerKVCache] = []  # of each layer, from the first prefill on
        compiles = self.on_gpu if config.compile_layers is None else config.compile_layers
        self.compiled = CompiledFunctions(config.sampling, self.state, compiles)
        self.graphs = CudaGraphs()
        self.prefill_inputs: dict[int, PrefillBatch] = {}  # on the device, by length: what its graph reads
        self.timed_prefills: list[EventPair] = []  # since the last decode steps
        self.adapter_choice = adapter_choice_of(self.model) or AdapterChoice()
        self.compile_seconds, self.prefill_seconds = time.perf_counter() - started, 0.0

    @property
    def limits(self) -> SchedulerLimits:
        """What a `Scheduler` must keep to."""
        prefill_tokens = MAX_PREFILL_TOKENS if self.has_kernels else MAX_MASKED_PREFILL_TOKENS
        return SchedulerLimits(self.max_batch_size, prefill_tokens, self.decode_steps, few_batch_sizes=self.on_gpu)

    def prefill(self, plan: PrefillPlan) -> None:
        """Put the keys and values of prompts into their slots, all but the last token's, and set decode state."""
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
        batch = pack_prompts(plan.sequences, plan.slots, self.position_ids_of, self.has_prefix)
        unused_index = self.max_seq_len - 1  # never read: a sequence that fills its slot ends with a token there
        if not self.has_kernels or batch.needs_mask:
            if not batch.tokens:  # layers need at least one token
                batch = batch.padded(len(plan.sequences), unused_index)
            mask = batch.mask().to(self.device)
            self.compute_prefill(batch.to(self.device), mask)
            return
        batch = batch.padded(self.max_batch_size, unused_index)
        length = batch.tokens
        if length > MAX_PREFILL_TOKENS:
            self.compute_prefill(batch.to(self.device))
            return
        if length not in self.prefill_inputs:
            inputs = self.prefill_inputs[length] = batch.to(self.device)
            self.compile_seconds += self.graphs.capture(("prefill", length), lambda: self.compute_prefill(inputs))
        self.prefill_inputs[length].copy_from(batch)
        self.graphs.replay(("prefill", length))

    def position_ids_of(self, input_ids: Sequence[int]) -> list[list[int]]:
        """A prompt's tokens -> the position of each, one list per coordinate: ChatGLM-6B has two."""
        if self.has_prefix:
            return derive_position_ids(torch.tensor([input_ids]), None, self.model.config)[0].tolist()
        return [list(range(len(input_ids)))]

    def compute_prefill(self, batch: PrefillBatch, mask: torch.Tensor | None = None) -> None:
        """
        Compute packed prompts, and write their keys and values into the cache and their sequences into the state.

        Args:
            batch: on the device.
            mask: (1, 1, N, N) bool, see `PrefillBatch.mask`; None uses the varlen kernel and `batch.cu_seqlens`.
        """
        self.state.place(batch)
        self.adapter_choice.rows = batch.token_adapter[None]
        if mask is not None:
            attention = {"attention_mask": mask}
        else:
            attention = {
                "cu_seq_lens_q": batch.cu_seqlens,
                "max_length_q": min(self.max_seq_len, batch.tokens),
                "causal": not batch.bidirectional_prefix,
            }
        hidden_states = self.embed(batch.token_ids[None])  # (1, N, E)
        position_ids = batch.position_ids[None] if self.has_prefix else batch.position_ids  # (1, 2, N) or (1, N)
        position_embeddings = self.body.rotary_emb(hidden_states, position_ids)
        for index, block in enumerate(self.body.layers):
            hidden_states, keys, values = self.compiled.prefill_block(
                block, hidden_states, position_embeddings, attention
            )
            if len(self.caches) == index:
                self.caches.append(self._new_cache(keys))
            cache = self.caches[index]
            cache.keys[batch.token_slot, :, batch.token_index] = keys[0].transpose(0, 1)  # (N, K, D)
            cache.values[batch.token_slot, :, batch.token_index] = values[0].transpose(0, 1)

    def _new_cache(self, keys: torch.Tensor) -> LayerKVCache:
        """Return a layer's empty cache, its heads as those of `keys` (1, K, N, D)."""
        _, K, _, D = keys.shape
        shape = (self.max_batch_size, K, self.max_seq_len, D)
        return LayerKVCache(
            keys=torch.zeros(shape, dtype=keys.dtype, device=self.device),
            values=torch.zeros(shape, dtype=keys.dtype, device=self.device),
            next_index=self.state.cache_length,
        )

    def decode(self, plan: DecodePlan) -> DecodeResult:
        """Start the plan's decode steps; on a GPU it returns before they are done, see `wait`."""
        if plan.moves:
            self._move_slots(plan.moves)
        width = self.max_seq_len if self.has_kernels else min(round_to_slot(plan.longest), self.max_seq_len)
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

    def _move_slots(self, moves: list[tuple[int, int]]) -> None:
        sources, targets = (torch.tensor(slots, device=self.device) for slots in zip(*moves, strict=True))
        caches = [tensor for cache in self.caches for tensor in (cache.keys, cache.values)]
        for tensor in (*self.state.per_slot(), *caches):
            tensor[targets] = tensor[sources]

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
            width: tokens of each slot that attention reads; the kernels ignore it, they read what is filled.
        """
        state = self.state
        lengths, position_ids = state.cache_length[:size], state.position[:size]
        attention = {"cache_lengths": lengths} if self.has_kernels else {"slot_mask": self._slot_mask(lengths, width)}
        position_ids = position_ids[..., None] if self.has_prefix else position_ids  # (B, 2, 1) or (B, 1)
        hidden_states, position_embeddings = self.compiled.begin_step(
            self.embed, self.body.rotary_emb, state.next_token[:size], position_ids
        )
        self.adapter_choice.rows = state.adapter[:size, None]
        for cache in self.caches:
            cache.next_index = lengths
        blocks = list(self.body.layers)
        # Smaller batches, which serve only the last sequences, compile sooner one by one.
        together = COMPILED_BLOCKS if size == self.max_batch_size else 1
        for first in range(0, len(blocks), together):
            group = slice(first, first + together)
            hidden_states = self.compiled.run_blocks(
                blocks[group], self.caches[group], hidden_states, position_embeddings, attention
            )
        logits = self.compiled.end_step(self.norm, self.head, hidden_states)
        seen = None if state.seen is None else state.seen[:size]
        chosen = self.compiled.choose(logits, seen, state.sequence_id[:size], state.answer_length[:size])
        self.compiled.advance(chosen)

    def _slot_mask(self, lengths: torch.Tensor, width: int) -> torch.Tensor:
        """(B,) indices of the last filled token -> (B, 1, 1, width), 0 or -inf."""
        visible = torch.arange(width, device=self.device) <= lengths[:, None]
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill(~visible, -torch.inf)
        return mask[:, None, None]
