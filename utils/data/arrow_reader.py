"""
Opens the Arrow datasets that training reads: columns `input_ids` and `labels`, lists of int32.

utils/training/preflight.py opens, checks and splits datasets here; resuming compares them by `fingerprint_rows`. Files
are opened by utils/data/arrow_table.py, not by `datasets.load_from_disk`, which believes a damaged file.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
from transformers import PreTrainedTokenizerBase

from utils.common.console import print_line
from utils.common.errors import UsageError
from utils.common.json_files import read_json_object
from utils.data.arrow_table import read_table
from utils.data.arrow_writer import DATASET_ORIGIN_FILE, DatasetOrigin, is_dataset
from utils.data.dataset_columns import KNOWN_COLUMNS, LOSS_MASKS, Vocabulary, to_examples
from utils.data.encode import fingerprint
from utils.models.conversation import Message
from utils.models.templates import TEMPLATES, encode_prompt, template_for
from utils.models.token_spans import IGNORE_INDEX

FEATURES = datasets.Features(
    {
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "labels": datasets.Sequence(datasets.Value("int32")),
    }
)
COUNT_ROWS = 100_000  # rows whose labels are counted together: some 20 M tokens of most datasets
HASH_ROWS = 1024  # rows hashed together: 200,000 tokens of most datasets stay in the CPU's cache


def load_examples(dataset_path: str, vocabulary: Vocabulary | None = None) -> datasets.Dataset:
    """
    Open a dataset that tokenize_dataset_rows_belle.py or another tool wrote.

    Prints which columns are ignored and how many tokens the attention mask removes; see `to_examples`.

    Args:
        vocabulary: the model's; None if it is unknown.

    Raises:
        UsageError: no dataset, damaged files, other columns, no rows, or rows that cannot be trained on.
    """
    path = Path(dataset_path)
    table, others = open_table(path)
    try:
        examples = to_examples(table, vocabulary)
    except UsageError as error:
        raise UsageError(f"--dataset_path {path}: {error}") from None
    if "labels" in table.column_names and "seq_len" in table.column_names:
        others.append("seq_len")
    if others:
        print_line(f"--dataset_path {path}: columns that are not read: {', '.join(map(repr, others))}")
    if "attention_mask" in table.column_names:
        before, after = (_count_tokens(rows["input_ids"]) for rows in (table, examples))
        print_line(f"--dataset_path {path}: attention_mask leaves {before - after:,} of {before:,} tokens out")
    return datasets.Dataset(examples, fingerprint=datasets.fingerprint.generate_random_fingerprint())


def _count_tokens(column: pa.ChunkedArray) -> int:
    return pyarrow.compute.sum(pyarrow.compute.list_value_length(column)).as_py()


def open_table(path: Path) -> tuple[pa.Table, list[str]]:
    """
    Open the known columns of a dataset's Arrow files.

    Returns:
        The table, and the names of the other columns.

    Raises:
        UsageError: see `load_examples`.
    """
    make_one = "make it with: python tokenize_dataset_rows_belle.py --jsonl_path ROWS.jsonl --save_path " + str(path)
    if path.is_file():
        tokens = path.with_suffix(".tokens")
        raise UsageError(
            f"--dataset_path {path} is a file, and a dataset is a directory: tokenise its rows with "
            f"python tokenize_dataset_rows_belle.py --jsonl_path {path} --save_path {tokens} and give {tokens}; if "
            "they are tokens already, save them with datasets' load_dataset(...).save_to_disk(DIRECTORY)"
        )
    if not is_dataset(path):
        raise UsageError(f"--dataset_path {path} {_describe_other(path)} {make_one}")
    try:
        files = _list_files(path)
        table, others = read_table(files, KNOWN_COLUMNS) if files else (None, [])
    except UsageError as error:
        raise UsageError(f"--dataset_path {path}: {error}; {make_one}") from None
    if not table:
        raise UsageError(f"--dataset_path {path} has no rows; {make_one}")
    columns = set(table.column_names)
    if "input_ids" not in columns or not columns & {"labels", "seq_len", *LOSS_MASKS}:
        raise UsageError(f"--dataset_path {path} lacks the columns input_ids and labels; {make_one}")
    return table, others


def _list_files(path: Path) -> list[Path]:
    """
    The Arrow files of a dataset.

    Raises:
        UsageError: state.json is damaged, or names a file in another directory.
    """
    entries = read_json_object(path / "state.json", {"_data_files": list})["_data_files"]
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UsageError(f"state.json names a file in another directory, {name}")
    return [path / name for name in names]


def _describe_other(path: Path) -> str:
    """What is at `path` in place of a dataset, for a message."""
    if not path.exists():
        return "does not exist;"
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if is_dataset(entry))
        return f"holds the datasets {', '.join(splits)}: give one of them, {path / (splits or ['train'])[0]}, or"
    kinds = {file.suffix.lstrip(".") for file in path.iterdir() if file.is_file()}
    for kind in ("parquet", "arrow", "json", "jsonl", "csv"):
        if kind in kinds:
            load = f"load_dataset({kind.replace('jsonl', 'json')!r}, data_files=FILES, split='train')"
            return (
                f"is not a tokenised dataset but holds a {kind} file: if its rows are tokens, save them with "
                f"datasets' {load}.save_to_disk(DIRECTORY), else"
            )
    return "is not a tokenised dataset;"


def trained_rows(dataset: datasets.Dataset) -> np.ndarray:
    """Indices of the rows with a token that is trained on: (n,) int64."""
    return np.flatnonzero(trained_tokens(dataset))


def trained_tokens(dataset: datasets.Dataset) -> np.ndarray:
    """Trained tokens of each row, but its first, which nothing predicts: (rows,) int64."""
    counts = []
    for batch in dataset.with_format("arrow").iter(COUNT_ROWS):
        for labels in batch["labels"].chunks:
            values, offsets = labels.values.to_numpy(zero_copy_only=False), labels.offsets.to_numpy()
            before = np.concatenate([[0], np.cumsum(values != IGNORE_INDEX)])  # trained tokens before each position
            first = np.minimum(offsets[:-1] + 1, offsets[1:])
            counts.append(before[offsets[1:]] - before[first])
    return np.concatenate(counts)


def hold_out(dataset: datasets.Dataset, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """
    Indices of the rows to train on and of those held out.

    About `fraction` of all are held out. A hash of the prompt's tokens decides: rows of one prompt stay together, and
    stay where they are when data grows.
    """
    held_out = []
    for batch in dataset.with_format("arrow").iter(COUNT_ROWS):
        for input_ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            ids, targets = (column.values.to_numpy() for column in (input_ids, labels))
            trained = np.flatnonzero(targets != IGNORE_INDEX)
            prompt = ids[: trained[0]] if len(trained) else ids
            digest = hashlib.blake2b(np.ascontiguousarray(prompt, np.int64).tobytes(), digest_size=8).digest()
            held_out.append(int.from_bytes(digest, "big") < fraction * 2**64)
    mask = np.array(held_out)
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def row_lengths(dataset: datasets.Dataset) -> list[int]:
    """Tokens of each row, from the offsets alone."""
    column = dataset.with_format("arrow")[:]["input_ids"]
    return pyarrow.compute.list_value_length(column).to_pylist()


def fingerprint_rows(dataset: datasets.Dataset) -> dict[str, Any]:
    """
    Hash every row's content, so that `describe_row_change` can tell what changed.

    Returns:
        `version`; `rows`, their number; hashes of all rows' `inputs` (input_ids), `targets` (labels) and `prompts`
        (the tokens without loss); `any_order`, equal for the same rows in another order; and `v1`, the fingerprint in
        checkpoints of earlier versions of this toolkit. Integer types and chunks of the columns make no difference.
    """
    digests = [_row_digests(*row_arrays) for row_arrays in _iterate_arrays(dataset)]
    inputs, targets, prompts = map(np.concatenate, zip(*digests, strict=True))
    return {
        "version": 2,
        "rows": len(dataset),
        "inputs": _hash(inputs),
        "targets": _hash(targets),
        "prompts": _hash(prompts),
        "any_order": _hash(np.sort(inputs + 3 * targets)),
        "v1": old_fingerprint_rows(dataset),
    }


def _iterate_arrays(dataset: datasets.Dataset) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """
    Yield `input_ids` and `labels` of HASH_ROWS rows, and their offsets.

    Shapes: (tokens,), (tokens,) and (rows + 1,).
    """
    for batch in dataset.with_format("arrow").iter(HASH_ROWS):
        columns = [batch[name].combine_chunks() for name in FEATURES]
        offsets = columns[0].offsets.to_numpy()
        input_ids, labels = (column.flatten().to_numpy() for column in columns)
        yield input_ids, labels, offsets - offsets[0]


def _row_digests(input_ids: np.ndarray, labels: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, ...]:
    """
    Digests of each row's tokens, labels and tokens without loss, each (rows,) int64.

    A digest is the sum of value x key modulo 2^64, with a random odd key for each position in a row: one pass of
    numpy. Source: Lemire and Kaser 2014, "Strongly universal string hashing is fast", multilinear hashing.
    """
    lengths = np.diff(offsets)
    keys = np.random.Generator(np.random.PCG64(0)).integers(-(2**63), 2**63, lengths.max(initial=0)) | 1
    keys = keys[np.arange(len(input_ids)) - np.repeat(offsets[:-1], lengths)]
    before = np.zeros(len(input_ids) + 1, np.int64)

    def sum_rows(values: np.ndarray) -> np.ndarray:
        np.cumsum(values, out=before[1:])
        return before[offsets[1:]] - before[offsets[:-1]]

    tokens = keys * (input_ids + np.int64(1))  # 0 is a token
    return sum_rows(tokens), sum_rows(keys * (labels + np.int64(1))), sum_rows(tokens * (labels == IGNORE_INDEX))


def _hash(digests: np.ndarray) -> str:
    return hashlib.blake2b(digests.astype("<i8").tobytes(), digest_size=8).hexdigest()


def old_fingerprint_rows(dataset: datasets.Dataset) -> str:
    """The fingerprint of earlier versions: of every row's length and of some rows."""
    digest = hashlib.sha256(json.dumps(row_lengths(dataset)).encode())
    for index in range(0, len(dataset), max(1, len(dataset) // 64)):
        digest.update(json.dumps(dataset[index]).encode())
    return digest.hexdigest()[:16]


def describe_row_change(then: Any, now: dict[str, Any]) -> str | None:
    """
    Describe the rows of an earlier run, or None if unchanged.

    Args:
        then: the `fingerprint_rows` in a checkpoint, or the `old_fingerprint_rows` in one of an earlier version.
        now: `fingerprint_rows` of the dataset.
    """
    if isinstance(then, str):
        return None if then == now["v1"] else "other rows"
    if not isinstance(then, dict) or then.get("version") != now["version"]:
        return "rows that this version of the toolkit cannot compare"
    same = {name for name, value in now.items() if then.get(name) == value}
    if {"rows", "inputs", "targets"} <= same:
        return None
    if "rows" not in same:
        return f"{then.get('rows')} rows (now {now['rows']})"
    if "any_order" in same:
        return "the same rows in another order"
    if "inputs" in same:
        return "the same rows with loss on other tokens"
    if "prompts" in same:
        return "the same prompts and other targets"
    return "other rows"


def check_origin(dataset_path: str, tokenizer: PreTrainedTokenizerBase, model_name_or_path: str) -> str:
    """
    Check that a dataset's tokens are those of this tokenizer.

    Returns:
        Name of the dataset's template; "native" for a dataset of another tool, whose first row alone can be checked.

    Raises:
        UsageError: another tokenizer or another version of the template made it.
    """
    path = Path(dataset_path) / DATASET_ORIGIN_FILE
    again = f"tokenise the rows again with --model_name_or_path {model_name_or_path}"
    if not path.is_file():
        table, _ = open_table(Path(dataset_path))
        is_pairs = "seq_len" in table.column_names and "labels" not in table.column_names
        if is_pairs and not _is_pair_of(tokenizer, to_examples(table.slice(0, 1), None).to_pylist()[0]):
            raise UsageError(
                f"--dataset_path {dataset_path}: its rows do not have the special tokens that the tokenizer of "
                f"{model_name_or_path} puts around a prompt and a target: {again}"
            )
        return "native"
    try:
        values = read_json_object(path, dict.fromkeys(("template", "tokenizer", "model_name_or_path"), str))
        if values["template"] not in TEMPLATES:
            raise UsageError(f"{path}: there is no template {values['template']!r}")
    except UsageError as error:
        raise UsageError(f"--dataset_path {dataset_path}: {error}: {again}") from None
    origin = DatasetOrigin(
        **{name: value for name, value in values.items() if name in DatasetOrigin.__dataclass_fields__}
    )
    if origin.tokenizer != fingerprint(tokenizer, template_for(tokenizer, origin.template)):
        raise UsageError(
            f"--dataset_path {dataset_path} was made with another tokenizer, that of {origin.model_name_or_path}, or "
            f"by an older version of this toolkit: {again}"
        )
    if origin.system_turns is None and template_for(tokenizer, origin.template).has_system_role:
        print_line(f"{dataset_path} has system messages, if any, inside the first question and not as turns: {again}")
    return origin.template


def _is_pair_of(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> bool:
    """Whether a row of `input_ids` and `labels` looks like ChatGLM-6B's `prompt [gMASK] <sop> target <eop>`."""
    closing = encode_prompt(tokenizer, [Message("user", "")])[-2:]
    ids, prompt_tokens = row["input_ids"], row["labels"].count(IGNORE_INDEX)
    return ids[max(prompt_tokens - 2, 0) : prompt_tokens] == closing and ids[-1:] == [tokenizer.eos_token_id]


def split_off(dataset: datasets.Dataset, fraction: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """
    Split a dataset into rows to train on and rows held out.

    Raises:
        UsageError: one of the two is empty.
    """
    trained, held_out = hold_out(dataset, fraction)
    if not len(trained) or not len(held_out):
        problem = "no row to train on remains" if not len(trained) else "no row is held out"
        raise UsageError(f"--eval_fraction {fraction}: {problem} of {len(dataset)}; give another share")
    return dataset.select(trained), dataset.select(held_out)


def keep_trained(dataset: datasets.Dataset, dataset_path: str) -> datasets.Dataset:
    """
    Remove the rows that have no token to train on, and print how many.

    Raises:
        UsageError: no row has one.
    """
    trained = trained_rows(dataset)
    if not len(trained):
        raise UsageError(
            f"--dataset_path {dataset_path}: no row has a token to train on; tokenise the rows again, with "
            f"targets and a --max_seq_length that leaves room for them"
        )
    if len(trained) == len(dataset):
        return dataset
    first = np.setdiff1d(np.arange(len(dataset)), trained)[0]
    print_line(f"{len(dataset) - len(trained)} rows have no token to train on and are left out, first row {first}")
    return dataset.select(trained)
