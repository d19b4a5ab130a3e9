"""
Where a model's weights lie for inference, and which layers compute with them: checkpoint in, model out.

`load_on_processes` gives every process a replica, or shards the model over processes. `dispatch` spreads
it over this process's devices by accelerate. `prepare_for_decoding` then swaps in the layers that the engine is fast
with; it is the only place that changes a model for decoding. The inference scripts and tools call these.

A replica is one process unless memory says otherwise: replicas share only a counter in the launcher's store, shards
communicate in every layer. Quantised weights are never sharded: they are small, packed in pairs along the inputs, and
share a scale across them.

Weights are dispatched one by one with the functions that `accelerate.load_checkpoint_and_dispatch` consists of. That
function itself reads no checkpoint whose weights have other names than the model's, nor does it report a missing one.
"""

import os
import tempfile
from pathlib import Path

import psutil
import torch
from accelerate import dispatch_model
from accelerate.utils import get_balanced_memory, infer_auto_device_map
from peft import PeftModel
from transformers import PreTrainedModel

from utils.checkpoint.model import Checkpoint
from utils.common.console import print_line
from utils.common.errors import UsageError
from utils.common.processes import local_rank, process_rank, world_size
from utils.data.input_facts import describe_size
from utils.distributed.collectives import gather_from_all
from utils.distributed.deepspeed_setup import init_deepspeed
from utils.inference.adapters import AttachAdapters
from utils.inference.engine import can_serve
from utils.inference.engine.attention import PAGED_ATTENTION, has_decode_kernels
from utils.inference.tensor_parallel import Place, check_heads, load_shards, tensor_parallel_groups
from utils.inference.work_queue import Replica
from utils.kernels import load_skinny_gemm
from utils.layers.fp8 import FP8, convert_to_fp8
from utils.layers.fused_qkv import QKV_PROJ, fuse_qkv
from utils.layers.skinny_linear import use_skinny_layers

MEMORY_FACTOR = 1.3  # memory a model needs, in terms of its weights: the rest is KV cache and activations
RECOMPILE_LIMIT = 64  # torch.compile gives up at 8 by default; each batch size is one compilation


def prepare_for_decoding(model: PreTrainedModel | PeftModel) -> None:
    """
    Change a loaded model's layers for the engine, in place. Calling it again changes nothing.

    Query, key and value become one projection, attention uses the engine's KV cache, and on a GPU that gains by it the
    GEMMs of a decode step use our skinny kernel. Adapters must be attached before, for they go by the names of the
    separate projections. A model that the engine cannot serve, spread over devices or offloaded, stays as it is.

    Plain forward passes and `generate` compute the same as before.
    """
    if not can_serve(model):
        return
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    fuse_qkv(model)
    model.set_attn_implementation(PAGED_ATTENTION)
    device = model.get_input_embeddings().weight.device
    if has_decode_kernels(device, model.dtype) and load_skinny_gemm() is not None:
        use_skinny_layers(model)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)


