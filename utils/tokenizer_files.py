"""A model directory's configuration and tokenizer, without torch."""

import argparse
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.chatglm.generations import BY_FLAG, CHATGLM2, CHATGLM3, SUPPORTED, Generation, identify
from utils.errors import UsageError
from utils.hub import local_directory, refuse_pointer
from utils.json_files import read_object

from transformers import PreTrainedTokenizerBase

DEFAULT_MODEL = "THUDM/chatglm-6b"
GENERATION_FLAGS = tuple(BY_FLAG)
GENERATION_HELP = "what the model is, where its files leave that open"
SIDE_FILES = ("added_tokens.json", "special_tokens_map.json")  # transformers reads them beside tokenizer_config.json
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
    generation, assumed = identify(directory, released, read_tokenizer_config(directory))
    if generation is None:
        model_type = released.get("model_type")
        raise UsageError(f"{directory} (model_type {model_type}) is not supported; supported are: {SUPPORTED}")
    flag = _chosen.get(path_or_id)
    if flag and not generation.name.startswith(BY_FLAG[flag].name):  # GLM-4-9B-hf is glm4 too
        if {BY_FLAG[flag], generation} != {CHATGLM2, CHATGLM3}:
            raise UsageError(f"--generation {flag}: the files in {directory} are those of {generation.name}")
        generation = BY_FLAG[flag]
    elif assumed and not flag:
        say_once(
            f"{directory}: its files do not say whether it is ChatGLM2-6B or ChatGLM3-6B; it is taken for "
            f"{generation.name} ({assumed}): --generation chatglm2 or chatglm3 decides"
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
    values = read_object(file)
    for name, value in values.items():
        largest = next((size for end, size in LARGEST.items() if name.endswith(end)), None)
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
    return read_object(file)


def load_tokenizer(path_or_id: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a checkpoint.

    Raises:
        UsageError: see `open_directory`; or the vocabulary file is missing or spoiled, or `config.json` gives special
            tokens other ids, or fewer rows than there are tokens.
    """
    directory, generation, config = open_directory(path_or_id, weights=False)
    vocab_file = directory / generation.vocab_file
    if not vocab_file.is_file():
        raise UsageError(f"--model_name_or_path {directory} has no {generation.vocab_file}, its vocabulary")
    for name in (generation.vocab_file, *SIDE_FILES):
        if (directory / name).is_file():
            refuse_pointer(directory / name)
    for name in SIDE_FILES:
        if (directory / name).is_file():
            read_object(directory / name)
    try:
        if generation.tokenizer_class is None:
            from transformers import AutoTokenizer  # imports torch

            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
            if lacks_merges(read_object(vocab_file)):
                say_once(
                    f"{vocab_file} was exported by an older version of this toolkit, lacks merges, and gives other "
                    "token ids than the release: tokenise the rows again, train the adapter anew and merge that"
                )
        else:
            options = generation.tokenizer_class.options_of(config, vocab_file)
            stated = read_tokenizer_config(directory)
            options = {name: value for name, value in options.items() if name not in stated}
            tokenizer = generation.tokenizer_class.from_pretrained(directory, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"the tokenizer in {directory} cannot be read ({reason}): download it again") from None
    vocabulary = tokenizer.get_vocab() if generation.needed_tokens else ()
    if missing := [token for token in generation.needed_tokens if token not in vocabulary]:
        raise UsageError(
            f"{directory}: its tokenizer has no {', '.join(missing)}, so its chats have another form than those of "
            f"{generation.name}; supported are: {SUPPORTED}"
        )
    if fault := find_disagreement(tokenizer, config):
        raise UsageError(f"{directory}: {fault}: its files are of two checkpoints or revisions; download it again")
    return tokenizer


def lacks_merges(tokenizer_json: Mapping[str, Any]) -> bool:
    """Whether some tokens of a byte-level BPE are made by no merge, as in older exports of GLM-4."""
    model = tokenizer_json.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        return False
    return len(model.get("merges") or ()) < len(model.get("vocab") or ()) - 256


def find_disagreement(tokenizer: PreTrainedTokenizerBase, config: Mapping[str, Any]) -> str | None:
    """Says in words what a checkpoint's `config.json` and its tokenizer disagree on; None where they agree."""
    rows = config.get("padded_vocab_size") or config.get("vocab_size")
    highest = max(len(tokenizer) - 1, *tokenizer.added_tokens_decoder, 0)
    if rows is not None and highest >= rows:
        return f"the tokenizer has ids up to {highest}, and config.json speaks of {rows} rows of the embedding"
    vocabulary = tokenizer.get_vocab()
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "gmask_token_id": vocabulary.get("[gMASK]"),
        "mask_token_id": vocabulary.get("[MASK]"),
    }
    for name, index in ids.items():
        said = config.get(name)
        if said is None or index is None or index == said or (isinstance(said, list) and index in said):
            continue
        return f"{name} is {said} in config.json, and {index} in the tokenizer"
    return None
