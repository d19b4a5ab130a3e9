"""Where a model's weights lie for inference: sharded over processes by DeepSpeed, or over devices by accelerate."""

import json
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from utils.chatglm import ChatGLMForConditionalGeneration
from utils.checkpoint import load_config, local_directory
from utils.distributed import print_once, world_size
from utils.errors import UsageError

import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from accelerate.utils import get_balanced_memory, infer_auto_device_map
from safetensors import safe_open
from transformers import PreTrainedModel

SAFETENSORS = "model.safetensors"
PYTORCH = "pytorch_model.bin"


def shard_with_deepspeed(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """
    Splits the attention heads and the MLPs over all processes (tensor parallelism) with DeepSpeed's inference engine
    and moves this process's part to its device. Every process must give the same inputs and gets the same logits.

    DeepSpeed's own guess would take `query_key_value` as [Q; K; V] where it goes head by head, and the MLP as gated;
    both compute something else without an error. The model's class says how it is split instead.

    Raises:
        UsageError: the heads cannot be shared out evenly.
    """
    from deepspeed.inference.config import DeepSpeedInferenceConfig
    from deepspeed.inference.engine import InferenceEngine
    from deepspeed.module_inject.autotp_config import AutoTPConfig, PartitionType, TPLayerSpec

    heads = model.config.num_attention_heads
    if heads % world_size():
        fitting = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise UsageError(
            f"{heads} attention heads cannot be split over {world_size()} processes: use {', '.join(fitting)}"
        )

    partition = AutoTPConfig(
        tp_size=world_size(),
        layer_specs=[
            TPLayerSpec(
                patterns=[rf".*\b{name}\.weight$" for name in names],
                partition_type=partition_type,
            )
            for names, partition_type in (
                (model.tensor_parallel_columns, PartitionType.COLUMN),
                (model.tensor_parallel_rows, PartitionType.ROW),
            )
        ],
        use_default_specs=False,
    )

    class PartitionedInferenceConfig(DeepSpeedInferenceConfig):
        """Answers what DeepSpeed's layer replacement asks of a configuration; the stock one has no answer."""

        def get_partition_config_object(self) -> AutoTPConfig:
            return partition

    # This pair is what `deepspeed.init_inference` makes of its arguments, with the stock configuration.
    config = PartitionedInferenceConfig(
        dtype=dtype,
        tensor_parallel={"tp_size": world_size()},
        injection_policy={model.tensor_parallel_block: model.tensor_parallel_rows} if world_size() > 1 else None,
    )
    return InferenceEngine(model, config=config).module


def input_device(model: PreTrainedModel) -> torch.device:
    """Where inputs go: of a dispatched model, whose first weights may be offloaded, the first device that computes."""
    if not hasattr(model, "hf_device_map"):
        return model.device
    computing = [device for device in model.hf_device_map.values() if device not in ("cpu", "disk")]
    return torch.device(computing[0] if computing else "cpu")


def dispatch(
    path_or_id: str, dtype: torch.dtype, max_memory: dict[int | str, str] | None, offload_folder: str | None
) -> PreTrainedModel:
    """
    Loads a checkpoint spread over the visible cards, then CPU memory, then files in `offload_folder`, layer by layer.

    Args:
        max_memory: what each device may take, like {0: "10GiB", "cpu": "30GiB"}; None is what is free.
        offload_folder: for what fits nowhere else; None is a temporary directory.

    Raises:
        UsageError: see `local_directory` and `load_config`; or the weights are missing, incomplete or untied.
    """
    directory = local_directory(path_or_id)
    config = load_config(directory)
    files = WeightFiles.find(directory)
    with init_empty_weights():
        model = ChatGLMForConditionalGeneration(config)
    model.tie_weights()
    _check_weights(model, files)
    no_split = model._no_split_modules
    memory = max_memory or get_balanced_memory(model, dtype=dtype, no_split_module_classes=no_split)
    device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=no_split, dtype=dtype)
    if set(device_map.values()) == {"disk"}:
        raise UsageError("no device has memory for a single layer: free some, or raise --max_memory")
    if "disk" in device_map.values() and offload_folder is None:
        offload_folder = tempfile.mkdtemp(prefix="offload-")
    model = load_checkpoint_and_dispatch(
        model,
        str(files.entry),
        device_map=device_map,
        no_split_module_classes=no_split,
        offload_folder=offload_folder,
        dtype=dtype,
    )
    layers = Counter(str(device) for name, device in device_map.items())
    print_once("placed " + ", ".join(f"{count} parts on {device}" for device, count in layers.items()))
    return model.eval()


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a checkpoint directory."""

    entry: Path  # the index, or the only file
    weight_map: dict[str, Path]  # weight -> the file that holds it

    @classmethod
    def find(cls, directory: Path) -> "WeightFiles":
        """
        Raises:
            UsageError: no weights, or a file that the index names is missing.
        """
        for kind in (SAFETENSORS, PYTORCH):
            index = directory / f"{kind}.index.json"
            if index.is_file():
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                missing = sorted({name for name in names.values() if not (directory / name).is_file()})
                if missing:
                    raise UsageError(f"{directory} lacks {len(missing)} of its weight files, first {missing[0]}")
                return cls(index, {key: directory / name for key, name in names.items()})
            single = directory / kind
            if single.is_file():
                return cls(single, dict.fromkeys(cls._keys(single), single))
        raise UsageError(f"{directory} has neither {SAFETENSORS} nor {PYTORCH} nor an index of such files")

    @staticmethod
    def _keys(file: Path) -> list[str]:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return list(opened.keys())
        return list(torch.load(file, map_location="cpu", weights_only=True, mmap=True))

    def read(self, key: str) -> torch.Tensor:
        """One weight, mapped from its file."""
        file = self.weight_map[key]
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(key)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)[key]


def _check_weights(model: PreTrainedModel, files: WeightFiles) -> None:
    """accelerate loads what it finds and is silent about the rest, so what must be there is checked before."""
    expected = set(model.state_dict())
    tied = {key: source for key, source in model.all_tied_weights_keys.items() if key in files.weight_map}
    missing = sorted(expected - set(files.weight_map) - set(model.all_tied_weights_keys))
    ignored = model._keys_to_ignore_on_load_unexpected
    unknown = sorted(
        key for key in set(files.weight_map) - expected if not any(re.search(pattern, key) for pattern in ignored)
    )
    for kind, keys in (("missing", missing), ("unexpected", unknown)):
        if keys:
            raise UsageError(f"{files.entry.parent}: {len(keys)} {kind} keys in the weights, first {keys[0]}")
    for key, source in tied.items():
        if not torch.equal(files.read(key), files.read(source)):
            raise UsageError(
                f"{files.entry.parent}: {key} differs from {source}, which ties it, and dispatching cannot tell them "
                "apart: save the model once with transformers' save_pretrained, which leaves out the tied copy"
            )
