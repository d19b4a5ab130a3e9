"""
Estimates the GPU memory of a training run, share by share, from the model's configuration and the run's flags.

In: a `RunConfig`. Out: a `MemoryModel`, which decides gradient checkpointing here (`MemoryDecision`, shown by
run_report.py) and advises in dry_run.py. No library does this: DeepSpeed's estimators count weights and optimizer,
not activations.

Bytes of weights, adapter and optimizer follow from their shapes. What a block saves for the backward pass is counted
from the tensors that autograd saves there: the inputs of both norms, the input of the adapter's layers, query, key,
value and output of attention, and the input of the MLP's activation function. GLM-4-0414 has two more norms, behind
attention and MLP: see `output_norm_values`.

The fitted constants below match peaks (`max_memory_allocated`) on H100s and H200s with torch 2.11 and LoRA rank 8 on
query, key and value; tests/training/test_memory.py lists the peaks. FSDP2's are counted from how it works; none was
measured.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import psutil
import torch

from utils.checkpoint.model import Checkpoint
from utils.common.processes import launched_by_accelerate_with_fsdp, world_size
from utils.data.arrow_reader import row_lengths
from utils.distributed.collectives import gather_from_all
from utils.layers.quantization import BITS, Quantization
from utils.models.family import LayerNames
from utils.training.loss import CHUNK_TOKENS
from utils.training.optimize import decoder_blocks, partitions_weights
from utils.training.run_config import RunConfig

GIB = 2**30
INPUT_NORMS = 2  # of every block, before attention and MLP
# Fitted: share of ChatGLM-6B's query, key, value and output that its two attention calls keep twice.
PREFIX_ATTENTION_SHARE = 0.4
# Fitted: what a block that is not compiled keeps, relative to a compiled one, with these norms.
UNCOMPILED_FACTOR_LAYERNORM, UNCOMPILED_FACTOR_RMSNORM = 1.44, 1.83
# Fitted: a logit of a chunk of a loss that is not compiled: in 16 bits, twice in float32, and the chunk before.
BYTES_PER_LOGIT = 14
ZERO3_LIVE_PARAMETERS = 10**9  # gathered at once: DeepSpeed's stage3_max_live_parameters
FSDP2_LIVE_BLOCKS = 2  # gathered at once: the one that computes and the next
USABLE_GPU_SHARE = 0.95  # of the free memory; the rest is lost to fragmentation


def bytes_of(tensors: list[torch.Tensor]) -> int:
    """Return the bytes that tensors take, on any device."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a base model, its weights as they are held."""

    checkpoint: Checkpoint
    dtype: torch.dtype  # of activations, and of weights that are not quantised
    weight_bytes: int
    block_bytes: int  # weights of one block
    parameters: int
    blocks: int
    output_norms: int  # of a block, behind attention and MLP: 2 in GLM-4-0414, else 0
    hidden: int
    vocabulary: int
    linear: dict[str, tuple[int, int]]  # name of a block's linear layer -> input and output features

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: torch.dtype) -> "ModelSizes":
        """
        Measure a model that is built without memory for its weights.

        Quantised and tied weights count as they are held.
        """
        model = checkpoint.empty_model(dtype)
        unquantized = replace(checkpoint, quantization=None, quantizes=False)
        plain = unquantized.empty_model(dtype) if checkpoint.quantization else model  # integers hold several weights
        tensors = [*model.parameters(), *model.buffers()]
        blocks = decoder_blocks(model)
        layers = {path.rpartition(".")[2]: module for path, module in blocks[0].named_modules()}
        linear = {name: layers[name] for name in checkpoint.generation.linear_layers}
        return cls(
            checkpoint=checkpoint,
            dtype=dtype,
            weight_bytes=bytes_of(tensors),
            block_bytes=bytes_of([*blocks[0].parameters(), *blocks[0].buffers()]),
            parameters=sum(parameter.numel() for parameter in plain.parameters()),
            blocks=len(blocks),
            output_norms=sum(path.endswith("norm") for path, _ in blocks[0].named_children()) - INPUT_NORMS,
            hidden=model.config.hidden_size,
            vocabulary=model.config.vocab_size,
            linear={name: (layer.in_features, layer.out_features) for name, layer in linear.items()},
        )

    def quantized(self, bits: int) -> "ModelSizes":
        """Return the sizes of the same model, quantised to `bits`."""
        quantized = replace(self.checkpoint, quantization=Quantization(bits), quantizes=True)
        return ModelSizes.of(quantized, self.dtype)

    @property
    def value_bytes(self) -> int:
        """Bytes of an activation."""
        return self.dtype.itemsize

    @property
    def layers(self) -> LayerNames:
        """The names of a block's linear layers by their role."""
        return self.checkpoint.generation.layers

    @property
    def has_prefix(self) -> bool:
        """Whether prompts see themselves in both directions: ChatGLM-6B."""
        return self.checkpoint.architecture.has_prefix


