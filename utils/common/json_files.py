"""
Reads the JSON object of a side file: a dataset's origin, a state, a manifest, a configuration.

Such a file may come from anywhere, so its size is bounded here, its depth by `json`, and every fault is one line.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.common.errors import UsageError

# The manifest of a dataset of 100,000 files is smaller; the largest tokenizer.json has 35 MB.
MAX_BYTES = 256 << 20


def read_json_object(file: Path, types: Mapping[str, type | tuple[type, ...]] | None = None) -> dict[str, Any]:
    """
    Read the JSON object in `file` (UTF-8, with or without a byte order mark).

    Args:
        types: keys that the object must have, and the types of their values.

    Raises:
        UsageError: `file` is absent, not a plain file, too large, not UTF-8, not JSON, nested too deeply, not an
            object, or lacks a key of `types`. The message names the file and the fault.
    """
    if not file.is_file():
        raise UsageError(f"{file} is not a file" if file.exists() else f"{file} does not exist")
    if file.stat().st_size > MAX_BYTES:
        raise UsageError(f"{file} has {file.stat().st_size:,} bytes, more than the {MAX_BYTES:,} that are read")
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UsageError(f"{file} is not UTF-8 text") from None
    except RecursionError:
        raise UsageError(f"{file} is nested too deeply") from None
    except ValueError as error:
        raise UsageError(f"{file} is not JSON: {error}") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{file} holds {type(values).__name__}, not a JSON object")
    for name, expected in (types or {}).items():
        if name not in values:
            raise UsageError(f"{file} has no {name!r}")
        if not isinstance(values[name], expected):
            raise UsageError(f"{file}: {name!r} is {type(values[name]).__name__}, not {_type_names(expected)}")
    return values


def _type_names(types: type | tuple[type, ...]) -> str:
    alternatives = types if isinstance(types, tuple) else (types,)
    return " or ".join(alternative.__name__ for alternative in alternatives)
