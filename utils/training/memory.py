"""
GPU memory that a training run will take, by part, from the model's configuration and the run's flags.

Bytes of weights, adapter and optimizer are those of their shapes. What a block keeps for the backward pass is counted
from the tensors that autograd saves there: the inputs of both norms, the input of the adapter's layers, query, key,
value and output of attention, and what goes into the MLP's activation function.

PREFIX, LAYERNORM, RMSNORM and HEAD_BYTES are fitted to peaks (`max_memory_allocated`) on H100s with torch 2.11 and
LoRA rank 8 on query, key and value, which stand beside their estimates in tests/training/test_memory.py. What FSDP2
gathers is counted from how it works; no peak of it was measured.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from transformers import TrainingArguments

from utils.checkpoint.model import Checkpoint
from utils.common.processes import launched_by_accelerate_with_fsdp, print_once, world_size
from utils.data.arrow_reader import row_lengths
from utils.distributed.collectives import gather_from_all
from utils.layers.quantization import BITS, Quantization
from utils.models.family import LayerNames
from utils.training.loss import CHUNK
from utils.training.optimize import decoder_blocks, partitions_weights
from utils.training.run_config import TrainingRequest

GIB = 2**30
PREFIX = 1 / 3  # of ChatGLM-6B's query, key, value and output that its two attention calls keep a second time
LAYERNORM, RMSNORM = 1.44, 1.83  # times what a compiled layer keeps, by a layer that is not compiled, with these norms
HEAD_BYTES = 14  # a logit of a chunk: in 16 bits, in float32 twice, and in float32 that of the chunk before
LIVE_PARAMETERS = 10**9  # that DeepSpeed ZeRO-3 gathers at once: its stage3_max_live_parameters
LIVE_BLOCKS = 2  # that FSDP2 gathers at once: the one that computes and the next
FREE_SHARE = 0.95  # of the free memory; the rest is lost between blocks of the allocator


def bytes_of(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class ModelSizes:
    """Of a base model, weights as they are held."""

    weight_bytes: int
    block_bytes: int  # of the weights of one block
    parameters: int
    blocks: int
    hidden: int
    vocabulary: int
    value_bytes: int  # of an activation
    linear: dict[str, tuple[int, int]]  # a block's, by name: input and output columns
    layers: LayerNames  # which of them is which
    has_prefix: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: torch.dtype) -> "ModelSizes":
        model = checkpoint.empty_model(dtype)
        tensors = [*model.parameters(), *model.buffers()]
        blocks = decoder_blocks(model)
        layers = {path.rpartition(".")[2]: module for path, module in blocks[0].named_modules()}
        linear = {name: layers[name] for name in checkpoint.generation.linear_layers}
        return cls(
            weight_bytes=bytes_of(tensors),
            block_bytes=bytes_of([*blocks[0].parameters(), *blocks[0].buffers()]),
            parameters=sum(tensor.numel() for tensor in tensors),
            blocks=len(blocks),
            hidden=model.config.hidden_size,
            vocabulary=model.config.vocab_size,
            value_bytes=dtype.itemsize,
            linear={name: (layer.in_features, layer.out_features) for name, layer in linear.items()},
            layers=checkpoint.generation.layers,
            has_prefix=checkpoint.architecture.has_prefix,
        )


@dataclass(frozen=True)
class MemoryModel:
    """
    What decides the memory of a run.

    Args:
        tokens: of a micro-batch, padding included.
        longest: tokens of the longest row.
        partitions: processes that ZeRO-3 or FSDP2 spreads the weights over; None without them.
        offloaded: whether ZeRO-3 keeps them in CPU memory.
        fsdp: whether it is FSDP2, which gathers whole blocks.
        optimizer_partitions: processes that ZeRO or FSDP2 spreads the optimizer's state over.
    """

    sizes: ModelSizes
    tokens: int
    longest: int
    packing: bool
    lora_rank: int
    lora_target_modules: tuple[str, ...]
    compiled: bool
    checkpointing: bool = False
    partitions: int | None = None
    offloaded: bool = False
    fsdp: bool = False
    optimizer_partitions: int = 1

    @classmethod
    def of(cls, request: TrainingRequest, flags: Any, args: TrainingArguments, dtype: torch.dtype) -> "MemoryModel":
        """Of a training script's request, its own flags with `compile_layers` resolved, and Trainer's."""
        longest = max(row_lengths(request.dataset))
        fsdp, zero3 = launched_by_accelerate_with_fsdp(), partitions_weights(args)
        plugin, offload = args.deepspeed_plugin, "zero_optimization.offload_param.device"
        spreads_optimizer = fsdp or (plugin is not None and plugin.zero_stage > 0)
        return cls(
            ModelSizes.of(request.checkpoint, dtype),
            args.per_device_train_batch_size * (flags.pack_tokens if flags.packing else longest),
            longest,
            flags.packing,
            flags.lora_rank,
            tuple(flags.lora_target_modules),
            flags.compile_layers,
            partitions=args.world_size if fsdp or zero3 else None,
            offloaded=zero3 and plugin.hf_ds_config.get_value(offload, "none") != "none",
            fsdp=fsdp,
            optimizer_partitions=args.world_size if spreads_optimizer else 1,
        )

    def values_kept(self) -> float:
        """For the backward pass, by a block and token."""
        sizes, targets = self.sizes, set(self.lora_target_modules)
        layers = sizes.layers
        attended = sizes.linear[layers.attention_output][0]
        qkv = sum(sizes.linear[name][1] for name in layers.qkv)
        values = 2 * sizes.hidden + qkv + attended + sizes.linear[layers.mlp_up][1]
        values += sizes.hidden * bool(targets & set(layers.qkv)) + sizes.hidden * (layers.mlp_up in targets)
        values += sizes.linear[layers.mlp_down][0] * (layers.mlp_down in targets)
        if sizes.has_prefix:
            values += PREFIX * (qkv + attended)
        if not self.compiled:
            values *= LAYERNORM if sizes.has_prefix else RMSNORM
        return values

    def adapter_parameters(self) -> int:
        linear = self.sizes.linear
        return self.sizes.blocks * self.lora_rank * sum(sum(linear[name]) for name in self.lora_target_modules)

    def parts(self) -> dict[str, float]:
        """GiB a card of weights, adapter, optimizer, activations and head."""
        sizes = self.sizes
        weights = 0 if self.offloaded else sizes.weight_bytes / (self.partitions or 1)
        if self.fsdp:  # the head stays from its forward to its backward pass
            weights += LIVE_BLOCKS * sizes.block_bytes + sizes.vocabulary * sizes.hidden * sizes.value_bytes
        elif self.partitions:
            weights += min(LIVE_PARAMETERS, sizes.parameters) * sizes.weight_bytes / sizes.parameters
        adapter = self.adapter_parameters()
        stream = self.tokens * sizes.hidden * sizes.value_bytes
        block = self.tokens * self.values_kept() * sizes.value_bytes
        chunk = min(CHUNK, self.tokens)
        head = chunk * sizes.vocabulary * HEAD_BYTES + self.tokens * sizes.hidden * (4 + sizes.value_bytes)
        kept = sizes.blocks * (stream if self.checkpointing else block) + 3 * stream
        if self.checkpointing:  # the block that is computed again has the memory that the head had
            kept += max(0, block - head)
        found = {
            "weights": weights,
            "adapter": 2 * 4 * adapter,  # with its gradients, in float32
            "optimizer": 2 * 4 * adapter / self.optimizer_partitions,
            "activations": kept,
            "head": head,
        }
        return {name: size / GIB for name, size in found.items()}

    def gib(self) -> float:
        return sum(self.parts().values())


def free_gib(on_cpu: bool = False) -> float:
    """What this process may still take of its GPU, at most; or its share of what this machine has free."""
    if on_cpu:
        return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) / GIB
    free, total = torch.cuda.mem_get_info()
    allowed = total * torch.cuda.get_per_process_memory_fraction() - torch.cuda.memory_reserved()
    return min(free, allowed) / GIB


def resolve_checkpointing(request: TrainingRequest, flags: Any, args: TrainingArguments, dtype: torch.dtype) -> bool:
    """
    Whether activations are computed again in the backward pass: as the flag says, else where they do not fit. Says
    what was found, and what would fit where nothing does. Without a GPU only where the flag says so. Every process
    must call it; for the arguments see `MemoryModel.of`.
    """
    wanted = request.checkpointing
    if args.use_cpu:
        return bool(wanted)
    load = MemoryModel.of(request, flags, args, dtype)
    free = min(gather_from_all(free_gib()))
    room = FREE_SHARE * free
    checkpointing = load.gib() > room if wanted is None else wanted
    load = replace(load, checkpointing=checkpointing)
    decided = "decided from that" if wanted is None else "by the flag"
    state = "on" if checkpointing else "off"
    print_once(f"memory {describe(load)} of {free:.1f} GiB free: gradient checkpointing {state}, {decided}")
    if checkpointing and wanted is None and load.packing and load.gib() <= room:
        smaller = replace(load, checkpointing=False, tokens=max(load.tokens // 2, load.longest))
        if smaller.gib() <= room:
            flags = f"--per_device_train_batch_size 1 --pack_tokens {smaller.tokens}"
            print_once(f"fewer tokens at once need no gradient checkpointing, which is mostly faster: {flags}")
    if load.gib() > room:
        if not checkpointing and replace(load, checkpointing=True).gib() <= room:
            mend = "leave --gradient_checkpointing False out"
        else:
            fitting = (
                flags for flags, smaller in smaller_loads(load, request.checkpoint, dtype) if smaller.gib() <= room
            )
            flags = next(fitting, "--config_file accelerate_ds_zero3_cpu_offload_config.yaml to accelerate launch")
            mend = f"give {flags}"
        print_once(f"warning: it will not fit in the GPU's memory: {mend}")
    return checkpointing


def describe(load: MemoryModel) -> str:
    parts = ", ".join(f"{name} {size:.1f}" for name, size in load.parts().items() if size >= 0.05)
    return f"{load.gib():.1f} GiB estimated ({parts})"


def smaller_loads(load: MemoryModel, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, MemoryModel]]:
    """Flags that make a run smaller, and what it is with them; those first that change the least."""
    load = replace(load, checkpointing=True)
    tokens = [load.tokens >> halvings for halvings in range(32) if load.tokens >> halvings >= load.longest]
    for quantize in (None, *BITS):
        held = load
        if quantize:
            if checkpoint.quantization or load.partitions:
                return
            quantized = replace(checkpoint, quantization=Quantization(BITS[quantize]), quantizes=True)
            held = replace(load, sizes=ModelSizes.of(quantized, dtype))
        for fewer in tokens if quantize else tokens[1:]:
            flags = [f"--quantize {quantize}"] if quantize else []
            if fewer < load.tokens and load.packing:
                flags.append(f"--per_device_train_batch_size 1 --pack_tokens {fewer}")
            elif fewer < load.tokens:
                flags.append(f"--per_device_train_batch_size {fewer // load.longest}")
            yield " ".join(flags), replace(held, tokens=fewer)
