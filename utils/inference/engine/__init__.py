"""
Many prompts through one model: a fixed number of slots, rows that come and go, and a step that the host only starts.

A step is the same kernels over the same memory whatever the rows are, so on a GPU it is captured once as a CUDA graph
for each batch size, its layers compiled. What stopped is looked at every few steps, when the next few are under way,
for a GPU should not wait. Prompts are read laid end to end, all but their last tokens, which are what the next step
begins with: for each of a few lengths that is a graph too.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from utils.inference.engine.kv_cache import SLOTS, LayerSlots, SlotState
from utils.inference.engine.model_runner import StepGraphs, StepParts
from utils.inference.engine.prefill import MOST_READ, TokenSequence, pack_prompts
from utils.inference.sampling import GREEDY, Sampling
from utils.kernels import load_decode_attention, load_skinny_gemm
from utils.layers.fused_qkv import fuse_qkv
from utils.layers.skinny_linear import use_skinny_layers
from utils.lora.multi_lora import AdapterChoice
from utils.models.modeling_chatglm import ChatGLMForConditionalGeneration, derive_position_ids

WIDTH_GRAIN = 128  # columns; a captured step reads a multiple of it
GPU_STEPS = 4  # between two looks at what stopped
MOST_MASKED = 1024  # tokens of the prompts that are read at once where a mask keeps rows apart
COMPILED_TOGETHER = 4  # layers: one's end and the next one's beginning are one kernel


def can_serve(model: torch.nn.Module) -> bool:
    """Whether the model lies whole and unhooked on one device."""
    return isinstance(model, (PreTrainedModel, PeftModel)) and not any(
        hasattr(module, "_hf_hook") for module in model.modules()
    )


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention is that of decode_kernels.py, and prompts are read without a mask."""
    return device.type == "cuda" and dtype.itemsize == 2 and load_decode_attention() is not None


