"""`load_tokenizer` and `load_model`: a member of the ChatGLM family from a directory or a hub id."""

import json
import os
from pathlib import Path

from utils.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from utils.errors import UsageError

import torch
from huggingface_hub import constants, get_session, list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "THUDM/chatglm-6b"
SUPPORTED = "ChatGLM-6B (model_type chatglm, with inner_hidden_size in its config.json)"
TOKENIZER_FILES = ["config.json", "tokenizer_config.json", "ice_text.model"]
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


def load_config(directory: Path) -> ChatGLMConfig:
    """
    Raises:
        UsageError: no config.json, one that is not JSON, or a model that is not supported.
    """
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise UsageError(f"--model_name_or_path {directory} has no config.json: is it a checkpoint directory?")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{config_file} is not JSON: {error}") from None
    if config.get("model_type") != "chatglm" or "inner_hidden_size" not in config:
        raise UsageError(
            f"{directory} (model_type {config.get('model_type')}) is not supported; supported are: {SUPPORTED}"
        )
    if config.get("quantization_bit"):
        raise UsageError(f"{directory} is quantised, which is not supported; supported are: {SUPPORTED}, in full")
    return ChatGLMConfig.from_dict(config)


def load_tokenizer(path_or_id: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a checkpoint.

    Raises:
        UsageError: see `local_directory` and `load_config`; or there is no ice_text.model.
    """
    directory = local_directory(path_or_id, weights=False)
    load_config(directory)
    vocab_file = directory / ChatGLMTokenizer.vocab_files_names["vocab_file"]
    if not vocab_file.is_file():
        raise UsageError(f"--model_name_or_path {directory} has no {vocab_file.name}, the SentencePiece model")
    return ChatGLMTokenizer.from_pretrained(directory)


def load_model(path_or_id: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """
    The model of a checkpoint (`.bin`, read with weights_only, or safetensors; sharded or not), on the CPU and in eval
    mode, its weights in `dtype`. Under DeepSpeed ZeRO-3 each rank holds its partition.

    Raises:
        UsageError: see `local_directory` and `load_config`; or the checkpoint lacks a file or a weight, or has a
            weight too many or of another shape.
    """
    directory = local_directory(path_or_id)
    config = load_config(directory)
    try:
        model, info = ChatGLMForConditionalGeneration.from_pretrained(
            directory, config=config, dtype=dtype, output_loading_info=True
        )
    except OSError as error:
        raise UsageError(f"{directory}: {' '.join(str(error).split())}") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = sorted(str(key) for key in info[kind])
            raise UsageError(f"{directory}: {len(names)} {kind.replace('_', ' ')} in the weights, first {names[0]}")
    return model.eval()
