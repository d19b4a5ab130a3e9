"""
Adapter files from anywhere -> plain LoRA on the layers of a model (`read_adapter`).

There are PEFT directories of this toolkit, PEFT directories made on the released remote-code models, and the bare
`chatglm-lora.pt` of the first ChatGLM training scripts. PEFT's own loading is not used: it ignores weights that match
no layer, and knows neither the released names nor files without a configuration.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import align_module_device
from peft import LoraConfig, TaskType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn
from transformers import GlmForCausalLM, PreTrainedModel

from utils.checkpoint.weight_files import read_tensors
from utils.common.errors import UsageError
from utils.lora.adapter_config import HOW_TO_CONVERT, AdapterConfig, LayerLora, read_adapter_config
from utils.models.convert_checkpoint import released_modules, target_keys

RAW_NAME = "chatglm-lora.pt"
RAW_ALPHA = 32  # what the scripts that wrote such files trained with
PEFT_KEY_PREFIX = "base_model.model."
WRAPPER_PREFIXES = ("module.", PEFT_KEY_PREFIX)  # that DeepSpeed and PEFT put before a weight's name
State = dict[str, torch.Tensor]  # PEFT's name of a weight -> the weight
Shapes = dict[str, tuple[int, int]]
# An adapter's name of a layer -> the model's layers under their names: several where the released code had one.
TargetLayers = Mapping[str, Mapping[str, nn.Module]]


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits its model: plain LoRA, each layer with rank and scaling."""

    state: State
    layers: dict[str, LayerLora]  # name of a layer in the model -> its rank and scaling

    def lora_config(self) -> LoraConfig:
        """The configuration with which PEFT makes exactly these layers; it names each of them."""
        (common, _), *_ = Counter(self.layers.values()).most_common(1)
        others = {f"^{re.escape(name)}": lora for name, lora in self.layers.items() if lora != common}
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=common.rank,
            lora_alpha=common.alpha,
            use_rslora=common.use_rslora,
            target_modules=list(self.layers),
            rank_pattern={name: lora.rank for name, lora in others.items()},
            alpha_pattern={name: lora.alpha for name, lora in others.items()},
        )

    def factors(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The A (R, in) and B (out, R) of a layer, float32: the weight gains its scaling * B A."""
        A, B = (self.state[f"{PEFT_KEY_PREFIX}{layer}.lora_{name}.weight"].float() for name in "AB")
        return A, B


def adapter_directory(path: str | Path) -> Path:
    """The PEFT directory around an adapter's file; otherwise `path` itself."""
    path = Path(path)
    return path.parent if not path.is_dir() and (path.parent / CONFIG_NAME).is_file() else path


def files_of_adapter(path: str | Path) -> list[Path]:
    """The adapter's files; its directory may hold others too, for example answers."""
    named = {Path(path)} if Path(path).is_file() else set()
    candidates = (file for pattern in ("adapter_*", RAW_NAME) for file in adapter_directory(path).glob(pattern))
    return sorted(named | {file for file in candidates if file.is_file()})


def read_adapter(
    path: str | Path,
    model: PreTrainedModel,
    lora_alpha: int | None,
    weight_of: Callable[[str], torch.Tensor] | None = None,
) -> Adapter:
    """
    An adapter as plain LoRA on `model`, whatever its files hold.

    An adapter made on the remote code of ChatGLM2-6B, ChatGLM3-6B or GLM-4-9B is split onto `GlmForCausalLM`: query,
    key and value share A, and each gets its rows of B. An adapter that was trained on a base without its principal
    part (PiSSA, OLoRA) gets that part as more rank, with the opposite sign. A file without a configuration has the
    rank of its shapes.

    Args:
        path: a PEFT directory or the weight file in one, a `chatglm-lora.pt`, or a directory that holds one.
        lora_alpha: for a file without a configuration; None is RAW_ALPHA.
        weight_of: gives a weight by its name, for an empty model (default: its own weights).

    Raises:
        UsageError: there is no adapter, it holds something else than LoRA weights, or its weights do not belong to
            the layers of `model` that the configuration names.
    """
    config, state = _read_files(Path(path), lora_alpha)
    modules = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Embedding)}
    released = isinstance(model, GlmForCausalLM) and any("encoder.layers." in key for key in state)
    if released:
        names = released_modules(model.config.num_hidden_layers)
        layers = config.adapted_layers(names, head="transformer.output_layer")
        targets = {name: {target: modules[target] for target in _converted_names(name)} for name in layers}
    else:
        layers = config.adapted_layers(modules, head="lm_head")
        targets = {name: {name: modules[name]} for name in layers}
    fault = _find_fault(state, layers, targets)
    if fault:
        raise UsageError(f"--adapter_path {path} does not fit: {fault}")
    if config.init in PRINCIPAL_PARTS:
        state, layers = _with_principal_parts(config, state, layers, targets, weight_of)
    if released:
        return _split(state, layers, targets)
    return Adapter(state, layers)


