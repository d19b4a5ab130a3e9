"""The weight files of a checkpoint directory, read one weight at a time. They are data from outside, and may lie."""

import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UsageError

import torch
from safetensors import SafetensorError, safe_open

KINDS = ("model.safetensors", "pytorch_model.bin")


def weight_files(directory: Path) -> list[Path]:
    """
    The files that hold the weights, safetensors where there are both.

    Raises:
        UsageError: no weights, a file that the index names is missing or lies elsewhere, or the index is no index.
    """
    for kind in KINDS:
        index = directory / f"{kind}.index.json"
        if index.is_file():
            names = sorted(set(read_index(index).values()))
            missing = [name for name in names if not (directory / name).is_file()]
            if missing:
                raise UsageError(f"{directory} lacks {len(missing)} of its weight files, first {missing[0]}")
            return [directory / name for name in names]
        if (directory / kind).is_file():
            return [directory / kind]
    raise UsageError(f"{directory} has neither {' nor '.join(KINDS)} nor an index of such files")


def read_index(index: Path) -> dict[str, str]:
    """
    Weight -> the name of its file, which lies beside the index.

    Raises:
        UsageError: something else stands there.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{index} is not JSON: {error}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{index} has no weight_map: download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", "..", "."):
            raise UsageError(f"{index} names {name!r}, which is no file beside it: do not use this checkpoint")
    return weight_map


def read_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Every weight with its key, file by file, mapped rather than copied; pickles with weights_only.

    Raises:
        UsageError: see `weight_files`; or a file is cut, spoiled, or holds something else than names and tensors.
    """
    for file in weight_files(directory):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    yield from ((key, opened.get_tensor(key)) for key in opened.keys())  # noqa: SIM118
                continue
            mappable = zipfile.is_zipfile(file)  # not what torch wrote before 1.6
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=mappable)
        except SafetensorError as error:
            raise UsageError(f"{file} is cut or no safetensors file ({error}): download it again") from None
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(
                f"{file} is no plain file of tensors that can be read safely: download it again"
            ) from None
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise UsageError(f"{file} does not hold names and tensors alone")
        yield from state.items()


def find_unusable(tensor: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Says in words why a weight cannot be used in `dtype`; None where it can."""
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    low, high = (value.item() for value in torch.aminmax(tensor))
    if not abs(low) < float("inf") or not abs(high) < float("inf"):
        return "has values that are not finite"
    if dtype.is_floating_point and max(-low, high) > torch.finfo(dtype).max:
        return f"has values that are too large for {dtype}: take bfloat16 or float32"
    return None
