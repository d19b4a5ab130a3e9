"""The weight files of a checkpoint directory, read one weight at a time."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UsageError

import torch
from safetensors import safe_open

KINDS = ("model.safetensors", "pytorch_model.bin")


def weight_files(directory: Path) -> list[Path]:
    """
    The files that hold the weights, safetensors where there are both.

    Raises:
        UsageError: no weights, or a file that the index names is missing.
    """
    for kind in KINDS:
        index = directory / f"{kind}.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [name for name in names if not (directory / name).is_file()]
            if missing:
                raise UsageError(f"{directory} lacks {len(missing)} of its weight files, first {missing[0]}")
            return [directory / name for name in names]
        if (directory / kind).is_file():
            return [directory / kind]
    raise UsageError(f"{directory} has neither {' nor '.join(KINDS)} nor an index of such files")


def read_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight with its key, file by file, mapped rather than copied; pickles with weights_only."""
    for file in weight_files(directory):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                keys = opened.keys()
                yield from ((key, opened.get_tensor(key)) for key in keys)
        else:
            mappable = zipfile.is_zipfile(file)  # not what torch wrote before 1.6
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=mappable).items()