def _read_files(path: Path, lora_alpha: int | None) -> tuple[AdapterConfig, State]:
    """The configuration and the weights of an adapter; see `read_adapter`."""
    directory = adapter_directory(path)
    if (directory / CONFIG_NAME).is_file():
        if lora_alpha is not None:
            fault = f"{directory} records its own; the flag is for a bare {RAW_NAME}"
            raise UsageError(f"--lora_alpha {lora_alpha}: {fault}")
        config = read_adapter_config(directory / CONFIG_NAME)
        file = _weight_file(directory) if path.is_dir() else path
        return config, _read_state(file)
    file = path / RAW_NAME if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"--adapter_path {path} has neither {CONFIG_NAME} nor {RAW_NAME}: is it an adapter?")
    if lora_alpha is None and file.name in (WEIGHTS_NAME, SAFETENSORS_WEIGHTS_NAME):
        fault = f"has no {CONFIG_NAME} beside it, which says with which alpha and layers it was trained"
        raise UsageError(f"--adapter_path {file} {fault}: put it there")
    state = _read_state(file)
    return _config_of_shapes(state, RAW_ALPHA if lora_alpha is None else lora_alpha, file), state


def _weight_file(directory: Path) -> Path:
    """The weight file of a PEFT directory."""
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, RAW_NAME):
        if (directory / name).is_file():
            return directory / name
    raise UsageError(f"--adapter_path {directory} has neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}")


def _read_state(file: Path) -> State:
    """
    The weights of an adapter under the names that PEFT saves them under.

    Files have `lora_A.default.weight` or `lora_A.weight`, with and without the prefixes of wrappers.
    """
    state = {}
    for key, value in read_tensors(file):
        name = key
        while name.startswith(WRAPPER_PREFIXES):
            name = name.removeprefix(WRAPPER_PREFIXES[0]).removeprefix(WRAPPER_PREFIXES[1])
        module, _, kind = name.replace(".default.weight", ".weight").rpartition(".lora_")
        if not module or kind not in ("A.weight", "B.weight"):
            fault = f"{key[:200]} is not a LoRA weight, and an adapter of this toolkit holds nothing else"
            raise UsageError(f"{file}: {fault}")
        state[f"{PEFT_KEY_PREFIX}{module}.lora_{kind}"] = value
    return state


def _config_of_shapes(state: State, lora_alpha: int, file: Path) -> AdapterConfig:
    """The configuration of a bare weight file: its layers, the rank of its shapes."""
    ranks = {value.shape[0] for key, value in state.items() if ".lora_A." in key and value.ndim}
    if len(ranks) != 1:
        raise UsageError(f"{file} holds {len(ranks)} ranks of LoRA weights, {sorted(ranks)[:9]}, and must hold one")
    layers = frozenset(key.removeprefix(PEFT_KEY_PREFIX).rpartition(".lora_")[0] for key in state)
    return AdapterConfig(file=file, rank=ranks.pop(), alpha=lora_alpha, targets=layers)


def _converted_names(released: str) -> tuple[str, ...]:
    """The layers of `GlmForCausalLM` that a released layer has become."""
    return tuple(target.removesuffix(".weight") for target in target_keys(f"{released}.weight"))


def _find_fault(state: State, layers: Mapping[str, LayerLora], targets: TargetLayers) -> str | None:
    """An error message if an adapter does not fit the model, else None."""
    if not layers:
        return "its target_modules match no layer"
    for name in layers:
        if any(isinstance(layer, nn.Embedding) for layer in targets[name].values()):
            return f"{name} is an embedding, and an adapter of this toolkit holds only linear layers"
    return find_misfit(state, _expected_shapes(layers, targets))