@dataclass(frozen=True)
class MemoryModel:
    """
    What decides the memory of a run.

    Args:
        tokens: of a micro batch, padding included.
        longest: tokens of the longest row.
        weight_shards: processes that ZeRO-3 or FSDP2 shards the weights over; None without them.
        offloaded: whether ZeRO-3 keeps the weights in CPU memory.
        fsdp: whether it is FSDP2, which gathers whole blocks.
        optimizer_shards: processes that ZeRO or FSDP2 shards the optimizer's state over.
    """

    sizes: ModelSizes
    tokens: int
    longest: int
    packing: bool
    lora_rank: int
    lora_target_modules: tuple[str, ...]
    compiled: bool
    checkpointing: bool = False
    weight_shards: int | None = None
    offloaded: bool = False
    fsdp: bool = False
    optimizer_shards: int = 1

    @classmethod
    def of(cls, config: RunConfig) -> "MemoryModel":
        """Return that of a run, without gradient checkpointing."""
        flags, args = config.flags, config.training_args
        longest = max(row_lengths(config.inputs.dataset))
        fsdp, zero3 = launched_by_accelerate_with_fsdp(), partitions_weights(args)
        plugin, offload = args.deepspeed_plugin, "zero_optimization.offload_param.device"
        shards_optimizer = fsdp or (plugin is not None and plugin.zero_stage > 0)
        return cls(
            sizes=ModelSizes.of(config.inputs.checkpoint, config.dtype),
            tokens=args.per_device_train_batch_size * (config.pack_tokens or longest),
            longest=longest,
            packing=flags.packing,
            lora_rank=flags.lora_rank,
            lora_target_modules=tuple(flags.lora_target_modules),
            compiled=flags.compile_layers,
            weight_shards=args.world_size if fsdp or zero3 else None,
            offloaded=zero3 and plugin.hf_ds_config.get_value(offload, "none") != "none",
            fsdp=fsdp,
            optimizer_shards=args.world_size if shards_optimizer else 1,
        )

    def saved_values(self) -> float:
        """Return the values that a block saves for backward, per token."""
        sizes, targets = self.sizes, set(self.lora_target_modules)
        layers = sizes.layers
        attended = sizes.linear[layers.attention_output][0]
        qkv = sum(sizes.linear[name][1] for name in layers.qkv)
        values = INPUT_NORMS * sizes.hidden + qkv + attended + sizes.linear[layers.mlp_up][1]
        values += sizes.hidden * bool(targets & set(layers.qkv)) + sizes.hidden * (layers.mlp_up in targets)
        values += sizes.linear[layers.mlp_down][0] * (layers.mlp_down in targets)
        if sizes.has_prefix:
            values += PREFIX_ATTENTION_SHARE * (qkv + attended)
        if not self.compiled:
            values *= UNCOMPILED_FACTOR_LAYERNORM if sizes.has_prefix else UNCOMPILED_FACTOR_RMSNORM
        return values + self.output_norm_values()

    def output_norm_values(self) -> float:
        """
        Return the values that the norms behind attention and MLP save, per token.

        Each saves its input, without compiling as float32. A compiled block computes the next norm's input again.
        """
        inputs = self.sizes.output_norms * self.sizes.hidden
        return inputs / 2 if self.compiled else inputs * 4 / self.sizes.value_bytes

    def logit_bytes(self) -> int:
        """
        Return the bytes of the logits that exist at once, if all tokens are targets.

        A compiled loss writes only their gradient beside them, and the gradient of the chunk before still exists.
        """
        copies = 3 if self.tokens > CHUNK_TOKENS else 2
        bytes_per_logit = copies * self.sizes.value_bytes if self.compiled else BYTES_PER_LOGIT
        return min(CHUNK_TOKENS, self.tokens) * self.sizes.vocabulary * bytes_per_logit

    def adapter_parameters(self) -> int:
        """Return the number of weights that are trained."""
        linear = self.sizes.linear
        return self.sizes.blocks * self.lora_rank * sum(sum(linear[name]) for name in self.lora_target_modules)

    def breakdown(self) -> dict[str, float]:
        """Return GiB of weights, adapter, optimizer, activations and head on each GPU."""
        sizes = self.sizes
        weights = 0 if self.offloaded else sizes.weight_bytes / (self.weight_shards or 1)
        if self.fsdp:  # the head stays gathered from its forward to its backward pass
            weights += FSDP2_LIVE_BLOCKS * sizes.block_bytes + sizes.vocabulary * sizes.hidden * sizes.value_bytes
        elif self.weight_shards:
            weights += min(ZERO3_LIVE_PARAMETERS, sizes.parameters) * sizes.weight_bytes / sizes.parameters
        adapter = self.adapter_parameters()
        block_input = self.tokens * sizes.hidden * sizes.value_bytes
        block = self.tokens * self.saved_values() * sizes.value_bytes
        head = self.logit_bytes() + self.tokens * sizes.hidden * (4 + sizes.value_bytes)
        activations = sizes.blocks * (block_input if self.checkpointing else block) + 3 * block_input
        if self.checkpointing:  # the block that is recomputed, and its widest gradient, reuse the memory of the head
            widest_gradient = self.tokens * sizes.linear[sizes.layers.mlp_up][1] * sizes.value_bytes
            activations += max(0, block + widest_gradient - head)
        shares = {
            "weights": weights,
            "adapter": 2 * 4 * adapter,  # and its gradients, in float32
            "optimizer": 2 * 4 * adapter / self.optimizer_shards,
            "activations": activations,
            "head": head,
        }
        return {name: size / GIB for name, size in shares.items()}

    def gib(self) -> float:
        """Return the GiB that the run takes on each GPU."""
        return sum(self.breakdown().values())

    def describe(self) -> str:
        """Return the estimate and its shares, as text."""
        shares = ", ".join(f"{name} {size:.1f}" for name, size in self.breakdown().items() if size >= 0.05)
        return f"{self.gib():.1f} GiB estimated ({shares})" if shares else "below 0.1 GiB estimated"

    def smaller(self) -> Iterator[tuple[str, "MemoryModel"]]:
        """
        Yield flags that make the run smaller, and its memory with them.

        Flags that change the least come first.
        """
        checkpointed = replace(self, checkpointing=True)
        halvings = [self.tokens >> count for count in range(32)]
        tokens = [fewer for fewer in halvings if fewer >= self.longest]
        for fewer in tokens[1:]:
            yield self._batch_flags(fewer), replace(checkpointed, tokens=fewer)
        if self.sizes.checkpoint.quantization or self.weight_shards:
            return
        for name, bits in BITS.items():
            quantized = replace(checkpointed, sizes=self.sizes.quantized(bits))
            for fewer in tokens:
                flags = f"--quantize {name} {self._batch_flags(fewer)}".rstrip()
                yield flags, replace(quantized, tokens=fewer)

    def _batch_flags(self, tokens: int) -> str:
        """
        Return the flags that make a micro batch of `tokens`.

        As many tokens as now need no flag.
        """
        if tokens >= self.tokens:
            return ""
        if self.packing:
            return f"--per_device_train_batch_size 1 --pack_tokens {tokens}"
        return f"--per_device_train_batch_size {tokens // self.longest}"


