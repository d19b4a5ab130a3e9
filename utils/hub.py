"""A checkpoint's files on this machine, downloaded from the hub if need be."""

import os
from pathlib import Path

from utils.errors import UsageError

from huggingface_hub import constants, get_session, list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

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
