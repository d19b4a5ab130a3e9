"""
The format of the Arrow dataset that training reads: schema, record batches, side files, the move into place.

utils/data/shards.py, which writes the Arrow files, and tokenize_dataset_rows_belle.py call it. The format is that of
the datasets library, which is not used here because worker processes would pay for its import.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from utils.common.errors import UsageError
from utils.data.encode import TokenBatch

# `utils.data.arrow_reader.FEATURES`, as datasets 5.2 writes them.
_FEATURES = {
    name: {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"} for name in ("input_ids", "labels")
}
SCHEMA = pa.schema(
    {name: pa.list_(pa.int32()) for name in _FEATURES},
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)
DATASET_ORIGIN_FILE = "origin.json"


@dataclass(frozen=True)
class DatasetOrigin:
    """
    The template, tokenizer and options that a dataset's tokens come from.

    Format: origin.json beside the tokens has these field names as its keys.
    """

    template: str  # one of utils.models.templates.TEMPLATES
    tokenizer: str  # utils.data.encode.fingerprint
    model_name_or_path: str
    loss_on: str = "last"  # one of utils.data.encode.LOSS_ON
    system_turns: bool | None = None  # whether system messages are turns; None: written before they could be


def record_batch(batch: TokenBatch) -> pa.RecordBatch:
    """The examples as a record batch of `SCHEMA`."""
    offsets = np.concatenate([[0], np.cumsum(batch.lengths)]).astype(np.int32)
    columns = [pa.ListArray.from_arrays(offsets, values) for values in (batch.input_ids, batch.labels)]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def complete_dataset(directory: Path, arrow_files: Sequence[str], origin: DatasetOrigin, fingerprint: str) -> None:
    """
    Write the side files with which `datasets.load_from_disk` opens a directory of Arrow files of `SCHEMA`.

    Format: what `datasets.Dataset.save_to_disk` of datasets 5.2 writes.
    """
    state = {
        "_data_files": [{"filename": name} for name in arrow_files],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info = {"description": "", "citation": "", "homepage": "", "license": "", "features": _FEATURES}
    (directory / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    (directory / DATASET_ORIGIN_FILE).write_text(json.dumps(asdict(origin)), encoding="utf-8")
    (directory / "state.json").write_text(json.dumps(state), encoding="utf-8")


def replace_dataset(new: Path, target: Path) -> None:
    """
    Move a complete dataset to `target`, in place of an older one.

    A kill leaves the older or the new dataset at `target`, or nothing there and the new one at `new`, where the next
    run resumes; never half of either.
    """
    older = new.with_name(f"{new.name}.older")  # may be there since a killed run
    shutil.rmtree(older, ignore_errors=True)
    if target.exists():
        target.rename(older)
    new.rename(target)
    shutil.rmtree(older, ignore_errors=True)


def check_target(target: Path, inputs: Sequence[str] = ()) -> None:
    """
    Check that a dataset may be written to `target`.

    Raises:
        UsageError: `target` exists and is not a dataset, or is or holds one of `inputs`.
    """
    resolved = target.resolve()
    for path in map(Path, inputs):
        locations = (path.resolve(), path.absolute().parent.resolve())  # the latter for a link inside `target`
        if any(resolved == location or resolved in location.parents for location in locations):
            raise UsageError(f"--save_path {target} is or holds the input {path}, which would be lost: choose another")
    if os.path.lexists(target) and not is_dataset(target):
        raise UsageError(f"--save_path {target} exists and is not a dataset: choose another path")


def is_dataset(path: Path) -> bool:
    """Whether a directory has the side files of a dataset."""
    return (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
