"""Writing the Arrow dataset between tokenising and training, without the datasets library, which is slow to import."""

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
    """What made a dataset's tokens; a file beside them."""

    template: str  # one of utils.models.templates.TEMPLATES
    tokenizer: str  # utils.data.encode.fingerprint
    model_name_or_path: str
    loss_on: str = "last"  # one of utils.data.encode.LOSS_ON
    system_turns: bool | None = None  # whether system messages are turns of their own; None: made before that was so


def record_batch(batch: TokenBatch) -> pa.RecordBatch:
    """Rows as Arrow columns of `SCHEMA`."""
    offsets = np.concatenate([[0], np.cumsum(batch.lengths)]).astype(np.int32)
    columns = [pa.ListArray.from_arrays(offsets, values) for values in (batch.input_ids, batch.labels)]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def complete_dataset(directory: Path, arrow_files: Sequence[str], origin: DatasetOrigin, fingerprint: str) -> None:
    """
    Makes a directory with Arrow files of `SCHEMA` one that `datasets.load_from_disk` opens.

    Format: what `datasets.Dataset.save_to_disk` of datasets 5.2 writes beside the Arrow files.
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
    Moves a complete dataset to where an older one may stand. A kill leaves the older one or the new one there, or
    nothing, and then the new one in `new`, from which the next run goes on; never a part of either.
    """
    older = new.with_name(f"{new.name}.older")  # also what a killed run left of one
    shutil.rmtree(older, ignore_errors=True)
    if target.exists():
        target.rename(older)
    new.rename(target)
    shutil.rmtree(older, ignore_errors=True)


def check_target(target: Path, inputs: Sequence[str] = ()) -> None:
    """
    Raises:
        UsageError: something that is not a dataset stands where one is to be written, or it is or holds an input.
    """
    place = target.resolve()
    for path in map(Path, inputs):
        found = (path.resolve(), path.absolute().parent.resolve())  # the latter of a link in `target` to elsewhere
        if any(place == each or place in each.parents for each in found):
            raise UsageError(f"--save_path {target} is or holds the input {path}, which would be lost: choose another")
    if os.path.lexists(target) and not is_dataset(target):
        raise UsageError(f"--save_path {target} exists and is not a dataset: remove it or choose another path")


def is_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
