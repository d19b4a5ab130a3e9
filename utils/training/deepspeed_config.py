"""
Checks a DeepSpeed configuration file before DeepSpeed reads it.

In: the path that --deepspeed gives. Out: the JSON object, or a UsageError with every fault and its line and column.
Values, and keys inside sections, are checked by DeepSpeed's own pydantic models. The keys at the top are checked here:
DeepSpeed ignores those that it does not know, and some that it knows import modules, start commands, or write to
places that the file names.
"""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.common.errors import Faults, UsageError
from utils.common.json_files import read_json_object

# Top-level keys that this training uses and that reach nothing outside it; the first set are objects.
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
INSTEAD = {  # other keys of DeepSpeed, and what to do in their place
    **dict.fromkeys(("torch_autocast", "amp"), "give --bf16 or --fp16"),
    **dict.fromkeys(("tensorboard", "wandb", "comet", "csv_monitor"), "give --report_to"),
    **dict.fromkeys(("compression_training", "quantize_training", "weight_quantization"), "give --quantize"),
    "autotuning": "see --plan",
}
OPTIMIZERS = ("adagrad", "adam", "adamw", "lamb", "lion", "muon")  # DeepSpeed's, without further packages
SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """
    Return the configuration in a file.

    Raises:
        UsageError: no such file, no JSON object, a key that is unknown or not `SERVED`, or a value that DeepSpeed does
            not accept; each fault with its line and column.
    """
    try:
        config = read_json_object(Path(path))
    except UsageError as error:
        raise UsageError(f"--deepspeed {error}") from None
    text = Path(path).read_text(encoding="utf-8-sig")
    faults = Faults()
    for key, message in (*top_level_faults(config), *value_faults(config), *section_faults(config)):
        faults.add(f"--deepspeed {path} {place_of(key, text)}: {message}")
    faults.report()
    if message := deepspeed_fault(config):
        raise UsageError(f"--deepspeed {path}: {message}")
    return config


def top_level_faults(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """
    Yield (key, message) for keys that are misspelt or not served.

    Objects that are something else are among them.
    """
    known = SERVED | INSTEAD.keys()
    for key, value in config.items():
        if key.startswith("_"):  # a comment
            continue
        is_off = isinstance(value, dict) and value.get("enabled") is False
        similar = [] if key in known else difflib.get_close_matches(key, sorted(known), 1, 0.8)
        if similar:
            yield key, f"{key} is not read; is it {similar[0]}?"
        elif key not in SERVED and not is_off:
            yield key, f"{key} cannot be used here: {INSTEAD.get(key, 'leave it out')}"
        elif key in OBJECTS and not isinstance(value, dict):
            yield key, f"{key} must be an object"


def value_faults(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """
    Yield (key, message) for values that reach outside the training.

    They make DeepSpeed import a module, write a file, or need a further package.
    """
    for key, known in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)):
        if isinstance(section := config.get(key), dict):
            name = section.get("type")
            if name not in known and not (key == "optimizer" and str(name).lower() in known):
                yield key, f"{key} {name} cannot be used here: give {', '.join(known)}, or leave it out"
    profiler = config.get("flops_profiler")
    if isinstance(profiler, dict) and profiler.get("output_file"):
        yield "output_file", "output_file in flops_profiler cannot be used here: leave it out, and it prints"
    zero = config.get("zero_optimization")
    for name in ("offload_param", "offload_optimizer"):
        section = zero.get(name) if isinstance(zero, dict) else None
        if isinstance(section, dict) and section.get("device") == "nvme":
            yield name, f"{name} to nvme cannot be used here: give the device cpu"


def section_faults(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """
    Yield (key, message) for what DeepSpeed's pydantic models find wrong.

    A value "auto" is accepted: transformers fills it in.
    """
    from deepspeed.runtime.precision_config import (  # imports torch's extensions
        DeepSpeedBF16Config,
        DeepSpeedFP16Config,
    )
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    models = {"fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config, "zero_optimization": DeepSpeedZeroConfig}
    for section, model in models.items():
        values = config.get(section)
        if not isinstance(values, dict):  # `top_level_faults` reports it
            continue
        try:
            model(**{key: value for key, value in values.items() if value != "auto"})
        except ValidationError as error:
            for fault in error.errors():
                key = ".".join(map(str, fault["loc"]))
                if not key:  # of several values together
                    yield section, f"{section}: {fault['msg'].removeprefix('Value error, ')}"
                elif fault["type"] == "extra_forbidden":
                    similar = difflib.get_close_matches(str(fault["loc"][-1]), model.model_fields, 1)
                    yield key, f"{key} in {section}: no such key" + (f"; is it {similar[0]}?" if similar else "")
                else:
                    yield key, f"{key} in {section}: {fault['msg']}, not {fault['input']!r}"
        except (AssertionError, TypeError):  # two names of one setting, or a key that Python cannot pass
            continue  # `deepspeed_fault` reports it


def deepspeed_fault(config: dict[str, Any]) -> str | None:
    """Return what DeepSpeed finds wrong with a configuration, or None."""
    from deepspeed.runtime.config import DeepSpeedConfig

    def without_auto(value: Any) -> Any:
        """Return the value without the keys that transformers fills in."""
        if not isinstance(value, dict):
            return value
        return {key: without_auto(each) for key, each in value.items() if each != "auto"}

    values = without_auto(config)
    values.pop("train_batch_size", None)  # transformers fills in the sizes of batches
    values |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    try:
        DeepSpeedConfig(values)
    except Exception as error:  # asserts, pydantic's errors, and whatever a value of another type leads to
        return " ".join(str(error).split()) or f"{type(error).__name__}: a value is of another type"
    return None


def place_of(key: str, text: str) -> str:
    """
    Return where a key is first written in a text, or "".

    >>> place_of("b", '{\\n  "b": 1}')
    'line 2 column 3'
    """
    at = text.find(json.dumps(key.split(".")[-1]))
    if at < 0:
        return ""
    return f"line {text.count(chr(10), 0, at) + 1} column {at - text.rfind(chr(10), 0, at)}"
