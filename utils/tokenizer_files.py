"""A model directory's configuration and tokenizer, without torch."""

import json
from pathlib import Path
from typing import Any

from utils.chatglm.generations import SUPPORTED, Generation, identify
from utils.errors import UsageError
from utils.hub import local_directory

from transformers import PreTrainedTokenizerBase

DEFAULT_MODEL = "THUDM/chatglm-6b"
# Keys of a config.json by which libraries find code or packages to run; none decides what a model of this family is.
CODE_KEYS = {
    "auto_map",
    "custom_pipelines",
    "trust_remote_code",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "quantization_config",
}
LARGEST = {  # sizes in a config.json, by the end of their name; the largest of the family is far below
    "layers": 1 << 10,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 22,
    "heads": 1 << 10,
    "head_dim": 1 << 12,
    "kv_channels": 1 << 12,
    "group_num": 1 << 10,
    "seq_length": 1 << 24,
    "sequence_length": 1 << 24,
    "position_embeddings": 1 << 24,
}


def open_directory(path_or_id: str, weights: bool) -> tuple[Path, Generation, dict[str, Any]]:
    """
    A checkpoint's directory on this machine, its generation, and its `config.json` as it stands there.

    Raises:
        UsageError: see `local_directory`; no config.json, one that is not JSON or has absurd sizes, or a model that is
            not supported.
    """
    directory = local_directory(path_or_id, weights)
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise UsageError(f"--model_name_or_path {directory} has no config.json: is it a checkpoint directory?")
    released = read_config(config_file)
    try:
        generation = identify(directory, released)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{directory / 'tokenizer_config.json'} is not JSON: {error}") from None
    if generation is None:
        model_type = released.get("model_type")
        raise UsageError(f"{directory} (model_type {model_type}) is not supported; supported are: {SUPPORTED}")
    return directory, generation, released


def read_config(file: Path) -> dict[str, Any]:
    """
    A `config.json` as data: without the keys that name code.

    Raises:
        UsageError: it is no JSON object, or a size in it is none.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{file} holds no JSON object")
    for name, value in values.items():
        largest = next((size for end, size in LARGEST.items() if name.endswith(end)), None)
        if largest is not None and value is not None and (type(value) is not int or not 1 <= value <= largest):
            raise UsageError(f"{file}: {name} is {value!r}, and must be a number from 1 to {largest}")
    return {name: value for name, value in values.items() if name not in CODE_KEYS}


def load_tokenizer(path_or_id: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a checkpoint.

    Raises:
        UsageError: see `open_directory`; or the vocabulary file is missing or spoiled.
    """
    directory, generation, _ = open_directory(path_or_id, weights=False)
    if not (directory / generation.vocab_file).is_file():
        raise UsageError(f"--model_name_or_path {directory} has no {generation.vocab_file}, its vocabulary")
    try:
        if generation.tokenizer_class is None:
            from transformers import AutoTokenizer  # imports torch

            return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        return generation.tokenizer_class.from_pretrained(directory)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"the tokenizer in {directory} cannot be read ({reason}): download it again") from None
