"""
A directory or hub id -> the checkpoint's directory on this machine, its generation and its config.json; without torch.

Tokenizers, models and the scripts' checks open a checkpoint through `open_directory`. Files come from anywhere: keys
that name code are dropped, sizes are bounded before anything is allocated, and Git LFS pointers are refused.
"""

import argparse
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import constants, get_session, list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from utils.common.console import print_line
from utils.common.errors import UsageError
from utils.common.json_files import read_json_object
from utils.models.checkpoint_files import TEMPLATE_FILE, CheckpointFiles
from utils.models.family import BY_FLAG, SUPPORTED, Generation, chosen_by_flag, identify, look_alikes_of

DEFAULT_MODEL = "THUDM/chatglm-6b"
GENERATION_FLAGS = tuple(BY_FLAG)
GENERATION_HELP = "the model's generation, needed if its files fit two"
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
# The end of a config.json key -> its largest value, far above any model of the family: a larger one would take all
# memory before the weights show that it is wrong.
MAX_CONFIG_VALUES = {
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
# What a tokenizer needs, and what tells the generations apart.
TOKENIZER_FILES = [
    "config.json",
    "tokenizer_config.json",
    "ice_text.model",
    "tokenizer.model",
    "tokenizer.json",
    "added_tokens.json",
    "special_tokens_map.json",
    TEMPLATE_FILE,
    "tokenization_chatglm.py",
    "modeling_chatglm.py",
]
HUB_TIMEOUT = 10  # seconds; the hub client's own retries take a minute
LFS_POINTER_START = b"version https://git-lfs.github.com/spec/"

_generation_flags: dict[str, str] = {}  # path or hub id -> its --generation; `choose_generation` writes it


class OpenedDirectory(NamedTuple):
    """A checkpoint directory on this machine."""

    directory: Path
    generation: Generation
    config: dict[str, Any]  # its config.json, without the keys that name code


def add_model_flags(group: argparse._ActionsContainer, what: str = "checkpoint directory or hub id") -> None:
    """Add `--model_name_or_path` and `--generation`; pass both values on to `choose_generation`."""
    group.add_argument("--model_name_or_path", default=DEFAULT_MODEL, help=f"{what} (default: %(default)s)")
    group.add_argument("--generation", choices=GENERATION_FLAGS, help=GENERATION_HELP)


def choose_generation(path_or_id: str, flag: str | None) -> None:
    """
    Set the generation of `path_or_id` for every later opening in this process.

    Args:
        flag: one of `GENERATION_FLAGS`; None leaves it to the files.
    """
    _generation_flags.pop(path_or_id, None)
    if flag is not None:
        _generation_flags[path_or_id] = flag


def open_directory(path_or_id: str, weights: bool) -> OpenedDirectory:
    """
    Find or download a checkpoint and identify its generation.

    Prints one line if the generation is a guess, because the files fit two of them.

    Args:
        weights: whether to download the weights, or only the tokenizer's files.

    Raises:
        UsageError: see `local_directory` and `read_config`; there is no config.json; the model is not supported; or
            the files are of another generation than `choose_generation` set.
    """
    directory = local_directory(path_or_id, weights)
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise UsageError(f"--model_name_or_path {directory} has no config.json: is it a checkpoint directory?")
    config = read_config(config_file)
    generation, guess = identify(CheckpointFiles(directory, config, read_tokenizer_config(directory)))
    if generation is None:
        model_type = config.get("model_type")
        raise UsageError(f"{directory} (model_type {model_type}) is not supported; supported are: {SUPPORTED}")
    flag = _generation_flags.get(path_or_id)
    if flag:
        chosen = chosen_by_flag(generation, flag)
        if chosen is None:
            raise UsageError(f"--generation {flag}: the files in {directory} are those of {generation.name}")
        generation = chosen
    elif guess:
        names = " or ".join(row.name for row in look_alikes_of(generation))
        flags = " or ".join(row.flag for row in look_alikes_of(generation))
        print_first_time(
            f"{directory}: its files do not say whether it is {names}; it is taken for {generation.name} ({guess}): "
            f"--generation {flags} decides"
        )
    if config.get("pre_seq_len"):
        print_first_time(
            f"{directory}: its config.json has pre_seq_len {config['pre_seq_len']}, a prefix of P-tuning: "
            "the model is used without one"
        )
    return OpenedDirectory(directory, generation, config)


@functools.cache
def print_first_time(message: str) -> None:
    """Print a line on rank 0, once: several callers open one checkpoint."""
    print_line(message)


def read_config(file: Path) -> dict[str, Any]:
    """
    A `config.json` as data, without the keys that name code.

    Raises:
        UsageError: a Git LFS pointer, not a JSON object, or a size out of range.
    """
    refuse_pointer(file)
    values = read_json_object(file)
    for name, value in values.items():
        largest = next((size for end, size in MAX_CONFIG_VALUES.items() if name.endswith(end)), None)
        if largest is not None and value is not None and (type(value) is not int or not 1 <= value <= largest):
            raise UsageError(f"{file}: {name} is {value!r}, and must be a number from 1 to {largest}")
    return {name: value for name, value in values.items() if name not in CODE_KEYS}


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """
    The `tokenizer_config.json` of a checkpoint; empty if there is none.

    Raises:
        UsageError: a Git LFS pointer, or not a JSON object.
    """
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        return {}
    refuse_pointer(file)
    return read_json_object(file)


def local_directory(path_or_id: str, weights: bool = True) -> Path:
    """
    The given directory, or the cached files of a hub repository, downloaded if needed.

    Args:
        weights: whether to download the weights, or only the tokenizer's files.

    Raises:
        UsageError: no such directory, and the hub cannot serve it; or its name is not UTF-8.
    """
    check_name("--model_name_or_path", path_or_id)
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


def check_name(flag: str, path: str | Path) -> None:
    """
    Check a path that weights or vocabularies are read from or written to.

    Raises:
        UsageError: the name is not UTF-8, which the libraries that read and write those files need.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{flag} {path}: the name is not UTF-8, which weights are kept under: rename it") from None


def _hub_answers() -> bool:
    """Whether the hub answers within HUB_TIMEOUT."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # whatever its transport raises (httpx or httpx2, by version) means the same here
        return False
    return True


def refuse_pointer(file: Path) -> None:
    """
    Check that `file` is the file itself.

    Raises:
        UsageError: it is the pointer that Git LFS leaves if the real file was not downloaded.
    """
    with file.open("rb") as opened:
        if opened.read(len(LFS_POINTER_START)) == LFS_POINTER_START:
            raise UsageError(f"{file} is a Git LFS pointer, not the file: run `git lfs pull`, or download it again")
