"""A DeepSpeed configuration file, checked before DeepSpeed reads it: DeepSpeed ignores keys that it does not know."""

import difflib
import json
import re
from pathlib import Path
from typing import Any

from utils.errors import Faults, UsageError

SECTIONS = ("zero_optimization", "fp16", "bf16", "amp", "activation_checkpointing", "aio", "flops_profiler")


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """
    Raises:
        UsageError: no such file, no JSON object, a key that is one letter or two off a known one, or a value in
            `zero_optimization` of another type; each fault with its line and column.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--deepspeed {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--deepspeed {path} is not JSON: it is no text in UTF-8") from None
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise UsageError(f"--deepspeed {path} is not JSON: {error.msg} at {place}") from None
    if not isinstance(config, dict):
        raise UsageError(f"--deepspeed {path} must hold a JSON object, not {type(config).__name__}")
    faults = Faults()
    for section, keys in (("", config), *((name, config.get(name)) for name in ("fp16", "bf16"))):
        for key in keys if isinstance(keys, dict) else ():
            if key not in known_keys() and (near := difflib.get_close_matches(key, known_keys(), 1, 0.8)):
                inside = f" in {section}" if section else ""
                faults.add(f"--deepspeed {path} {place_of(key, text)}: {key}{inside} is not read; is it {near[0]}?")
    for key, message in zero_faults(config.get("zero_optimization", {})):
        faults.add(f"--deepspeed {path} {place_of(key, text)}: {key} in zero_optimization: {message}")
    faults.report()
    return config


def known_keys() -> list[str]:
    """Names that DeepSpeed reads, at the top or in a section; more of them than there are keys."""
    from deepspeed.runtime import constants  # imports torch's extensions

    values = (value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str))
    return [*SECTIONS, *(value for value in values if re.fullmatch("[a-z0-9_]+", value))]


def zero_faults(section: Any) -> list[tuple[str, str]]:
    """(key, what is wrong with it) of a `zero_optimization` section; "auto" is for transformers to fill in."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    if not isinstance(section, dict):
        return [("zero_optimization", "must be an object")]
    try:
        DeepSpeedZeroConfig(**{key: value for key, value in section.items() if value != "auto"})
    except ValidationError as error:
        return [(".".join(map(str, fault["loc"])), _reword(fault)) for fault in error.errors()]
    return []


def _reword(fault: dict[str, Any]) -> str:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if fault["type"] != "extra_forbidden":
        return f"{fault['msg']}, not {fault['input']!r}"
    near = difflib.get_close_matches(str(fault["loc"][-1]), DeepSpeedZeroConfig.model_fields, 1)
    return "no such key" + (f"; is it {near[0]}?" if near else "")


def place_of(key: str, text: str) -> str:
    """
    >>> place_of("b", '{\\n  "b": 1}')
    'line 2 column 3'
    """
    at = text.find(json.dumps(key.split(".")[-1]))
    if at < 0:
        return ""
    return f"line {text.count(chr(10), 0, at) + 1} column {at - text.rfind(chr(10), 0, at)}"
