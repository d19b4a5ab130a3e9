"""The Arrow dataset between tokenising and training: columns `input_ids` and `labels`, lists of int32."""

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from utils.errors import UsageError
from utils.prompts import IGNORE_INDEX, Example

import datasets
from datasets.arrow_writer import ArrowWriter

FEATURES = datasets.Features(
    {
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "labels": datasets.Sequence(datasets.Value("int32")),
    }
)


def save_examples(examples: Iterable[Example], save_path: str) -> int:
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