def free_gib(on_cpu: bool = False) -> float:
    """
    Return the GiB that this process may still take on its GPU.

    With `on_cpu` it is the process's share of the memory that this machine has free.
    """
    if on_cpu:
        return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) / GIB
    free, total = torch.cuda.mem_get_info()
    allowed = total * torch.cuda.get_per_process_memory_fraction() - torch.cuda.memory_reserved()
    return min(free, allowed) / GIB


@dataclass(frozen=True)
class MemoryDecision:
    """
    Whether activations are recomputed in the backward pass, and why.

    Args:
        memory: of the run with that decision.
        reason: what decided.
        free: GiB of the fullest GPU; None without GPUs.
        hints: lines with the flags that make the run fit, or mostly faster.
    """

    memory: MemoryModel
    reason: str
    free: float | None = None
    hints: tuple[str, ...] = ()

    @property
    def checkpointing(self) -> bool:
        """Whether they are."""
        return self.memory.checkpointing

    def describe(self) -> str:
        """Return the estimate beside what is free, as text."""
        free = "no GPU here to compare it with" if self.free is None else f"of {self.free:.1f} GiB free"
        return f"{self.memory.describe()}, {free}"


def resolve_checkpointing(config: RunConfig) -> MemoryDecision:
    """
    Decide whether activations are recomputed in the backward pass.

    The flag decides; without one, whether they fit in GPU memory. Without a GPU they are not recomputed by default.
    Every process must call it.
    """
    memory = MemoryModel.of(config)
    if config.training_args.use_cpu:
        reason = "no GPU" if config.checkpointing is None else "by the flag"
        return MemoryDecision(replace(memory, checkpointing=bool(config.checkpointing)), reason)
    return decide_checkpointing(memory, config.checkpointing, min(gather_from_all(free_gib())))


