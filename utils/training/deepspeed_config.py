"""
A DeepSpeed configuration file, checked before DeepSpeed reads it: DeepSpeed ignores keys that it does not know, and
some that it knows import modules, start commands, or write to places that the file names.
"""

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.common.errors import Faults, UsageError
from utils.common.json_files import read_json_object

SECTIONS = ("zero_optimization", "fp16", "bf16", "amp", "activation_checkpointing", "aio", "flops_profiler")
# What a file may say at its top: keys of which this training makes use and that reach nothing outside it.
OBJECTS = {
    *("fp16", "bf16", "optimizer", "scheduler", "activation_checkpointing", "aio", "data_types", "comms_logger"),
    *("flops_profiler", "timers", "zero_optimization"),
}
SERVED = OBJECTS | {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "communication_data_type", "disable_allgather"),
    *("prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state"),
}
INSTEAD = {  # what to do in place of other keys of DeepSpeed
    **dict.fromkeys(("torch_autocast", "amp"), "give --bf16 or --fp16"),
    **dict.fromkeys(("tensorboard", "wandb", "comet", "csv_monitor"), "give --report_to"),
    **dict.fromkeys(("compression_training", "quantize_training", "weight_quantization"), "give --quantize"),
    "autotuning": "see --plan",
}
OPTIMIZERS = ("adagrad", "adam", "adamw", "lamb", "lion", "muon")  # of DeepSpeed, without further packages
SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """
    Raises:
        UsageError: no such file, no JSON object, a key that is one letter or two off a known one, or that is not
            `SERVED`, or a value that DeepSpeed does not take; each fault with its line and column.
    """
    try:
        config = read_json_object(Path(path))
    except UsageError as error:
        raise UsageError(f"--deepspeed {error}") from None
    text = Path(path).read_text(encoding="utf-8-sig")
    faults, misspelt = Faults(), set()
    for section, keys in (("", config), *((name, config.get(name)) for name in ("fp16", "bf16"))):
        for key in keys if isinstance(keys, dict) else ():
            if key not in known_keys() and (near := difflib.get_close_matches(key, known_keys(), 1, 0.8)):
                inside = f" in {section}" if section else ""
                faults.add(f"--deepspeed {path} {place_of(key, text)}: {key}{inside} is not read; is it {near[0]}?")
                misspelt.add(key)
    for key, message in (*unserved(config, misspelt), *zero_faults(config.get("zero_optimization", {}))):
        faults.add(f"--deepspeed {path} {place_of(key, text)}: {message}")
    faults.report()
    if message := other_fault(config):
        raise UsageError(f"--deepspeed {path}: {message}")
    return config


def unserved(config: dict[str, Any], passed_over: set[str]) -> Iterator[tuple[str, str]]:
    """(key, what to do) of all that would let DeepSpeed import, start or write something, or change the model."""
    for key, value in config.items():
        is_off = isinstance(value, dict) and value.get("enabled") is False
        if key not in SERVED | passed_over and not is_off and not key.startswith("_"):
            yield key, f"{key} cannot be used here: {INSTEAD.get(key, 'leave it out')}"
        elif key in OBJECTS and not isinstance(value, dict):
            yield key, f"{key} must be an object"
    for key, known in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)):
        if isinstance(section := config.get(key), dict):
            named = section.get("type")
            if named not in known and not (key == "optimizer" and str(named).lower() in known):
                yield key, f"{key} {named} cannot be used here: give {', '.join(known)}, or leave it out"
    profiler = config.get("flops_profiler")
    if isinstance(profiler, dict) and profiler.get("output_file"):
        yield "output_file", "output_file in flops_profiler cannot be used here: leave it out, and it prints"
    zero = config.get("zero_optimization")
    for name in ("offload_param", "offload_optimizer"):
        section = zero.get(name) if isinstance(zero, dict) else None
        if isinstance(section, dict) and section.get("device") == "nvme":
            yield name, f"{name} to nvme cannot be used here: give the device cpu"


def other_fault(config: dict[str, Any]) -> str | None:
    """What DeepSpeed itself finds wrong; "auto" and the batch's sizes are for transformers to fill in."""
    from deepspeed.runtime.config import DeepSpeedConfig

    def settled(value: Any) -> Any:
        return {k: settled(v) for k, v in value.items() if v != "auto"} if isinstance(value, dict) else value

    sizes = {"train_batch_size": None, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    try:
        DeepSpeedConfig({name: value for name, value in (settled(config) | sizes).items() if value is not None})
    except Exception as error:  # asserts, pydantic's errors and whatever a value of another type leads to
        return " ".join(str(error).split()) or f"{type(error).__name__}: a value is of another type"
    return None


def known_keys() -> list[str]:
    """Names that DeepSpeed reads, at the top or in a section; more of them than there are keys."""
    from deepspeed.runtime import constants  # imports torch's extensions

    values = (value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str))
    return [*SECTIONS, *(value for value in values if re.fullmatch("[a-z0-9_]+", value))]


def zero_faults(section: Any) -> list[tuple[str, str]]:
    """(key, what is wrong with it) of a `zero_optimization` section; "auto" is for transformers to fill in."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    if not isinstance(section, dict):  # which `unserved` has said
        return []
    try:
        DeepSpeedZeroConfig(**{key: value for key, value in section.items() if value != "auto"})
    except ValidationError as error:
        places = [(".".join(map(str, fault["loc"])), fault) for fault in error.errors()]
        return [(key, f"{key} in zero_optimization: {_reword(fault)}") for key, fault in places]
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
