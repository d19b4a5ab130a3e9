"""Where a model's weights lie for inference: sharded over processes by DeepSpeed, or over devices by accelerate."""

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from utils.chatglm.generations import Generation
from utils.checkpoint import Checkpoint, load_model
from utils.distributed import check_port, init_process_group, local_rank, print_once, world_size
from utils.errors import UsageError

import torch
from accelerate import dispatch_model
from accelerate.utils import get_balanced_memory, infer_auto_device_map
from transformers import PretrainedConfig, PreTrainedModel


def load_on_processes(
    path_or_id: str, dtype: torch.dtype, quantize: str | None, adapt: Callable[[PreTrainedModel], PreTrainedModel]
) -> tuple[PreTrainedModel, int]:
    """
    Loads a checkpoint for all processes together, each on its device: sharded by tensor parallelism, or, quantised,
    whole on each, since the integers of a row cannot be shared out.

    Args:
        quantize: see `load_model`.
        adapt: what puts the adapter on, called with the whole model on the CPU.

    Returns:
        The model, and over how many processes the rows must be shared out (1 where every process needs every row).

    Raises:
        UsageError: see `check_port`, `Checkpoint.open` and `check_heads`.
    """
    check_port()
    checkpoint = Checkpoint.open(path_or_id, quantize=quantize)
    replicated = checkpoint.quantization is not None and world_size() > 1
    if not replicated:
        check_heads(checkpoint.config)
    model = adapt(load_model(path_or_id, dtype=dtype, quantize=quantize))
    init_process_group(use_deepspeed=True)
    if replicated:
        print_once(
            f"int{checkpoint.quantization.bits} weights are not sharded: each process has all and its share of rows"
        )
        return model.to(f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu"), world_size()
    return shard_with_deepspeed(model, checkpoint.generation, dtype), 1


def check_heads(config: PretrainedConfig) -> None:
    """
    Raises:
        UsageError: the heads cannot be shared out evenly over all processes.
    """
    heads = config.num_attention_heads
    if heads % world_size():
        fitting = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise UsageError(
            f"{heads} attention heads cannot be split over {world_size()} processes: use {', '.join(fitting)}"
        )


def shard_with_deepspeed(model: PreTrainedModel, generation: Generation, dtype: torch.dtype) -> PreTrainedModel:
    """
    Splits the attention heads and the MLPs over all processes (tensor parallelism) with DeepSpeed's inference engine
    and moves this process's part to its device. Every process must give the same inputs and gets the same logits.

    DeepSpeed's own guess would take ChatGLM-6B's `query_key_value` as [Q; K; V] where it goes head by head, and its
    MLP as gated; both compute something else without an error. The generation says how its layers are split instead.

    Raises:
        UsageError: the key/value heads cannot be repeated evenly.
    """
    from deepspeed.inference.config import DeepSpeedInferenceConfig
    from deepspeed.inference.engine import InferenceEngine
    from deepspeed.module_inject.autotp_config import AutoTPConfig, PartitionType, TPLayerSpec

    repeat_key_value_heads(model, world_size())

    plan = generation.architecture.tensor_parallel
    partition = AutoTPConfig(
        tp_size=world_size(),
        layer_specs=[
            TPLayerSpec(patterns=[rf".*\b{name}\.weight$" for name in names], partition_type=kind, shape=shape)
            for names, kind, shape in (
                (plan.columns, PartitionType.COLUMN, None),
                (plan.packed_columns, PartitionType.COLUMN, (2, -1)),
                (plan.rows, PartitionType.ROW, None),
            )
        ],
        use_default_specs=False,
    )

    class PartitionedInferenceConfig(DeepSpeedInferenceConfig):
        """Answers what DeepSpeed's layer replacement asks of a configuration; the stock one has no answer."""

        def get_partition_config_object(self) -> AutoTPConfig:
            return partition

    # DeepSpeed shares the MLP out in grains of 64, the last rank taking the rest, which may leave a rank none.
    grain = 64 if model.config.intermediate_size % (64 * world_size()) == 0 else 1
    # This pair is what `deepspeed.init_inference` makes of its arguments, with the stock configuration.
    config = PartitionedInferenceConfig(
        dtype=dtype,
        tensor_parallel={"tp_size": world_size(), "tp_grain_size": grain},
        injection_policy={plan.block: plan.rows} if world_size() > 1 else None,
    )
    return InferenceEngine(model, config=config).module


def repeat_key_value_heads(model: PreTrainedModel, processes: int) -> None:
    """
    Grouped-query attention with fewer key/value heads than processes: repeats each, so that every process holds one.

    The repeated heads serve fewer query heads each; the attention computes the same.
    """
    groups = getattr(model.config, "num_key_value_heads", processes)
    if groups % processes == 0:
        return
    if processes % groups:
        raise UsageError(f"{groups} key/value heads cannot be repeated evenly over {processes} processes")
    times = processes // groups
    for module in model.modules():
        if not hasattr(module, "num_key_value_groups"):
            continue
        for projection in (module.k_proj, module.v_proj):
            for name, parameter in list(projection.named_parameters()):
                by_head = parameter.data.view(groups, module.head_dim, *parameter.shape[1:])
                repeated = by_head.repeat_interleave(times, dim=0).flatten(0, 1)
                setattr(projection, name, torch.nn.Parameter(repeated, requires_grad=False))
            projection.out_features *= times
        module.num_key_value_groups //= times
    model.config.num_key_value_heads *= times


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
        quantize: see `load_model`.

    Raises:
        UsageError: see `Checkpoint.open` and `.fill`; or no memory for a single layer.
    """
    checkpoint = Checkpoint.open(path_or_id, quantize=quantize)
    model = checkpoint.empty_model(dtype)
    no_split = model._no_split_modules
    memory = max_memory or get_balanced_memory(model, dtype=dtype, no_split_module_classes=no_split)
    device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=no_split, dtype=dtype)
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
    return model.eval()
