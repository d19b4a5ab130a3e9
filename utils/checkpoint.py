"""`load_tokenizer` and `load_model`: a member of the ChatGLM family from a directory or a hub id."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.chatglm.generations import SUPPORTED, Generation, identify, model_config
from utils.chatglm.released_glm import convert
from utils.errors import UsageError
from utils.weight_files import read_weights

import torch
from huggingface_hub import constants, get_session, list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import GlmForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "THUDM/chatglm-6b"
TOKENIZER_FILES = [
    "config.json",
    "tokenizer_config.json",
    "ice_text.model",
    "tokenizer.model",
    "tokenizer.json",
    "tokenization_chatglm.py",
]
HUB_TIMEOUT = 10  # seconds


def local_directory(path_or_id: str, weights: bool = True) -> Path:
    """
    A checkpoint's directory on this machine: the given one, or the hub repository's files in the cache, downloaded
    if need be (with `weights` false, those of the tokenizer alone).

    Raises:
        UsageError: no such directory, and the hub cannot serve it.
    """
    if os.path.isdir(path_or_id):
        return Path(path_or_id)
    pass_another = "pass --model_name_or_path with a checkpoint directory"
    if os.path.isabs(path_or_id) or path_or_id.startswith((".", "~")) or path_or_id.count("/") != 1:
        raise UsageError(f"--model_name_or_path {path_or_id} is not a directory: {pass_another}")
    offline = not _hub_answers()
    patterns = list(TOKENIZER_FILES)
    try:
        if weights:
            safetensors = not offline and any(name.endswith(".safetensors") for name in list_repo_files(path_or_id))
            patterns += ["*.json", "*.safetensors"] if safetensors else ["*.json", "*.safetensors", "*.bin"]
        directory = snapshot_download(path_or_id, allow_patterns=patterns, local_files_only=offline)
    except (OSError, HfHubHTTPError, ValueError) as error:
        reason = "the hub cannot be reached" if offline else f"the hub refused it ({type(error).__name__})"
        raise UsageError(f"{path_or_id} is not on this machine and {reason}: {pass_another}") from None
    return Path(directory)


def _hub_answers() -> bool:
    """One short question in place of the hub client's minute of retries."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # whatever its transport raises (httpx or httpx2, by version) means the same here
        return False
    return True


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose generation is known."""

    directory: Path
    generation: Generation
    config: PretrainedConfig

    @classmethod
    def open(cls, path_or_id: str, weights: bool = True) -> "Checkpoint":
        """
        Raises:
            UsageError: see `local_directory`; no config.json, one that is not JSON, or a model that is not supported.
        """
        directory = local_directory(path_or_id, weights)
        config_file = directory / "config.json"
        if not config_file.is_file():
            raise UsageError(f"--model_name_or_path {directory} has no config.json: is it a checkpoint directory?")
        try:
            released = json.loads(config_file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UsageError(f"{config_file} is not JSON: {error}") from None
        generation = identify(directory, released)
        if generation is None:
            model_type = released.get("model_type")
            raise UsageError(f"{directory} (model_type {model_type}) is not supported; supported are: {SUPPORTED}")
        if released.get("quantization_bit"):
            raise UsageError(f"{directory} is quantised, which is not supported; supported are: {SUPPORTED}, in full")
        try:
            config = model_config(generation, released)
        except (KeyError, ValueError) as error:
            raise UsageError(f"{config_file} is no {generation.name}: {error}") from None
        return cls(directory, generation, config)

    @property
    def converts(self) -> bool:
        """Whether its weights have other names than those of the model class."""
        return self.generation.model_class is GlmForCausalLM and self.generation.released_layout

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """
        Every weight under the name that the model class gives it, mapped from its file.

        Raises:
            UsageError: a weight that the generation does not have, or of a shape that cannot be split.
        """
        for key, tensor in read_weights(self.directory):
            if not self.converts:
                yield key, tensor
                continue
            try:
                yield from convert(key, tensor, self.config).items()
            except KeyError:
                raise UsageError(f"{self.directory}: {key} is no weight of {self.generation.name}") from None
            except RuntimeError:
                raise UsageError(f"{self.directory}: {key} cannot have the shape {tuple(tensor.shape)}") from None


def load_tokenizer(path_or_id: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a checkpoint.

    Raises:
        UsageError: see `Checkpoint.open`; or the vocabulary file is missing.
    """
    checkpoint = Checkpoint.open(path_or_id, weights=False)
    generation, directory = checkpoint.generation, checkpoint.directory
    if not (directory / generation.vocab_file).is_file():
        raise UsageError(f"--model_name_or_path {directory} has no {generation.vocab_file}, its vocabulary")
    return generation.tokenizer_class.from_pretrained(directory)


def load_model(path_or_id: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """
    The model of a checkpoint (`.bin`, read with weights_only, or safetensors; sharded or not), on the CPU and in eval
    mode, its weights in `dtype`. Under DeepSpeed ZeRO-3 each rank holds its partition.

    ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B become `GlmForCausalLM`.

    Raises:
        UsageError: see `Checkpoint.open`; or the checkpoint lacks a file or a weight, or has a weight too many or of
            another shape.
    """
    checkpoint = Checkpoint.open(path_or_id)
    directory, generation = checkpoint.directory, checkpoint.generation
    source: dict[str, Any] = {"pretrained_model_name_or_path": directory}
    if checkpoint.converts:
        source = {"pretrained_model_name_or_path": None, "state_dict": dict(checkpoint.weights())}
    try:
        model, info = generation.model_class.from_pretrained(
            **source,
            config=checkpoint.config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, with the others
        )
    except OSError as error:
        raise UsageError(f"{directory}: {' '.join(str(error).split())}") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = sorted(str(key) for key in info[kind])
            raise UsageError(f"{directory}: {len(names)} {kind.replace('_', ' ')} in the weights, first {names[0]}")
    model.config._name_or_path = model.name_or_path = str(directory)
    return model.eval()