def load_on_processes(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    quantize: str | None,
    adapters: AttachAdapters,
    tp_size: int | None = None,
) -> tuple[PreTrainedModel, Replica]:
    """
    Load a checkpoint for all processes of the group, prepared for decoding, each process's share on its device.

    Every process is a replica that answers its share of the rows, or `tp_size` processes are one replica, by tensor
    parallelism.

    Args:
        checkpoint: opened with `quantize=stored_bits(quantize)`.
        quantize: "int8", "int4" or "fp8"; such weights are not sharded.
        adapters: attached to a whole model, or merged into the shards.
        tp_size: None is 1 where every process has memory for the whole model, which is faster, and otherwise the
            fewest processes whose memory together holds it. The replica has the reason.

    Raises:
        UsageError: see `Checkpoint.fill`, `check_heads` and `load_shards`; or quantised weights with `tp_size` above
            1.
    """
    tp_size, why = resolve_tp_size(checkpoint, dtype, quantize, tp_size)
    replicas = world_size() // tp_size
    device = torch.device(f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu")
    if tp_size > 1:
        init_deepspeed()
        group, cpu_group, leader = tensor_parallel_groups(tp_size)
        model = load_shards(checkpoint, dtype, device, Place.in_group(group), adapters)
        replica = Replica(replicas, process_rank() == leader, leader, cpu_group, reason=why)
    else:
        model = adapters(load_whole(checkpoint, dtype, device))
        model = quantize_to_fp8(model, checkpoint, quantize)
        replica = Replica(replicas, reason=why)
    prepare_for_decoding(model)
    return model, replica


def load_whole(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return the model on one device. Its weights go there one by one, so the host holds no copy."""
    model = checkpoint.empty_model(dtype)
    checkpoint.fill(model, {"": device})
    return model.to(device)


def quantize_to_fp8(model: PreTrainedModel, checkpoint: Checkpoint, quantize: str | None) -> PreTrainedModel:
    """Return `model`, its blocks' GEMMs in FP8 if `quantize` is "fp8". Adapters must be attached before."""
    if quantize == FP8:
        fuse_qkv(model)
        convert_to_fp8(model, {*checkpoint.generation.linear_layers, QKV_PROJ}, trains=False)
    return model


def resolve_tp_size(
    checkpoint: Checkpoint, dtype: torch.dtype, quantize: str | None, tp_size: int | None
) -> tuple[int, str]:
    """
    Return over how many processes to shard the model, and why. Every process must call it.

    Raises:
        UsageError: quantised weights with `tp_size` above 1, or see `check_heads`.
    """
    if checkpoint.quantization or quantize:
        why = f"{quantize or f'int{checkpoint.quantization.bits}'} weights are not sharded"
        if (tp_size or 1) > 1:
            raise UsageError(f"--tp_size {tp_size}: {why}: leave it out")
        return 1, why
    if tp_size is not None:
        check_heads(checkpoint.config, tp_size)
        return tp_size, "--tp_size"
    return fitting_tp_size(checkpoint, dtype)


def fitting_tp_size(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[int, str]:
    """
    Return the fewest processes whose memory holds the model, by the process with least free memory, and why.

    Every process must call it.
    """
    weights = _weight_bytes(checkpoint.empty_model(dtype))
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info(local_rank())[0]
    else:
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    free = min(gather_from_all(free))
    heads = checkpoint.config.num_attention_heads
    sizes = [size for size in range(1, world_size() + 1) if world_size() % size == 0 and heads % size == 0]
    fitting = [size for size in sizes if MEMORY_FACTOR * weights / size < free]
    why = f"weights {describe_size(weights)}, free to a process {describe_size(free)}"
    if fitting:
        return fitting[0], why
    if heads % world_size():
        check_heads(checkpoint.config, world_size())
    return sizes[-1], why


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())


def input_device(model: PreTrainedModel) -> torch.device:
    """Return where inputs go: for a dispatched model the first device that computes, as weights may be offloaded."""
    if not hasattr(model, "hf_device_map"):
        return model.device
    computing = [device for device in model.hf_device_map.values() if device not in ("cpu", "disk")]
    return torch.device(computing[0] if computing else "cpu")


def dispatch(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    max_memory: dict[int | str, str] | None = None,
    offload_folder: str | None = None,
    quantize: str | None = None,
) -> PreTrainedModel:
    """
    Load a checkpoint onto the visible cards, then CPU memory, then files in `offload_folder`, layer by layer.

    Args:
        checkpoint: opened with `quantize=stored_bits(quantize)`.
        max_memory: limit of each device, like {0: "10GiB", "cpu": "30GiB"}; None is its free memory.
        offload_folder: for what fits nowhere else; None is a temporary directory, removed with the model.
        quantize: "int8", "int4" or "fp8"; `quantize_to_fp8` does the latter once adapters are attached.

    Raises:
        UsageError: see `Checkpoint.fill`; or no memory for a single layer.
    """
    model = checkpoint.empty_model(dtype)
    no_split = model._no_split_modules
    whole = None if max_memory else card_for_all(model)
    if whole is not None:
        device_map: dict[str, int | str] = {"": whole}
    else:
        memory = max_memory or get_balanced_memory(model, dtype=dtype, no_split_module_classes=no_split)
        device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=no_split, dtype=dtype)
    if quantize == FP8 and len(set(device_map.values())) > 1:
        raise UsageError("--quantize fp8 needs the whole model on one card, and it fits on none: use int8 or int4")
    if set(device_map.values()) == {"disk"}:
        raise UsageError("no device has memory for a single layer: free some, or raise --max_memory")
    if "disk" in device_map.values():
        if offload_folder is None:
            model.offload_directory = tempfile.TemporaryDirectory(prefix="offload-")  # removed with the model
            offload_folder = model.offload_directory.name
        Path(offload_folder).mkdir(parents=True, exist_ok=True)
    checkpoint.fill(model, device_map, offload_folder)
    model = dispatch_model(model, device_map=device_map, offload_dir=offload_folder)
    if whole is not None and torch.cuda.device_count() > 1:
        print_line(
            f"the model fits on card {whole} alone, where it is faster than spread: to use all cards, each with its "
            "share of the rows, start the script with deepspeed or torchrun"
        )
    return model.eval()


def card_for_all(model: PreTrainedModel) -> int | None:
    """Return the card with most free memory if the whole model and its activations fit there, else None."""
    if not torch.cuda.is_available():
        return None
    free = {card: torch.cuda.mem_get_info(card)[0] for card in range(torch.cuda.device_count())}
    card = max(free, key=free.get)
    return card if MEMORY_FACTOR * _weight_bytes(model) < free[card] else None
