"""Where a model's weights lie for inference: sharded over processes by DeepSpeed, or over devices by accelerate."""

import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from accelerate import dispatch_model
from accelerate.utils import get_balanced_memory, infer_auto_device_map
from transformers import PreTrainedModel

from utils.checkpoint.model import Checkpoint, load_model
from utils.common.errors import UsageError
from utils.common.processes import local_rank, print_once, process_rank, world_size
from utils.distributed.collectives import gather_from_all
from utils.distributed.deepspeed_setup import init_deepspeed
from utils.inference.tensor_parallel import check_heads, shard_with_deepspeed, tensor_parallel_groups
from utils.inference.work_queue import Replica
from utils.layers.fp8 import FP8, convert_to_fp8
from utils.layers.fused_qkv import QKV_PROJ, fuse_qkv
from utils.layers.quantization import stored_bits

ROOM = 1.3  # memory in terms of the weights, for the cache and what is computed


def load_on_processes(
    path_or_id: str,
    dtype: torch.dtype,
    quantize: str | None,
    adapt: Callable[..., PreTrainedModel],
    tp_size: int | None = None,
) -> tuple[PreTrainedModel, Replica]:
    """
    Loads a checkpoint for all processes of the group, each on its device: whole, so that every process is a replica
    with its share of the rows, or sharded over `tp_size` processes by DeepSpeed's tensor parallelism.

    Args:
        quantize: "int8", "int4" or "fp8"; such weights are not sharded.
        adapt: what puts the adapters on, called with the whole model, and with `shards` before it is sharded.
        tp_size: None is 1 where every process has memory for the whole model, which is faster, and otherwise the
            fewest processes whose memory together holds it. The choice is printed.

    Raises:
        UsageError: see `Checkpoint.open` and `check_heads`; or quantised weights with `tp_size` above 1.
    """
    checkpoint = Checkpoint.open(path_or_id, quantize=stored_bits(quantize))
    processes = world_size()
    why = "as asked for"
    if checkpoint.quantization or quantize:
        why = f"{quantize or f'int{checkpoint.quantization.bits}'} weights are not sharded"
        if (tp_size or 1) > 1:
            raise UsageError(f"--tp_size {tp_size}: {why}: leave it out")
        tp_size = 1
    if tp_size is not None:
        check_heads(checkpoint.config, tp_size)
    if tp_size is None:
        tp_size, why = fitting_tp_size(checkpoint, dtype)
    if processes > 1:
        print_once(f"{processes // tp_size} replicas of the model, each on {tp_size} processes ({why})")
    if tp_size > 1:
        init_deepspeed()
        model = adapt(load_model(path_or_id, dtype=dtype), shards=True)
        group, cpu_group, leader = tensor_parallel_groups(tp_size)
        model = shard_with_deepspeed(model, checkpoint.generation, dtype, group)
        first = process_rank() == leader
        return model, Replica(processes // tp_size, first, leader, cpu_group)
    device = torch.device(f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu")
    model = adapt(load_whole(checkpoint, dtype, device))
    return quantize_to_fp8(model, checkpoint, quantize), Replica(processes)


def load_whole(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model on one device, its weights brought there one by one: the host holds no copy."""
    model = checkpoint.empty_model(dtype)
    checkpoint.fill(model, {"": device})
    return model.to(device)


def quantize_to_fp8(model: PreTrainedModel, checkpoint: Checkpoint, quantize: str | None) -> PreTrainedModel:
    """`model` with the products of its blocks in FP8, where `quantize` says so."""
    if quantize == FP8:
        fuse_qkv(model)
        convert_to_fp8(model, {*checkpoint.generation.linear_layers, QKV_PROJ}, trains=False)
    return model


def fitting_tp_size(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[int, str]:
    """
    Over how few processes a model must be sharded, by the memory that is free to the one that has least; and why.
    All processes must call it.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in checkpoint.empty_model(dtype).parameters())
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info(local_rank())[0]
    else:
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    free = min(gather_from_all(free))
    heads = checkpoint.config.num_attention_heads
    sizes = [size for size in range(1, world_size() + 1) if world_size() % size == 0 and heads % size == 0]
    fitting = [size for size in sizes if ROOM * weights / size < free]
    why = f"weights {weights / 2**30:.1f} GiB, free to a process {free / 2**30:.1f} GiB"
    if not fitting and world_size() > 1 and heads % world_size():
        check_heads(checkpoint.config, world_size())
    return (fitting or sizes)[0 if fitting else -1], why


def input_device(model: PreTrainedModel) -> torch.device:
    """Where inputs go: of a dispatched model, whose first weights may be offloaded, the first device that computes."""
    if not hasattr(model, "hf_device_map"):
        return model.device
    computing = [device for device in model.hf_device_map.values() if device not in ("cpu", "disk")]
    return torch.device(computing[0] if computing else "cpu")


def dispatch(
    path_or_id: str,
    dtype: torch.dtype,
    max_memory: dict[int | str, str] | None,
    offload_folder: str | None,
    quantize: str | None = None,
) -> PreTrainedModel:
    """
    Loads a checkpoint spread over the visible cards, then CPU memory, then files in `offload_folder`, layer by layer.

    This is what `accelerate.load_checkpoint_and_dispatch` does, of its parts: that function cannot read a checkpoint
    whose weights have other names than the model's, nor tell that one is missing.

    Args:
        max_memory: what each device may take, like {0: "10GiB", "cpu": "30GiB"}; None is what is free.
        offload_folder: for what fits nowhere else; None is a temporary directory, removed with the model.
        quantize: "int8", "int4" or "fp8", whose products are made by `quantize_to_fp8`.

    Raises:
        UsageError: see `Checkpoint.open` and `.fill`; or no memory for a single layer.
    """
    checkpoint = Checkpoint.open(path_or_id, quantize=stored_bits(quantize))
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
    layers = Counter(str(device) for device in device_map.values())
    print_once("placed " + ", ".join(f"{count} parts on {device}" for device, count in layers.items()))
    if whole is not None and torch.cuda.device_count() > 1:
        print_once(
            f"the model fits on card {whole} alone, where it is faster than spread: to use all cards, each with its "
            "share of the rows, start the script with deepspeed or torchrun"
        )
    return model.eval()


def card_for_all(model: PreTrainedModel) -> int | None:
    """The card with most free memory, where the whole model and what it computes fit there."""
    if not torch.cuda.is_available():
        return None
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    free = {card: torch.cuda.mem_get_info(card)[0] for card in range(torch.cuda.device_count())}
    card = max(free, key=free.get)
    return card if ROOM * weights < free[card] else None