def decide_checkpointing(memory: MemoryModel, requested: bool | None, free: float) -> MemoryDecision:
    """
    Decide on gradient checkpointing; where the run does not fit, a hint says what would make it fit.

    Args:
        memory: of the run without gradient checkpointing.
        requested: what the flag says; None without one.
        free: GiB of the fullest GPU.
    """
    usable = USABLE_GPU_SHARE * free
    checkpointing = memory.gib() > usable if requested is None else requested
    reason = "decided from the memory" if requested is None else "by the flag"
    memory = replace(memory, checkpointing=checkpointing)
    hints = []
    fits = memory.gib() <= usable
    if fits and checkpointing and requested is None and memory.packing:
        half = replace(memory, checkpointing=False, tokens=max(memory.tokens // 2, memory.longest))
        if half.gib() <= usable:
            flags = f"--per_device_train_batch_size 1 --pack_tokens {half.tokens}"
            hints.append(f"fewer tokens at once need no gradient checkpointing, which is mostly faster: {flags}")
    if not fits:
        hints.append(f"it will not fit in the GPU's memory: {_fix(memory, usable)}")
    return MemoryDecision(memory, reason, free, tuple(hints))


def _fix(memory: MemoryModel, usable: float) -> str:
    """Return what makes a run fit in `usable` GiB."""
    if not memory.checkpointing and replace(memory, checkpointing=True).gib() <= usable:
        return "remove --gradient_checkpointing False"
    fitting = (flags for flags, smaller in memory.smaller() if smaller.gib() <= usable)
    return f"give {next(fitting, '--config_file accelerate_ds_zero3_cpu_offload_config.yaml to accelerate launch')}"