def column_bytes(model: PreTrainedModel) -> int:
    """What one token of one row takes in the cache, in bytes."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize


def step_size(slots: int, running: int, on_gpu: bool) -> int:
    """The smallest batch that holds `running` rows: on a GPU `slots` quartered so often, to compile few."""
    if not on_gpu:
        return running
    size = slots
    while running <= -(-size // 4) < size:
        size = -(-size // 4)
    return size


@dataclass
class Steps:
    """Steps that were started: what they choose, (slots, steps) on the host, is there when `done` has come."""

    tasks: list[TokenSequence | None]  # of each slot, then
    chosen: torch.Tensor
    done: torch.cuda.Event | None
    reads: list[tuple[torch.cuda.Event, torch.cuda.Event]]  # of prompts, before them


class Engine:
    """
    Args:
        model: of any generation, whole on one device, in eval mode; a PEFT model computes with its adapter. Its
            attention becomes the engine's, query, key and value one product, and on a GPU that gains by it products of
            few rows a kernel of ours.
        slots: rows at once.
        columns: no prompt and its answer are longer together, in tokens.
        stop_ids: tokens that end an answer.
        find_end: called with an answer's tokens as they grow; where text in them ends the answer, how many it has.
        compile_layers: compile the layers of a step; None is on a GPU. Graphs are for a GPU alone.
        steps: between two looks at what stopped; where it is more than one, as on a GPU, the next ones are started
            before the look.

    `preparing` and `reading` are the seconds that went into compiling and capturing, and into reading prompts.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        slots: int,
        columns: int,
        stop_ids: Sequence[int],
        sampling: Sampling = GREEDY,
        find_end: Callable[[Sequence[int]], int | None] = lambda answer_ids: None,
        compile_layers: bool | None = None,
        steps: int | None = None,
    ):
        started = time.perf_counter()
        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        fuse_qkv(self.model)
        self.model.set_attn_implementation(SLOTS)
        self.body = self.model.base_model
        self.norm = self.body.final_layernorm if self.has_prefix else self.body.norm
        self.head = self.model.get_output_embeddings()
        self.embed = self.model.get_input_embeddings()
        self.device, self.dtype = self.embed.weight.device, self.model.dtype
        self.on_gpu = self.device.type == "cuda"
        self.kernels = has_kernels(self.device, self.dtype)
        if self.kernels and load_skinny_gemm() is not None:
            use_skinny_layers(self.body.layers)
        self.steps = steps or (GPU_STEPS if self.on_gpu else 1)
        self.ahead = int(self.steps > 1)
        self.slots = slots
        self.columns = -(-columns // WIDTH_GRAIN) * WIDTH_GRAIN
        self.stop_ids = set(stop_ids)
        self.find_end = find_end
        self.layers: list[LayerSlots] = []
        self.graphs = StepGraphs()
        self.inputs: dict[int, tuple[torch.Tensor, ...]] = {}  # what graphs of reading read
        self.reads: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # since the last steps
        self.started: deque[Steps] = deque()
        self.running: list[TokenSequence | None] = [None] * slots
        self.waiting: deque[TokenSequence] = deque()
        remembered = self.head.weight.shape[0] if sampling.repetition_penalty != 1 else 0
        self.state = SlotState(slots, 2 if self.has_prefix else 1, self.steps, stop_ids, remembered, self.device)
        compiled = self.on_gpu if compile_layers is None else compile_layers
        self.parts = StepParts(sampling, self.state, compiled)
        self.choice = getattr(self.model, "adapter_choice", None) or AdapterChoice()
        self.preparing, self.reading = time.perf_counter() - started, 0.0

    @property
    def has_prefix(self) -> bool:
        return isinstance(self.model, ChatGLMForConditionalGeneration)

    @torch.inference_mode()
    def answer(self, tasks: Iterable[TokenSequence]) -> Iterator[TokenSequence]:
        """
        Yields each task when its answer is complete. They begin in their order, which should be that of their prompts'
        lengths, and are taken when there is a slot for them.
        """
        source = iter(tasks)
        few = -(-self.slots // 16)  # slots that are worth reading prompts for
        while True:
            free = [slot for slot, task in enumerate(self.running) if task is None]
            if len(free) >= few:
                self.waiting.extend(islice(source, len(free) - len(self.waiting)))
            if self.waiting and len(free) >= min(len(self.waiting), few):
                self._admit(free)
            if not any(self.running):
                if not self.waiting:
                    self.started.clear()
                    return
                continue
            goes_on = self._goes_on()
            if goes_on:
                self._start_steps()
            if len(self.started) > self.ahead or not goes_on:
                yield from self._look()

    def _goes_on(self) -> bool:
        """Whether a row can need more steps than those under way."""
        under_way = {id(task) for steps in self.started for task in steps.tasks}
        return any(
            task and len(task.answer_ids) + self.steps * (id(task) in under_way) < task.max_new_tokens
            for task in self.running
        )

    def _start_steps(self) -> None:
        size = self._compact()
        width = self._width()
        for _ in range(self.steps):
            self._step(size, width)
        chosen = self.state.history[:, :size].t().clone().to("cpu", non_blocking=True)
        done = torch.cuda.Event() if self.on_gpu else None
        if done:
            done.record()
        self.started.append(Steps(self.running[:size], chosen, done, self.reads))
        self.reads = []

    def _look(self) -> Iterator[TokenSequence]:
        """Yields the tasks that the oldest steps under way complete."""
        steps = self.started.popleft()
        if steps.done:
            steps.done.synchronize()
        self.reading += sum(begin.elapsed_time(end) for begin, end in steps.reads) / 1e3
        slots = {id(task): slot for slot, task in enumerate(self.running) if task}
        for task, ids in zip(steps.tasks, steps.chosen.tolist(), strict=True):
            slot = slots.get(id(task))  # none where it had ended before these steps
            if slot is not None and self._extend(task, ids):
                self.running[slot] = None
                yield task

    def _width(self) -> int:
        """Columns that the next steps may read, behind those under way; the kernels read what is filled."""
        if self.kernels:
            return self.columns
        longest = max(len(task.input_ids) + len(task.answer_ids) for task in self.running if task)
        steps = self.steps * (1 + len(self.started))
        return min(-(-(longest + steps) // WIDTH_GRAIN) * WIDTH_GRAIN, self.columns)

    def unfinished(self) -> list[TokenSequence]:
        """The tasks that were taken and not yet answered, their answers forgotten: what an error leaves to do."""
        tasks = [task for task in self.running if task]
        for task in tasks:
            task.answer_ids.clear()
        return [*tasks, *self.waiting]

    def _extend(self, task: TokenSequence, ids: list[int]) -> bool:
        """Appends tokens up to the answer's end; whether it has come."""
        ended = False
        for token in ids:
            task.answer_ids.append(token)
            ended = token in self.stop_ids or len(task.answer_ids) == task.max_new_tokens
            if ended:
                break
        end = self.find_end(task.answer_ids)
        if end is not None:
            del task.answer_ids[end:]
        return ended or end is not None

    def _admit(self, free: list[int]) -> None:
        """Reads prompts into free slots."""
        most = MOST_READ if self.kernels else MOST_MASKED
        while self.waiting and free:
            batch, tokens = [], 0
            while self.waiting and len(batch) < len(free):
                tokens += len(self.waiting[0].input_ids) - 1
                if batch and tokens > most:
                    break
                batch.append(self.waiting.popleft())
            slots, free = free[: len(batch)], free[len(batch) :]
            for slot, task in zip(slots, batch, strict=True):
                self.running[slot] = task
            if not self.on_gpu:
                started = time.perf_counter()
                self._read(batch, slots)
                self.reading += time.perf_counter() - started
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            prepared = self.preparing
            begin.record()
            self._read(batch, slots)
            end.record()
            if self.preparing == prepared:
                self.reads.append((begin, end))

    def _read(self, batch: list[TokenSequence], slots: list[int]) -> None:
        """
        What the prompts' tokens but the last leave behind into the slots, and where each row stands. Rows are laid end
        to end; each sees itself alone.
        """
        packed = pack_prompts(batch, slots, self._positions)
        if not (self.kernels and packed.alike):
            if not packed.tokens.shape[1]:  # layers read something always
                packed = packed.filled_up(len(batch), self.columns - 1)
            mask = packed.mask().to(self.device)
            self._compute_read(packed.rows.to(self.device), packed.tokens.to(self.device), None, mask)
            return
        packed = packed.filled_up(self.slots, self.columns - 1)  # to a column that no row reads
        inputs = (packed.rows, packed.tokens, packed.starts)
        size = packed.tokens.shape[1]
        if size > MOST_READ:
            self._compute_read(*(values.to(self.device) for values in inputs))
            return
        if size not in self.inputs:
            self.inputs[size] = tuple(values.to(self.device) for values in inputs)
            self.preparing += self.graphs.capture(size, lambda: self._compute_read(*self.inputs[size]))
        for static, values in zip(self.inputs[size], inputs, strict=True):
            static.copy_(values.pin_memory(), non_blocking=True)
        self.graphs.replay(size)

    def _positions(self, input_ids: Sequence[int]) -> list[tuple[int, ...]]:
        """Of each of a prompt's tokens; ChatGLM-6B's have two."""
        if self.has_prefix:
            both = derive_position_ids(torch.tensor([input_ids]), None, self.model.config)[0].tolist()
            return list(zip(*both, strict=True))
        return [(position,) for position in range(len(input_ids))]

    def _compute_read(
        self, rows: torch.Tensor, tokens: torch.Tensor, starts: torch.Tensor | None, mask: torch.Tensor | None = None
    ) -> None:
        """For the arguments see `PackedPrompts`; with `mask`, its own, `starts` is not needed."""
        ids, place, columns, choice = tokens[:4]
        self.state.place(rows, ids, place)
        self.choice.rows = choice[None]
        longest = min(self.columns, len(ids))
        hidden_states = self.embed(ids[None])
        embeddings = self.body.rotary_emb(hidden_states, tokens[4:][None] if self.has_prefix else tokens[4:])
        for index, block in enumerate(self.body.layers):
            hidden_states, keys, values = self.parts.read_block(
                block, hidden_states, embeddings, mask, starts, longest, not self.has_prefix
            )
            if len(self.layers) == index:
                _, K, _, D = keys.shape
                shape = (self.slots, K, self.columns, D)
                pair = (torch.zeros(shape, dtype=keys.dtype, device=self.device) for _ in range(2))
                self.layers.append(LayerSlots(*pair, self.state.lengths))
            self.layers[index].keys[place, :, columns] = keys[0].transpose(0, 1)
            self.layers[index].values[place, :, columns] = values[0].transpose(0, 1)

    def _compact(self) -> int:
        """Moves the running rows into the first slots where that makes the batch smaller; its size."""
        busy = [slot for slot, task in enumerate(self.running) if task]
        size = step_size(self.slots, len(busy), self.on_gpu)
        if busy[-1] < size:
            return size
        moving = [slot for slot in busy if slot >= size]
        holes = [slot for slot in range(size) if self.running[slot] is None][: len(moving)]
        old, new = torch.tensor(moving, device=self.device), torch.tensor(holes, device=self.device)
        caches = [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]
        for tensor in (*self.state.of_slots(), *caches):
            tensor[new] = tensor[old]
        for source, target in zip(moving, holes, strict=True):
            self.running[target], self.running[source] = self.running[source], None
        return size

    def _mask(self, lengths: torch.Tensor, width: int) -> torch.Tensor:
        """(B,) the last columns that are filled -> (B, 1, 1, width), 0 or -inf."""
        visible = torch.arange(width, device=self.device) <= lengths[:, None]
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill(~visible, -torch.inf)
        torch._dynamo.maybe_mark_dynamic(mask[:, None, None], 3)
        return mask[:, None, None]

    def _step(self, size: int, width: int) -> None:
        if not self.on_gpu:
            self._compute_step(size, width)
            return
        if (size, width) not in self.graphs:
            state = [*self.state.of_slots(), self.state.clock]
            before = [tensor.clone() for tensor in state]
            self.preparing += self.graphs.capture((size, width), lambda: self._compute_step(size, width))
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        self.graphs.replay((size, width))

    def _compute_step(self, size: int, width: int) -> None:
        """One token more for each of the first `size` slots; rows that stopped write over their last column."""
        state = self.state
        lengths, positions = state.lengths[:size], state.positions[:size]
        mask = lengths if self.kernels else self._mask(lengths, width)
        positions = positions[..., None] if self.has_prefix else positions
        hidden_states, embeddings = self.parts.begin_step(
            self.embed, self.body.rotary_emb, state.tokens[:size], positions
        )
        self.choice.rows = state.adapters[:size, None]
        for layer in self.layers:
            layer.columns = lengths
        blocks = list(self.body.layers)
        together = COMPILED_TOGETHER if size == self.slots else 1  # smaller ones compile sooner, for the last rows
        for first in range(0, len(blocks), together):
            some = slice(first, first + together)
            hidden_states = self.parts.run_blocks(blocks[some], hidden_states, embeddings, mask, self.layers[some])
        logits = self.parts.end_step(self.norm, self.head, hidden_states)
        seen = None if state.seen is None else state.seen[:size]
        self.parts.advance(self.parts.choose(logits, seen, state.numbers[:size], state.counts[:size]))
