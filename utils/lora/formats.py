"""
LoRA adapters as files, from wherever they come: PEFT directories of this toolkit, PEFT directories made on the
released remote-code models, and the bare `chatglm-lora.pt` of the first ChatGLM training scripts.
"""

import re
from collections import Counter
from collections.abc import Mapping
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
from utils.lora.adapter_config import CONVERT, AdapterConfig, Branch, read_config
from utils.models.convert_checkpoint import released_modules, target_keys

RAW_NAME = "chatglm-lora.pt"
RAW_ALPHA = 32  # what the scripts that wrote such files trained with
PEFT_KEY_PREFIX = "base_model.model."
WRAPPERS = ("module.", PEFT_KEY_PREFIX)  # what stands before a name, of DeepSpeed and of PEFT
State = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits its model: plain LoRA on linear layers, each with its own rank and scaling."""

    state: State  # under the names that PEFT gives the weights
    branches: dict[str, Branch]  # layer -> what it has

    def lora_config(self) -> LoraConfig:
        """The configuration with which PEFT makes exactly these branches; it names each layer."""
        (common, _), *_ = Counter(self.branches.values()).most_common(1)
        others = {f"^{re.escape(name)}": branch for name, branch in self.branches.items() if branch != common}
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=common.rank,
            lora_alpha=common.alpha,
            use_rslora=common.use_rslora,
            target_modules=list(self.branches),
            rank_pattern={name: branch.rank for name, branch in others.items()},
            alpha_pattern={name: branch.alpha for name, branch in others.items()},
        )


def adapter_directory(path: str | Path) -> Path:
    """The PEFT directory of an adapter that is given by one of its files; otherwise `path` itself."""
    path = Path(path)
    return path.parent if not path.is_dir() and (path.parent / CONFIG_NAME).is_file() else path


def files_of_adapter(path: str | Path) -> list[Path]:
    """The files that an adapter is read from; its directory may hold others too, such as answers."""
    named = {Path(path)} if Path(path).is_file() else set()
    found = (file for pattern in ("adapter_*", RAW_NAME) for file in adapter_directory(path).glob(pattern))
    return sorted(named | {file for file in found if file.is_file()})


def read_adapter(path: str | Path, model: PreTrainedModel, lora_alpha: int | None) -> Adapter:
    """
    An adapter as plain LoRA on `model`, whatever its files hold.

    The weights of an adapter made on the remote code of ChatGLM2-6B, ChatGLM3-6B or GLM-4-9B become those of
    `GlmForCausalLM`: the query, key and value share A, and each gets its rows of B. An adapter that was trained on a
    base without its principal part (PiSSA, OLoRA) gets that part as more rank, with the opposite sign. A file without
    a configuration has the rank of its shapes.

    Args:
        path: a PEFT directory or the weight file in one, a `chatglm-lora.pt`, or a directory that holds one.
        lora_alpha: for a file without a configuration; None is RAW_ALPHA.

    Raises:
        UsageError: nothing there that can be read, something else than LoRA weights in it, or weights that do not
            belong to the layers of `model` that the configuration names.
    """
    path, directory = Path(path), adapter_directory(path)
    if (directory / CONFIG_NAME).is_file():
        if lora_alpha is not None:
            fault = f"{directory} records its own; the flag is for a bare {RAW_NAME}"
            raise UsageError(f"--lora_alpha {lora_alpha}: {fault}")
        config = read_config(directory / CONFIG_NAME)
        file = _weight_file(directory) if path.is_dir() else path
        state = _canonical(file)
    else:
        file = path / RAW_NAME if path.is_dir() else path
        if not file.is_file():
            raise UsageError(f"--adapter_path {path} has neither {CONFIG_NAME} nor {RAW_NAME}: is it an adapter?")
        if lora_alpha is None and file.name in (WEIGHTS_NAME, SAFETENSORS_WEIGHTS_NAME):
            fault = f"has no {CONFIG_NAME} beside it, which says with which alpha and layers it was trained"
            raise UsageError(f"--adapter_path {file} {fault}: put it there")
        state = _canonical(file)
        config = _config_of(state, RAW_ALPHA if lora_alpha is None else lora_alpha, file)
    modules = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Embedding)}
    released = isinstance(model, GlmForCausalLM) and any("encoder.layers." in key for key in state)
    if released:
        names, head = released_modules(model.config.num_hidden_layers), "transformer.output_layer"
    else:
        names, head = list(modules), "lm_head"
    parts = {name: _parts(name) if released else (name,) for name in names}
    branches = config.branches(names, head)
    embedding = next((name for name in branches if isinstance(modules[parts[name][0]], nn.Embedding)), None)
    if embedding:
        misfit = f"{embedding} is an embedding, and an adapter of this toolkit holds linear layers alone"
    elif branches:
        misfit = find_misfit(state, _shapes(branches, parts, modules))
    else:
        misfit = "its target_modules match no layer"
    if misfit:
        raise UsageError(f"--adapter_path {path} does not fit: {misfit}")
    if config.init in PRINCIPAL_PARTS:
        state, branches = _with_principal_parts(config, state, branches, parts, modules)
    return _split(state, branches, parts, modules) if released else Adapter(state, branches)


def _weight_file(directory: Path) -> Path:
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, RAW_NAME):
        if (directory / name).is_file():
            return directory / name
    raise UsageError(f"--adapter_path {directory} has neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}")


def _canonical(file: Path) -> State:
    """`...lora_A.default.weight` and `...lora_A.weight`, with and without wrappers' prefixes, in PEFT's saved form."""
    canonical = {}
    for key, value in read_tensors(file):
        name = key
        while name.startswith(WRAPPERS):
            name = name.removeprefix(WRAPPERS[0]).removeprefix(WRAPPERS[1])
        module, _, kind = name.replace(".default.weight", ".weight").rpartition(".lora_")
        if not module or kind not in ("A.weight", "B.weight"):
            fault = f"{key[:200]} is no LoRA weight, and an adapter of this toolkit holds nothing else"
            raise UsageError(f"{file}: {fault}")
        canonical[f"{PEFT_KEY_PREFIX}{module}.lora_{kind}"] = value
    return canonical


def _module(key: str) -> str:
    return key.removeprefix(PEFT_KEY_PREFIX).rpartition(".lora_")[0]


def _config_of(state: State, lora_alpha: int, file: Path) -> AdapterConfig:
    ranks = {value.shape[0] for key, value in state.items() if ".lora_A." in key and value.ndim}
    if len(ranks) != 1:
        raise UsageError(f"{file} holds {len(ranks)} ranks of LoRA weights, {sorted(ranks)[:9]}, and must hold one")
    targets = frozenset(map(_module, state))
    return AdapterConfig(file=file, rank=ranks.pop(), alpha=lora_alpha, targets=targets)


def _parts(released: str) -> tuple[str, ...]:
    """The layers of `GlmForCausalLM` that a released one has become."""
    return tuple(target.removesuffix(".weight") for target in target_keys(f"{released}.weight"))


def _shapes(
    branches: Mapping[str, Branch], parts: Mapping[str, tuple[str, ...]], modules: Mapping[str, nn.Module]
) -> Shapes:
    """The weights of `branches`, under PEFT's names."""
    shapes = {}
    for name, branch in branches.items():
        layers = [modules[part] for part in parts[name]]
        shapes[f"{PEFT_KEY_PREFIX}{name}.lora_A.weight"] = (branch.rank, layers[0].in_features)
        shapes[f"{PEFT_KEY_PREFIX}{name}.lora_B.weight"] = (sum(layer.out_features for layer in layers), branch.rank)
    return shapes


