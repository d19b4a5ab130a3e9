"""
LoRA adapters as files, from wherever they come: PEFT directories of this toolkit, PEFT directories made on the
released remote-code models, and the bare `chatglm-lora.pt` of the first ChatGLM training scripts.
"""

import json
import pickle
import re
from pathlib import Path

from utils.chatglm.released_glm import split_sizes, target_keys
from utils.errors import UsageError

import torch
from peft import LoraConfig, TaskType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import GlmForCausalLM, PretrainedConfig, PreTrainedModel

RAW_NAME = "chatglm-lora.pt"
RAW_ALPHA = 32  # what the scripts that wrote such files trained with
PREFIX = "base_model.model."
LORA_KEY = re.compile(r"(?:module\.)*(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight")

State = dict[str, torch.Tensor]


def adapter_directory(path: str | Path) -> Path:
    """Where an adapter's configuration and origin lie: beside it where `path` is one of its files."""
    path = Path(path)
    return path if path.is_dir() else path.parent


def read_adapter(path: str | Path, model: PreTrainedModel, lora_alpha: int | None) -> tuple[LoraConfig, State]:
    """
    An adapter's configuration and weights for `model`, under the names that PEFT gives them there.

    The weights of an adapter made on the remote code of ChatGLM2-6B, ChatGLM3-6B or GLM-4-9B become those of
    `GlmForCausalLM`: the query, key and value share A, and each gets its rows of B. A file without a configuration
    has the rank of its shapes.

    Args:
        path: a PEFT directory, a `chatglm-lora.pt`, or a directory that holds one.
        lora_alpha: for a file without a configuration; None is RAW_ALPHA.

    Raises:
        UsageError: nothing there that can be read, or something else than LoRA weights in it.
    """
    path = Path(path)
    if (path / CONFIG_NAME).is_file():
        if lora_alpha is not None:
            raise UsageError(f"--lora_alpha {lora_alpha}: {path} records its own; the flag is for a bare {RAW_NAME}")
        config, state = _read_config(path), _canonical(_read_peft_weights(path), path)
        _check_rank(config, state, path)
        if isinstance(model, GlmForCausalLM) and any("encoder.layers." in key for key in state):
            state = _to_glm(state, model.config)
            _retarget(config, state, path)
        return config, state
    file = path / RAW_NAME if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"--adapter_path {path} has neither {CONFIG_NAME} nor {RAW_NAME}: is it an adapter?")
    state = _canonical(_unpickle(file), file)
    if isinstance(model, GlmForCausalLM):
        state = _to_glm(state, model.config)
    return _config_of(state, RAW_ALPHA if lora_alpha is None else lora_alpha, file), state


def _read_config(directory: Path) -> LoraConfig:
    try:
        values = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{directory / CONFIG_NAME} is not JSON: {error}") from None
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        found = values.get("peft_type") if isinstance(values, dict) else "nameless"
        raise UsageError(f"--adapter_path {directory} is a {found} adapter; only LORA is supported")
    if values.get("megatron_config"):  # PEFT imports the module that `megatron_core` names
        raise UsageError(f"{directory / CONFIG_NAME} has a megatron_config, which names code to import: remove it")
    try:
        return LoraConfig.from_pretrained(directory)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UsageError(f"{directory / CONFIG_NAME} cannot be used: {' '.join(str(error).split())}") from None


def _check_rank(config: LoraConfig, state: State, source: Path) -> None:
    """PEFT takes memory by the configuration: it must not be more than the weights fill."""
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    largest = max((value.shape[0] for key, value in state.items() if ".lora_A." in key), default=0)
    if not all(type(rank) is int and 1 <= rank <= largest for rank in ranks):
        raise UsageError(f"--adapter_path {source} has the rank {max(ranks, key=str)}, and its weights have {largest}")


def _read_peft_weights(directory: Path) -> State:
    if (directory / SAFETENSORS_WEIGHTS_NAME).is_file():
        try:
            return load_file(directory / SAFETENSORS_WEIGHTS_NAME)
        except SafetensorError as error:
            raise UsageError(f"{directory / SAFETENSORS_WEIGHTS_NAME} is no safetensors file: {error}") from None
    if (directory / WEIGHTS_NAME).is_file():
        return _unpickle(directory / WEIGHTS_NAME)
    raise UsageError(f"--adapter_path {directory} has neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}")


def _unpickle(file: Path) -> State:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        raise UsageError(f"{file} is no plain file of tensors that can be read safely") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UsageError(f"{file} does not hold names and tensors alone")
    return state


def _canonical(state: State, source: Path) -> State:
    """`...lora_A.default.weight` and `...lora_A.weight`, with and without wrappers' prefixes, in PEFT's saved form."""
    canonical = {}
    for key, value in state.items():
        match = LORA_KEY.fullmatch(key)
        if not match:
            raise UsageError(f"{source}: {key} is no LoRA weight, and an adapter of this toolkit holds nothing else")
        canonical[f"{PREFIX}{match[1]}.lora_{match[2]}.weight"] = value
    return canonical


def _module(key: str) -> str:
    return key.removeprefix(PREFIX).rpartition(".lora_")[0]


def _to_glm(state: State, config: PretrainedConfig) -> State:
    converted = {}
    for key, value in state.items():
        try:
            targets = [target.removesuffix(".weight") for target in target_keys(f"{_module(key)}.weight")]
        except KeyError:
            converted[key] = value  # a name of GlmForCausalLM, or one that will be found to match nothing
            continue
        kind = key.rpartition(".lora_")[2]
        splits = len(targets) > 1 and kind.startswith("B")
        rows = split_sizes(config)
        if splits and value.shape[0] != sum(rows):
            raise UsageError(f"{key} has {value.shape[0]} rows, and the model's query, key and value have {sum(rows)}")
        parts = value.split(rows) if splits else [value] * len(targets)
        converted |= {f"{PREFIX}{t}.lora_{kind}": part.clone() for t, part in zip(targets, parts, strict=True)}
    return converted


def _retarget(config: LoraConfig, state: State, source: Path) -> None:
    """Names the same layers as `GlmForCausalLM` does."""
    if config.rank_pattern or config.alpha_pattern:
        raise UsageError(
            f"--adapter_path {source} has a rank_pattern or alpha_pattern, whose names cannot be converted"
        )
    config.target_modules = {_module(key).rpartition(".")[2] for key in state}


def _config_of(state: State, lora_alpha: int, source: Path) -> LoraConfig:
    ranks = {value.shape[0] for key, value in state.items() if ".lora_A." in key}
    if len(ranks) != 1:
        raise UsageError(f"{source} holds {len(ranks)} ranks of LoRA weights, {sorted(ranks)}, and must hold one")
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=ranks.pop(),
        lora_alpha=lora_alpha,
        target_modules=sorted({_module(key) for key in state}),
    )