def _expected_shapes(layers: Mapping[str, LayerLora], targets: TargetLayers) -> Shapes:
    """The shapes of A (R, in) and B (out, R) of each layer, by PEFT's names."""
    shapes = {}
    for name, lora in layers.items():
        modules = list(targets[name].values())
        shapes[f"{PEFT_KEY_PREFIX}{name}.lora_A.weight"] = (lora.rank, modules[0].in_features)
        shapes[f"{PEFT_KEY_PREFIX}{name}.lora_B.weight"] = (sum(layer.out_features for layer in modules), lora.rank)
    return shapes


def find_misfit(state: State, shapes: Shapes) -> str | None:
    """An error message if an adapter's weights differ from the expected ones, else None."""
    for names, fault in (
        (state.keys() - shapes.keys(), "match nothing"),
        (shapes.keys() - state.keys(), "are missing"),
    ):
        if names:
            return f"{len(names)} weights {fault}, first {min(names)[:200]}"
    for name, value in state.items():
        if tuple(value.shape) != shapes[name]:
            return f"{name} is {tuple(value.shape)}, not {shapes[name]}"
        if not value.is_floating_point():
            return f"{name} is {str(value.dtype).removeprefix('torch.')}"
        if not torch.isfinite(value).all():
            return f"{name} is not finite"
    return None


def _pissa(weight: torch.Tensor, lora: LayerLora) -> tuple[torch.Tensor, torch.Tensor]:
    """The A (R, in) and B (out, R) of PEFT's PiSSA: `weight`'s largest singular values."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    roots = (values[: lora.rank] / lora.scaling).sqrt()
    return roots[:, None] * right[: lora.rank], left[:, : lora.rank] * roots


def _olora(weight: torch.Tensor, lora: LayerLora) -> tuple[torch.Tensor, torch.Tensor]:
    """The A (R, in) and B (out, R) of PEFT's OLoRA: `weight`'s QR decomposition."""
    left, right = torch.linalg.qr(weight)
    return right[: lora.rank], left[:, : lora.rank]


PRINCIPAL_PARTS = {"pissa": _pissa, "olora": _olora}


def _with_principal_parts(
    config: AdapterConfig,
    state: State,
    layers: Mapping[str, LayerLora],
    targets: TargetLayers,
    weight_of: Callable[[str], torch.Tensor] | None,
) -> tuple[State, dict[str, LayerLora]]:
    """
    The same adapter relative to the whole base.

    It was trained beside base - scaling * B0 A0, so A0 and -B0 become more rank, as in PEFT's own conversion.
    """
    converted, widened = {}, {}
    for name, lora in layers.items():
        weights = []
        for target, layer in targets[name].items():
            with align_module_device(layer):  # brings an offloaded weight
                weight = layer.weight if weight_of is None else weight_of(f"{target}.weight")
                if not weight.is_floating_point():
                    fault = f"{config.init} takes a part out of a base in full precision, and this one is quantised"
                    raise UsageError(f"{config.file}: init_lora_weights {fault}: {HOW_TO_CONVERT}")
                weights.append(weight.detach().float())
        A0, B0 = (value.cpu() for value in PRINCIPAL_PARTS[config.init](torch.cat(weights), lora))
        if len(A0) < lora.rank or lora.scaling <= 0:
            raise UsageError(f"{config.file}: {config.init} cannot begin with rank {lora.rank} at {name}")
        key = f"{PEFT_KEY_PREFIX}{name}.lora_"
        converted[f"{key}A.weight"] = torch.cat([state[f"{key}A.weight"].float(), A0])
        converted[f"{key}B.weight"] = torch.cat([state[f"{key}B.weight"].float(), -B0], dim=1)
        widened[name] = lora.widened(2)
    return converted, widened


def _split(state: State, layers: Mapping[str, LayerLora], targets: TargetLayers) -> Adapter:
    """An adapter of released layers, split onto the model's layers that they have become."""
    converted, split = {}, {}
    for name, lora in layers.items():
        sizes = [layer.out_features for layer in targets[name].values()]
        key = f"{PEFT_KEY_PREFIX}{name}.lora_"
        for target, B in zip(targets[name], state[f"{key}B.weight"].split(sizes), strict=True):
            converted[f"{PEFT_KEY_PREFIX}{target}.lora_A.weight"] = state[f"{key}A.weight"].clone()
            converted[f"{PEFT_KEY_PREFIX}{target}.lora_B.weight"] = B.clone()
            split[target] = lora
    return Adapter(converted, split)
