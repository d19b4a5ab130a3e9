"""
LoRA adapters on a model: attach a new one, save it as a PEFT directory, load one, merge one.

Training attaches and saves; inference loads and merges, after `check_base` has compared the base that the adapter's
origin file records. `utils/lora/formats.py` reads adapter files.
"""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from utils.checkpoint.model import Checkpoint
from utils.common.errors import RunError, UsageError
from utils.common.files import apply_umask
from utils.common.json_files import read_json_object
from utils.layers.lora_linear import LoraLinear
from utils.layers.quantization import is_quantized
from utils.lora.formats import Shapes, State, adapter_directory, find_misfit, read_adapter
from utils.models.family import GLM4
from utils.models.templates import TEMPLATES


@dataclass(frozen=True)
class LoraSettings:
    """The shape of a new adapter."""

    rank: int  # R
    alpha: int  # B A is scaled by alpha / R
    dropout: float  # before A
    target_modules: list[str]  # the linear layers to adapt, by the ends of their names


def attach_adapter(model: PreTrainedModel, settings: LoraSettings, seed: int) -> PeftModel:
    """
    Freeze `model` and add a LoRA adapter that trains.

    The adapter's initial weights depend only on `seed`, not on earlier random numbers, so that every launcher starts
    from the same ones.
    """
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
    )
    config._register_custom_module({torch.nn.Linear: LoraLinear})
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def scale_losses_under_zero3(model: PeftModel) -> None:
    """
    Make the trained weights float16, so that DeepSpeed's ZeRO-3 scales losses in float16 training.

    It scales only if they are; PEFT makes them float32, and the gradients, which pass through float16, would
    underflow. The optimizer keeps float32 copies of its own.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()


# The embedding is never trained; without the argument PEFT reads the base's config.json to find that out.
adapter_weights = partial(get_peft_model_state_dict, save_embedding_layers=False)


def gather_adapter(model: PeftModel) -> State:
    """
    The adapter's weights under PEFT's names, float32, on the CPU.

    Every rank must call it. It gathers what FSDP2 shards, and under DeepSpeed the float32 copies in the optimizer's
    partitions.

    Raises:
        RuntimeError: DeepSpeed's optimizer holds no copy of a weight.
    """
    state = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        value = parameter.data
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            from deepspeed.utils import safe_get_full_fp32_param

            value = safe_get_full_fp32_param(parameter)
            if value is None:
                raise RuntimeError(f"DeepSpeed's optimizer holds no copy of {name}: nothing is written")
        elif isinstance(value, DTensor):
            value = value.full_tensor()
        state[name] = value.detach().float().cpu()
    return adapter_weights(model, state_dict=state)


def adapter_shapes(model: PeftModel) -> Shapes:
    """The shapes of the adapter's A (R, in) and B (out, R), by PEFT's names."""
    lora_rank = model.active_peft_config.r
    shapes = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            shapes[f"{name}.lora_A.weight"] = (lora_rank, layer.in_features)
            shapes[f"{name}.lora_B.weight"] = (layer.out_features, lora_rank)
    return shapes


ADAPTER_ORIGIN_FILE = "adapter_origin.json"


@dataclass(frozen=True)
class AdapterOrigin:
    """What an adapter was trained with: the file `adapter_origin.json` in its directory."""

    template: str  # one of utils.models.templates.TEMPLATES
    base: dict[str, Any]  # Checkpoint.fingerprint of the base model
    model_name_or_path: str
    tokenizer: str | None = None  # fingerprint of the tokenizer that made its rows; older adapters lack it


ORIGIN_TYPES = {"template": str, "base": dict, "model_name_or_path": str}


def read_origin(path: str | Path) -> AdapterOrigin | None:
    """
    The origin recorded beside an adapter; None for an adapter that another tool made.

    Raises:
        UsageError: the file is not one that `save_adapter` writes.
    """
    file = adapter_directory(path) / ADAPTER_ORIGIN_FILE
    if not file.exists():
        return None
    values = read_json_object(file, ORIGIN_TYPES)
    tokenizer = values.get("tokenizer")
    is_ours = {"norms", "matrices", "bits"} <= values["base"].keys() and isinstance(tokenizer, str | None)
    if not is_ours or values["template"] not in TEMPLATES:
        raise UsageError(f"{file} is not what this toolkit writes: without it the base is not checked")
    return AdapterOrigin(**{name: values[name] for name in ORIGIN_TYPES}, tokenizer=tokenizer)


def check_base(path: str | Path, checkpoint: Checkpoint) -> None:
    """
    Check that an adapter was trained on these weights, if its origin is recorded.

    Raises:
        UsageError: the adapter was trained on other weights than the checkpoint's.
    """
    origin = read_origin(path)
    if origin is None:
        return
    fingerprint = checkpoint.fingerprint()
    # Quantising changes the matrices and leaves the norms alone.
    compared = ("norms", "matrices") if fingerprint["bits"] == origin.base["bits"] else ("norms",)
    if any(fingerprint[name] != origin.base[name] for name in compared):
        raise UsageError(
            f"--adapter_path {path} was trained on other weights than those in {checkpoint.directory}, on "
            f"{origin.model_name_or_path}: pass that with --model_name_or_path, or --any_base to use it all the same"
        )


def warn_of_old_ids(path: str | Path, checkpoint: Checkpoint) -> str | None:
    """A warning if an older version trained the adapter on wrong token ids of GLM-4-9B, else None."""
    if checkpoint.generation.flag != GLM4.flag:
        return None
    origin = read_origin(path)
    if origin is None or origin.tokenizer is not None:
        return None
    return (
        f"{path} was trained by an older version of this toolkit, in which GLM-4's tokenizer.model gave other token "
        "ids than the release, and answers worse for it: tokenise the rows again and train it anew"
    )


def save_adapter(
    model: PeftModel,
    directory: str | Path,
    origin: AdapterOrigin | None = None,
    is_main_process: bool = True,
    trained: bool = False,
) -> None:
    """
    Write the adapter and its origin as a PEFT directory, and read it back.

    Every rank must call it; the main process writes.

    Args:
        trained: whether the adapter must differ from its initial weights, whose B are zero.

    Raises:
        RuntimeError: a weight is missing, has another shape, or is not finite, and nothing is written; or the written
            file does not hold the adapter.
        RunError: with `trained`, the adapter never changed, and nothing is written.
    """
    state = gather_adapter(model)
    if not is_main_process:
        return
    if trained and not any(value.any() for name, value in state.items() if ".lora_B." in name):
        raise RunError(
            "adapter not saved: it never changed (every lora_B is zero); check --learning_rate and --max_steps"
        )
    misfit = find_misfit(state, adapter_shapes(model)) if state else "it has no weights"
    if misfit:
        raise RuntimeError(f"adapter not saved: {misfit}")
    model.save_pretrained(directory, state_dict=state, save_embedding_layers=False)
    apply_umask(directory)
    if origin:
        (Path(directory) / ADAPTER_ORIGIN_FILE).write_text(json.dumps(asdict(origin), indent=2), encoding="utf-8")
    written = load_file(Path(directory) / SAFETENSORS_WEIGHTS_NAME)
    if written.keys() != state.keys() or not all(torch.equal(written[name], state[name]) for name in state):
        raise RuntimeError(f"{directory} does not hold the adapter that was saved: is the disk full?")


def load_adapter(model: PreTrainedModel, path: str | Path, lora_alpha: int | None = None) -> PeftModel:
    """
    Put a frozen adapter on a model.

    The model may be quantised, dispatched over devices, or offloaded by accelerate.

    Args:
        path: any adapter that `read_adapter` can read.
        lora_alpha: for an adapter that does not record it.

    Raises:
        UsageError: see `read_adapter`.
    """
    adapter = read_adapter(path, model, lora_alpha)
    config = adapter.lora_config()
    config.inference_mode = True
    config.base_model_name_or_path = model.name_or_path  # what a user saves says what it is for
    adapted = get_peft_model(model, config)
    _materialize(adapted)
    set_peft_model_state_dict(adapted, adapter.state)
    return adapted.eval()


def _materialize(model: PeftModel) -> None:
    """Move adapters that PEFT left on meta, of offloaded layers, to the computing device."""
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        hook = getattr(layer.get_base_layer(), "_hf_hook", None)
        for factors in (layer.lora_A, layer.lora_B):
            for linear in factors.values():
                if linear.weight.is_meta:
                    linear.to_empty(device=hook.execution_device)


def merge_adapter(model: PreTrainedModel, path: str | Path, lora_alpha: int | None = None) -> PreTrainedModel:
    """
    The model with the adapter added into its weights: no cost in decoding.

    A quantised model keeps the adapter beside its weights, because integers cannot take it. Raises as `load_adapter`.
    """
    adapted = load_adapter(model, path, lora_alpha)
    return adapted if is_quantized(model) else adapted.merge_and_unload()
