"""LoRA adapters as PEFT directories: attach, save, load, merge."""

import json
import warnings
from pathlib import Path

from utils.errors import UsageError

import torch
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

DEFAULT_TARGET_MODULES = ("query_key_value",)


def attach_adapter(
    model: PreTrainedModel,
    lora_rank: int,
    lora_alpha: int,
    lora_dropout: float,
    target_modules: list[str],
    seed: int,
) -> PeftModel:
    """
    Freezes `model` and adds a LoRA adapter that trains. The adapter's start depends on `seed` alone, not on what drew
    random numbers before, so that every launcher starts from the same one.

    Raises:
        UsageError: `target_modules` match no linear layer.
    """
    linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
    unknown = sorted(set(target_modules) - set(linear))
    if unknown:
        raise UsageError(
            f"--lora_target_modules {' '.join(unknown)}: the model's linear layers are {' '.join(linear)}"
        )
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_modules,
    )
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def gather_adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    """
    The adapter's weights under PEFT's names, float32, on the CPU. Every rank must call it: under ZeRO-3 it gathers
    the partitions, from the optimizer's float32 copy where there is one.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if any(hasattr(parameter, "ds_id") for parameter in trainable.values()):
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        full = {name: safe_get_full_fp32_param(parameter) for name, parameter in trainable.items()}
        if any(value is None for value in full.values()):  # before the optimizer is built
            with deepspeed.zero.GatheredParameters(list(trainable.values())):
                full = {name: parameter.data for name, parameter in trainable.items()}
                full = {name: value.detach().float().cpu().clone() for name, value in full.items()}
    else:
        full = {name: parameter.data for name, parameter in trainable.items()}
    state = {name: value.detach().float().cpu() for name, value in full.items()}
    return get_peft_model_state_dict(model, state_dict=state)


def save_adapter(model: PeftModel, directory: str | Path, is_main_process: bool = True) -> None:
    """
    Writes the adapter as a PEFT directory. Every rank must call it; the main process writes.

    Raises:
        RuntimeError: a weight is missing, has lost its shape, or is not finite.
    """
    state = gather_adapter(model)
    if not is_main_process:
        return
    _verify_state(model, state)
    # PEFT names the state once more; handing it the model's own names avoids a second gather.
    model.save_pretrained(directory, state_dict=state, is_main_process=True)
    with safe_open(Path(directory) / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        written = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    expected = {key: tuple(value.shape) for key, value in state.items()}
    if written != expected:
        raise RuntimeError(f"{directory} holds {len(written)} adapter weights where {len(expected)} were to be saved")


def _verify_state(model: PeftModel, state: dict[str, torch.Tensor]) -> None:
    config = model.active_peft_config
    pairs = sum(1 for name, _ in model.named_parameters() if ".lora_A." in name)
    if not state or len(state) != 2 * pairs:
        raise RuntimeError(
            f"the adapter to save has {len(state)} weights where {2 * pairs} belong: nothing is written"
        )
    for name, value in state.items():
        if value.ndim != 2 or config.r not in value.shape or 0 in value.shape:
            raise RuntimeError(f"{name} would be saved with shape {tuple(value.shape)}: nothing is written")
        if not torch.isfinite(value).all():
            raise RuntimeError(f"{name} is not finite: nothing is written")


def load_adapter(model: PreTrainedModel, path: str | Path) -> PeftModel:
    """
    Puts the adapter of a PEFT directory on `model`, frozen. The model may lie anywhere, also dispatched over devices
    and offloaded by accelerate.

    Raises:
        UsageError: no adapter there, or its weights are not those that its configuration makes on this model.
    """
    directory = Path(path)
    config = _read_config(directory)
    # Which base this is gets checked by shape below; PEFT would only warn, also where the path alone differs.
    config.base_model_name_or_path = model.name_or_path
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*base_model_name_or_path")
            adapted = get_peft_model(model, config)
    except ValueError as error:  # its targets match no layer
        raise UsageError(f"--adapter_path {directory} does not fit: {' '.join(str(error).split())}") from None
    _materialize(adapted)
    state = load_file(directory / SAFETENSORS_WEIGHTS_NAME)
    expected = {key: value.shape for key, value in get_peft_model_state_dict(adapted).items()}
    odd = sorted(key for key in state.keys() ^ expected.keys())
    if odd:
        raise UsageError(f"--adapter_path {directory} does not fit: {len(odd)} weights differ, first {odd[0]}")
    for key, value in state.items():
        if value.shape != expected[key]:
            raise UsageError(
                f"--adapter_path {directory} does not fit: {key} is {tuple(value.shape)}, not {tuple(expected[key])}"
            )
    set_peft_model_state_dict(adapted, state)
    return adapted.eval()


def _read_config(directory: Path) -> LoraConfig:
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise UsageError(f"--adapter_path {directory} has no {name}: it must be a directory saved by the training")
    try:
        values = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{directory / CONFIG_NAME} is not JSON: {error}") from None
    if values.get("peft_type") != "LORA":
        raise UsageError(f"--adapter_path {directory} is a {values.get('peft_type')} adapter; only LORA is supported")
    config = LoraConfig.from_pretrained(directory)
    config.inference_mode = True
    return config


def _materialize(model: PeftModel) -> None:
    """Gives the adapter of an offloaded layer memory where that layer computes; PEFT leaves it on the meta device."""
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        hook = getattr(layer.get_base_layer(), "_hf_hook", None)
        for branch in (layer.lora_A, layer.lora_B):
            for linear in branch.values():
                if linear.weight.is_meta:
                    linear.to_empty(device=hook.execution_device)


def merge_adapter(model: PreTrainedModel, path: str | Path) -> PreTrainedModel:
    """The model with the adapter added into its weights: no cost in decoding. Raises as `load_adapter`."""
    return load_adapter(model, path).merge_and_unload()
