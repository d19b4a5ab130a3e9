"""The Arrow dataset between tokenising and training: columns `input_ids` and `labels`, lists of int32."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.errors import UsageError
from utils.prompts import IGNORE_INDEX, Example, fingerprint, template_for

import datasets
import pyarrow.compute
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

FEATURES = datasets.Features(
    {
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "labels": datasets.Sequence(datasets.Value("int32")),
    }
)


ORIGIN_FILE = "origin.json"


@dataclass(frozen=True)
class Origin:
    """What made a dataset's tokens; a file beside them."""

    template: str  # one of utils.prompts.TEMPLATES
    tokenizer: str  # utils.prompts.fingerprint
    model_name_or_path: str


def save_examples(examples: Iterable[Example], save_path: str, origin: Origin) -> int:
    """
    Streams examples into a dataset that `datasets.load_from_disk(save_path)` opens, and returns how many there are.

    An older dataset at `save_path` is replaced once the new one is complete.

    Raises:
        UsageError: there is no example, or something that is not a dataset stands at `save_path`.
    """
    target = Path(save_path)
    if target.exists() and not is_dataset(target):
        raise UsageError(f"--save_path {target} exists and is not a dataset: remove it or choose another path")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as directory:
        arrow_file = f"{directory}/rows.arrow"
        writer = ArrowWriter(path=arrow_file, features=FEATURES)
        for example in examples:
            writer.write({"input_ids": example.input_ids, "labels": example.labels})
        count, _ = writer.finalize()
        if count == 0:
            raise UsageError("no row is left to write: see the counts above, and mend the file or the length limit")
        complete = Path(directory) / "dataset"
        datasets.Dataset.from_file(arrow_file).save_to_disk(complete)
        (complete / ORIGIN_FILE).write_text(json.dumps(asdict(origin), ensure_ascii=False), encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        complete.rename(target)
    return count


def is_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() and (path / "state.json").is_file()


def load_examples(dataset_path: str) -> datasets.Dataset:
    """
    Opens a dataset written by `save_examples`.

    Raises:
        UsageError: nothing there, no dataset, other columns, no rows, or no trained token in the first row.
    """
    path = Path(dataset_path)
    make_one = "make it with: python tokenize_dataset_rows_belle.py --jsonl_path ROWS.jsonl --save_path " + str(path)
    if not path.exists():
        raise UsageError(f"--dataset_path {path} does not exist; {make_one}")
    if not path.is_dir() or not is_dataset(path):
        raise UsageError(f"--dataset_path {path} is not a tokenised dataset; {make_one}")
    dataset = datasets.load_from_disk(str(path))
    if not isinstance(dataset, datasets.Dataset) or not set(FEATURES) <= set(dataset.column_names):
        raise UsageError(f"--dataset_path {path} lacks the columns input_ids and labels; {make_one}")
    if len(dataset) == 0:
        raise UsageError(f"--dataset_path {path} has no rows; {make_one}")
    if all(label == IGNORE_INDEX for label in dataset[0]["labels"]):
        raise UsageError(f"--dataset_path {path}: the first row has no token to train on; {make_one}")
    return dataset.select_columns(list(FEATURES))


def row_lengths(dataset: datasets.Dataset) -> list[int]:
    """Tokens of each row, from the offsets of the column, without reading it."""
    column = dataset.with_format("arrow")[:]["input_ids"]
    return pyarrow.compute.list_value_length(column).to_pylist()


def fingerprint_rows(dataset: datasets.Dataset) -> str:
    """A hash of the length of every row and of the tokens of some, spread over the dataset."""
    found = hashlib.sha256(json.dumps(row_lengths(dataset)).encode())
    for index in range(0, len(dataset), max(1, len(dataset) // 64)):
        found.update(json.dumps(dataset[index]).encode())
    return found.hexdigest()[:16]


def check_origin(dataset_path: str, tokenizer: PreTrainedTokenizerBase, model_name_or_path: str) -> str:
    """
    The name of the template that the dataset was made with; "native" for a dataset that another tool made, of which
    nothing is known.

    Raises:
        UsageError: another tokenizer or another version of the template made it.
    """
    path = Path(dataset_path) / ORIGIN_FILE
    if not path.is_file():
        return "native"
    origin = Origin(**json.loads(path.read_text(encoding="utf-8")))
    if origin.tokenizer != fingerprint(tokenizer, template_for(tokenizer, origin.template)):
        raise UsageError(
            f"--dataset_path {dataset_path} was made with another tokenizer, that of {origin.model_name_or_path}: "
            f"tokenise the rows again with --model_name_or_path {model_name_or_path}"
        )
    return origin.template
