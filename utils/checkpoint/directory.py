"""A checkpoint's files on this machine, downloaded from the hub if need be, and its configuration; without torch."""

import argparse
import functools
import os
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session, list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from utils.common.errors import UsageError
from utils.common.json_files import read_json_object
from utils.models.family import BY_FLAG, LOOK_ALIKES, SUPPORTED, CheckpointFiles, Generation, chosen_by_flag, identify

DEFAULT_MODEL = "THUDM/chatglm-6b"
GENERATION_FLAGS = tuple(BY_FLAG)
GENERATION_HELP = "what the model is, where its files leave that open"
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
MAX_CONFIG_SIZES = {  # sizes in a config.json, by the end of their name; the largest of the family is far below
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
_chosen: dict[str, str] = {}  # path or hub id -> what --generation says of it


def add_model_flags(group: argparse._ActionsContainer, what: str = "checkpoint directory or hub id") -> None:
    """Adds `--model_name_or_path` and `--generation`, of which `choose_generation` is to be told."""
    group.add_argument("--model_name_or_path", default=DEFAULT_MODEL, help=f"{what} (%(default)s)")
    group.add_argument("--generation", choices=GENERATION_FLAGS, help=GENERATION_HELP)


def choose_generation(path_or_id: str, flag: str | None) -> None:
    """
    Lets `--generation` decide what `path_or_id` is, for every later opening in this process.

    Args:
        flag: one of `GENERATION_FLAGS`; None leaves it to the files.
    """
    _chosen.pop(path_or_id, None)
    if flag is not None:
        _chosen[path_or_id] = flag


def open_directory(path_or_id: str, weights: bool) -> tuple[Path, Generation, dict[str, Any]]:
    """
    A checkpoint's directory on this machine, its generation, and its `config.json` as it stands there. Where the files
    leave the generation open, one line says what was assumed.

    Raises:
        UsageError: see `local_directory`; no config.json, one that is not JSON or has absurd sizes, a model that is
            not supported, or files of another generation than `choose_generation` was told.
    """
    directory = local_directory(path_or_id, weights)
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise UsageError(f"--model_name_or_path {directory} has no config.json: is it a checkpoint directory?")
    released = read_config(config_file)
    generation, assumed = identify(CheckpointFiles(directory, released, read_tokenizer_config(directory)))
    if generation is None:
        model_type = released.get("model_type")
        raise UsageError(f"{directory} (model_type {model_type}) is not supported; supported are: {SUPPORTED}")
    flag = _chosen.get(path_or_id)
    if flag:
        chosen = chosen_by_flag(generation, flag)
        if chosen is None:
            raise UsageError(f"--generation {flag}: the files in {directory} are those of {generation.name}")
        generation = chosen
    elif assumed:
        names, flags = (" or ".join(getattr(row, key) for row in LOOK_ALIKES) for key in ("name", "flag"))
        say_once(
            f"{directory}: its files do not say whether it is {names}; it is taken for "
            f"{generation.name} ({assumed}): --generation {flags} decides"
        )
    if released.get("pre_seq_len"):
        say_once(
            f"{directory}: its config.json has pre_seq_len {released['pre_seq_len']}, a prefix of P-tuning: "
            "the model is used without one"
        )
    return directory, generation, released


@functools.cache
def say_once(message: str) -> None:
    """Prints a line on rank 0, the first time."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def read_config(file: Path) -> dict[str, Any]:
    """
    A `config.json` as data: without the keys that name code.

    Raises:
        UsageError: it is no JSON object, or a size in it is none.
    """
    refuse_pointer(file)
    values = read_json_object(file)
    for name, value in values.items():
        largest = next((size for end, size in MAX_CONFIG_SIZES.items() if name.endswith(end)), None)
        if largest is not None and value is not None and (type(value) is not int or not 1 <= value <= largest):
            raise UsageError(f"{file}: {name} is {value!r}, and must be a number from 1 to {largest}")
    return {name: value for name, value in values.items() if name not in CODE_KEYS}


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """
    The `tokenizer_config.json` of a checkpoint; empty where there is none.

    Raises:
        UsageError: it is no JSON object.
    """
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        return {}
    refuse_pointer(file)
    return read_json_object(file)


TOKENIZER_FILES = [
    "config.json",
    "tokenizer_config.json",
    "ice_text.model",
    "tokenizer.model",
    "tokenizer.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenization_chatglm.py",
    "modeling_chatglm.py",
]
HUB_TIMEOUT = 10  # seconds
POINTER = b"version https://git-lfs.github.com/spec/"  # how each file begins that Git LFS leaves in place of another


def local_directory(path_or_id: str, weights: bool = True) -> Path:
    """
    A checkpoint's directory on this machine: the given one, or the hub repository's files in the cache, downloaded
    if need be (with `weights` false, those of the tokenizer alone).

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
    Raises:
        UsageError: the name is not UTF-8, which the libraries that read and write weights and vocabularies ask for.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{flag} {path}: the name is not UTF-8, which weights are kept under: rename it") from None


def _hub_answers() -> bool:
    """One short question in place of the hub client's minute of retries."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # whatever its transport raises (httpx or httpx2, by version) means the same here
        return False
    return True


def refuse_pointer(file: Path) -> None:
    """
    Raises:
        UsageError: `file` is what Git LFS leaves where the real file was not downloaded.
    """
    with file.open("rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            raise UsageError(f"{file} is a Git LFS pointer, not the file: run `git lfs pull`, or download it again")
