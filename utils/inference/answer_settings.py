"""
Say in a user's words how the settings of two inference commands differ.

In: the settings that `AnswerFile` records beside answers, and the paths that the commands named. Out: flags and both
values, "--max_new_tokens was 512 and is 16", but no hash. Called by utils/inference/answer_writer.py.
"""

from collections.abc import Mapping
from typing import Any

FLAGS = {  # recorded name -> what a user calls it
    "sequences": "--num_return_sequences",
    "stop": "--stop_strings",
    "adapters": "the names of the adapters",
    "generation": "the model's generation",
    "stop_ids": "the tokens that end an answer",
    "dtype": "the precision of the weights",
}
HASHED = {  # recorded name -> (key of its path among `paths`, what is in the files)
    "weights": ("model_name_or_path", "weights"),
    "model_files": ("model_name_or_path", "tokenizer or configuration"),
    "adapter_files": ("adapter_path", "files"),
}
PATHS = ("model_name_or_path", "adapter_path")  # flags whose values are recorded for these messages alone


def describe_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], old_paths: Mapping[str, Any], new_paths: Mapping[str, Any]
) -> str:
    """Return what differs from an old command's settings, flag by flag; "other settings" if nothing known does."""
    old, new = _flat(old), _flat(new)
    differences = []
    for name in dict.fromkeys([*new, *old]):
        if old.get(name) == new.get(name):
            continue
        if name not in HASHED:
            differences.append(
                f"{FLAGS.get(name, f'--{name}')} was {_value(old.get(name))} and is {_value(new.get(name))}"
            )
            continue
        path, content = HASHED[name]
        before, now = _value(old_paths.get(path)), _value(new_paths.get(path))
        differences.append(
            f"--{path} was {before} and is {now}" if before != now else f"the {content} of --{path} {now} have changed"
        )
    return ", ".join(dict.fromkeys(differences)) or "other settings"


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with those of sampling beside the others."""
    sampling = settings.get("sampling")
    return {name: value for name, value in settings.items() if name != "sampling"} | (
        sampling if isinstance(sampling, dict) else {}
    )


def _value(value: Any) -> str:
    if value is None or value == []:
        return "not given"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).removeprefix("torch.")
