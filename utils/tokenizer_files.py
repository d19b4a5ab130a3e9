"""A model directory's configuration and tokenizer, without torch."""

import json
from pathlib import Path
from typing import Any

from utils.chatglm.generations import SUPPORTED, Generation, identify
from utils.errors import UsageError
from utils.hub import local_directory

from transformers import PreTrainedTokenizerBase

DEFAULT_MODEL = "THUDM/chatglm-6b"


def open_directory(path_or_id: str, weights: bool) -> tuple[Path, Generation, dict[str, Any]]:
    """
    A checkpoint's directory on this machine, its generation, and its `config.json` as it stands there.

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
    return directory, generation, released


def load_tokenizer(path_or_id: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a checkpoint.

    Raises:
        UsageError: see `open_directory`; or the vocabulary file is missing.
    """
    directory, generation, _ = open_directory(path_or_id, weights=False)
    if not (directory / generation.vocab_file).is_file():
        raise UsageError(f"--model_name_or_path {directory} has no {generation.vocab_file}, its vocabulary")
    if generation.tokenizer_class is None:
        from transformers import AutoTokenizer  # imports torch

        return AutoTokenizer.from_pretrained(directory)
    return generation.tokenizer_class.from_pretrained(directory)
