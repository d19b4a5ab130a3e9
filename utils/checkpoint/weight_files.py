"""
Weight files of a checkpoint or an adapter -> tensors, one at a time, mapped from their file.

`utils/checkpoint/model.py` and `utils/lora/formats.py` read weights here. The files come from anywhere, and may lie:
anything but a plain tensor with all its elements in the file is refused before it takes memory or runs code.
torch.load with weights_only allows more: tensors without storage, and bytearrays of any size.
"""

import pickle
import pickletools
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from utils.checkpoint.directory import refuse_pointer
from utils.common.errors import UsageError
from utils.common.json_files import read_json_object

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8)
# All that a pickle of plain tensors calls.
ALLOWED_CALLS = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor_v2"),
}
MAX_NAME_LENGTH = 1000  # characters of a weight's name
# Bytes of weights after which a file is mapped anew: the pages of a mapping are the process's until it is dropped.
MAX_MAPPED = 64 << 20
MAX_SHARING = 4  # weights that may share a storage: tied ones, or the A of query, key and value
# Besides the weights, they decide how a model computes and what its tokens are.
MODEL_FILES = (
    *("config.json", "generation_config.json", "template.json", "*.model", "tokenizer*", "vocab*", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*"),
)


def weight_files(directory: Path) -> list[Path]:
    """
    The files that hold the weights: safetensors, else pickles, as transformers chooses.

    Raises:
        UsageError: there are no weights; a file that the index names is missing or lies elsewhere; the index is not
            one; or a file is a Git LFS pointer.
    """
    for name in WEIGHT_FILES:
        index = directory / f"{name}.index.json"
        names = [name]
        if not (directory / name).is_file():
            if not index.is_file():
                continue
            refuse_pointer(index)
            names = sorted(set(read_index(index).values()))
            missing = [name for name in names if not (directory / name).is_file()]
            if missing:
                raise UsageError(f"{directory} lacks {len(missing)} of its weight files, first {missing[0]}")
        files = [directory / name for name in names]
        for file in files:
            refuse_pointer(file)
        return files
    raise UsageError(f"{directory} has neither {' nor '.join(WEIGHT_FILES)} nor an index of such files")


def model_files(directory: Path) -> list[Path]:
    """The files of MODEL_FILES in a directory, sorted."""
    return sorted({file for pattern in MODEL_FILES for file in directory.glob(pattern) if file.is_file()})


def read_index(index: Path) -> dict[str, str]:
    """
    An index of sharded weights: weight -> name of its file beside the index.

    Raises:
        UsageError: not an index, or it names a file elsewhere.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{index} has no weight_map: download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", "..", "."):
            raise UsageError(f"{index} names {name!r}, which is not a file beside it: do not use this checkpoint")
    return weight_map


def read_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Every weight with its key, file by file.

    Raises:
        UsageError: see `weight_files` and `read_tensors`; or two files hold the same weight.
    """
    files: dict[str, str] = {}
    for file in weight_files(directory):
        for key, tensor in read_tensors(file):
            if key in files:
                raise UsageError(f"{directory}: {key} is in {files[key]} and in {file.name}: remove one")
            files[key] = file.name
            yield key, tensor


def read_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Every tensor of a file with its name, mapped rather than copied.

    Pickles are read with weights_only. Each tensor is dense, on the CPU, of one of DTYPES, and takes no more memory
    than the file does. A tensor that the caller drops takes none; only a pickle of torch before 1.6 cannot be mapped.

    Raises:
        UsageError: the file is a Git LFS pointer, is truncated or damaged, or holds something else.
    """
    refuse_pointer(file)
    tensors = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    for key, tensor in tensors:
        if len(key) > MAX_NAME_LENGTH or not key.isprintable():
            raise UsageError(
                f"{file} has a weight of the name {key[:40]!r}... ({len(key):,} characters): do not use it"
            )
        if tensor.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise UsageError(f"{file}: {key} is {str(tensor.dtype).removeprefix('torch.')}; a weight is {names}")
        yield key, tensor.detach()


def _read_safetensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
        yield from _read_by_mappings(keys, lambda: safe_open(file, framework="pt").get_tensor)
    except (SafetensorError, AttributeError, TypeError) as error:  # the latter: dtypes that this torch does not know
        raise UsageError(f"{file} is truncated or not a safetensors file ({error}): download it again") from None


def _read_by_mappings(
    keys: list[str], map_file: Callable[[], Callable[[str], torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Every tensor with its key, about MAX_MAPPED bytes of each mapping.

    Args:
        map_file: maps the file; returns what gives a tensor by its key.
    """
    tensor_of, mapped = map_file(), 0
    for key in keys:
        if mapped >= MAX_MAPPED:
            tensor_of, mapped = map_file(), 0
        tensor = tensor_of(key)
        mapped += tensor.numel() * tensor.element_size()
        yield key, tensor
        del tensor  # the caller may have dropped it


def _read_pickle(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    mappable = zipfile.is_zipfile(file)  # not what torch wrote before 1.6
    try:
        _check_calls(file, mappable)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mappable)
    except (
        *(pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError, TypeError),
        *(AttributeError, IndexError, MemoryError, OverflowError),
    ):
        raise UsageError(f"{file} is not a plain file of tensors that can be read safely: download it again") from None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise UsageError(f"{file} must hold only names and tensors")
    _check_sizes(file, state)
    keys = list(state)
    if mappable:
        del state
        yield from _read_by_mappings(
            keys, lambda: torch.load(file, map_location="cpu", weights_only=True, mmap=True).__getitem__
        )
    else:
        yield from ((key, state.pop(key)) for key in keys)


def _check_sizes(file: Path, state: dict[str, torch.Tensor]) -> None:
    """
    Check that no tensor of a pickle has more elements than its storage.

    Raises:
        UsageError: one has.
    """
    taken: Counter[int] = Counter()
    for key, tensor in state.items():
        storage = tensor.untyped_storage()
        size = tensor.numel() * tensor.element_size()
        taken[storage.data_ptr()] += size
        if size > storage.nbytes() or taken[storage.data_ptr()] > MAX_SHARING * storage.nbytes():
            raise UsageError(f"{file}: {key} of shape {tuple(tensor.shape)} is larger than its data in the file")


def _check_calls(file: Path, zipped: bool) -> None:
    """
    Check a pickle without running it.

    Raises:
        ValueError: it calls something that plain tensors do not need, or is compressed, and would grow when read.
    """
    if zipped:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise ValueError("torch compresses nothing")
            streams, pickles = [archive.open(member) for member in members if member.filename.endswith("data.pkl")], 1
    else:
        streams, pickles = [file.open("rb")], 4  # a magic number, a version, the machine, and the tensors
    for stream in streams:
        with stream:
            for _ in range(pickles):
                for opcode, argument, _ in pickletools.genops(stream):
                    if opcode.name in ("GLOBAL", "INST") and tuple(argument.split(" ")) not in ALLOWED_CALLS:
                        module, _, name = argument.partition(" ")
                        if module not in ("torch", "torch.storage") or not name.endswith("Storage"):
                            raise ValueError(f"{argument} is called")


def find_unusable(tensor: torch.Tensor, dtype: torch.dtype) -> str | None:
    """An error message if a weight cannot be used in `dtype`, else None."""
    if tensor.is_floating_point() != dtype.is_floating_point:
        return f"is {str(tensor.dtype).removeprefix('torch.')}: is config.json that of these weights?"
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    low, high = (value.item() for value in torch.aminmax(tensor))
    if not abs(low) < float("inf") or not abs(high) < float("inf"):
        return "has values that are not finite"
    if dtype.is_floating_point and max(-low, high) > torch.finfo(dtype).max:
        return f"has values that are too large for {dtype}: take bfloat16 or float32"
    return None
