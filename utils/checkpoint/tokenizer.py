"""`load_tokenizer`: the tokenizer of a directory or hub id, checked against its config.json; without torch."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from utils.checkpoint.directory import (
    OpenedDirectory,
    open_directory,
    print_first_time,
    read_tokenizer_config,
    refuse_pointer,
)
from utils.common.errors import UsageError
from utils.common.json_files import read_json_object
from utils.models.checkpoint_files import TEMPLATE_FILE
from utils.models.family import SUPPORTED, Generation, record_generation

SIDE_FILES = ("added_tokens.json", "special_tokens_map.json")  # transformers reads them beside tokenizer_config.json
BYTE_TOKENS = 256  # of a byte-level BPE: the only ones that no merge makes


def load_tokenizer(path_or_id: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a checkpoint.

    Raises:
        UsageError: see `open_directory` and `tokenizer_in`.
    """
    return tokenizer_in(open_directory(path_or_id, weights=False))


def tokenizer_in(opened: OpenedDirectory) -> PreTrainedTokenizerBase:
    """
    The tokenizer of an opened checkpoint directory.

    Raises:
        UsageError: the vocabulary file is missing or damaged; the tokenizer lacks tokens of its generation's chats; or
            `config.json` gives special tokens other ids, or fewer rows than there are tokens.
    """
    directory, generation, config = opened
    vocab_file = directory / generation.vocab_file
    if not vocab_file.is_file():
        raise UsageError(f"--model_name_or_path {directory} has no {generation.vocab_file}, its vocabulary")
    for name in (generation.vocab_file, TEMPLATE_FILE, *SIDE_FILES):
        if (directory / name).is_file():
            refuse_pointer(directory / name)
    for name in SIDE_FILES:
        if (directory / name).is_file():
            read_json_object(directory / name)
    try:
        tokenizer = _read_tokenizer(opened)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"the tokenizer in {directory} cannot be read ({reason}): download it again") from None
    missing = find_missing_tokens(tokenizer, generation)
    if missing:
        raise UsageError(
            f"{directory}: its tokenizer has no {', '.join(missing)}, so its chats have another form than those of "
            f"{generation.name}; supported are: {SUPPORTED}"
        )
    fault = find_disagreement(tokenizer, config)
    if fault:
        raise UsageError(f"{directory}: {fault}: its files are of two checkpoints or revisions; download it again")
    return tokenizer


def _read_tokenizer(opened: OpenedDirectory) -> PreTrainedTokenizerBase:
    directory, generation, config = opened
    vocab_file = directory / generation.vocab_file
    if generation.tokenizer_class is None:
        from transformers import AutoTokenizer  # imports torch

        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        record_generation(tokenizer, generation)
        if lacks_merges(read_json_object(vocab_file)):
            print_first_time(
                f"{vocab_file} was exported by an older version of this toolkit, lacks merges, and gives other "
                "token ids than the release: tokenise the rows again, train the adapter anew and merge that"
            )
        return tokenizer
    options = generation.tokenizer_class.options_of(config, vocab_file)
    stated = read_tokenizer_config(directory)
    options = {name: value for name, value in options.items() if name not in stated}
    return generation.tokenizer_class.from_pretrained(directory, **options)


def lacks_merges(tokenizer_json: Mapping[str, Any]) -> bool:
    """Whether a byte-level BPE has tokens that no merge makes (old exports of GLM-4-9B)."""
    model = tokenizer_json.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        return False
    return len(model.get("merges") or ()) < len(model.get("vocab") or ()) - BYTE_TOKENS


def find_missing_tokens(tokenizer: PreTrainedTokenizerBase, generation: Generation) -> list[str]:
    """The tokens of the generation's chats that the tokenizer lacks."""
    if not generation.required_tokens:
        return []
    vocabulary = tokenizer.get_vocab()
    return [token for token in generation.required_tokens if token not in vocabulary]


def find_disagreement(tokenizer: PreTrainedTokenizerBase, config: Mapping[str, Any]) -> str | None:
    """An error message if `config.json` and the tokenizer disagree, else None."""
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
        stated = config.get(name)
        if stated is None or index is None or index == stated or (isinstance(stated, list) and index in stated):
            continue
        return f"{name} is {stated} in config.json, and {index} in the tokenizer"
    return None