def find_misfit(state: State, shapes: Shapes) -> str | None:
    """Says in words where an adapter's weights differ from the expected ones; None where they fit."""
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


def _pissa(weight: torch.Tensor, branch: Branch) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) as PEFT begins with them: scaling * B A is of the largest singular values."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    roots = (values[: branch.rank] / branch.scaling).sqrt()
    return roots[:, None] * right[: branch.rank], left[:, : branch.rank] * roots


def _olora(weight: torch.Tensor, branch: Branch) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) as PEFT begins with them, of the weight's QR decomposition."""
    left, right = torch.linalg.qr(weight)
    return right[: branch.rank], left[:, : branch.rank]


PRINCIPAL_PARTS = {"pissa": _pissa, "olora": _olora}


def _with_principal_parts(
    config: AdapterConfig,
    state: State,
    branches: Mapping[str, Branch],
    parts: Mapping[str, tuple[str, ...]],
    modules: Mapping[str, nn.Module],
) -> tuple[State, dict[str, Branch]]:
    """
    The same adapter relative to the base as it is: trained was base - scaling * B0 A0, so A0 and -B0 become more rank,
    as PEFT's own conversion when saving makes them.
    """
    converted, widened = {}, {}
    for name, branch in branches.items():
        weights = []
        for layer in (modules[part] for part in parts[name]):
            with align_module_device(layer):  # brings an offloaded weight
                if not layer.weight.is_floating_point():
                    fault = f"{config.init} takes a part out of a base in full precision, and this one is quantised"
                    raise UsageError(f"{config.file}: init_lora_weights {fault}: {CONVERT}")
                weights.append(layer.weight.detach().float())
        A0, B0 = (value.cpu() for value in PRINCIPAL_PARTS[config.init](torch.cat(weights), branch))
        if len(A0) < branch.rank or branch.scaling <= 0:
            raise UsageError(f"{config.file}: {config.init} cannot begin with rank {branch.rank} at {name}")
        key = f"{PEFT_KEY_PREFIX}{name}.lora_"
        converted[f"{key}A.weight"] = torch.cat([state[f"{key}A.weight"].float(), A0])
        converted[f"{key}B.weight"] = torch.cat([state[f"{key}B.weight"].float(), -B0], dim=1)
        widened[name] = branch.widened(2)
    return converted, widened


def _split(
    state: State,
    branches: Mapping[str, Branch],
    parts: Mapping[str, tuple[str, ...]],
    modules: Mapping[str, nn.Module],
) -> Adapter:
    """An adapter of released layers on those that they have become."""
    converted, split = {}, {}
    for name, branch in branches.items():
        rows = [modules[part].out_features for part in parts[name]]
        key = f"{PEFT_KEY_PREFIX}{name}.lora_"
        for part, B in zip(parts[name], state[f"{key}B.weight"].split(rows), strict=True):
            converted[f"{PEFT_KEY_PREFIX}{part}.lora_A.weight"] = state[f"{key}A.weight"].clone()
            converted[f"{PEFT_KEY_PREFIX}{part}.lora_B.weight"] = B.clone()
            split[part] = branch
    return Adapter(converted, split)
