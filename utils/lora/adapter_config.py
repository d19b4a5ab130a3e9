"""
An `adapter_config.json` as PEFT writes it -> the layers of a model that it adapts, each with rank and scaling.

`utils/lora/formats.py` reads it here, and not with PEFT, because a configuration comes from anywhere: a key that would
change the weights in a way that is not computed here is refused by its name, and regular expressions have a time
limit.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.checkpoint.directory import refuse_pointer
from utils.common.errors import UsageError
from utils.common.json_files import read_json_object

# Keys that do not affect the weights of a trained adapter.
WITHOUT_EFFECT = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "lora_dropout", "merge_weights", "runtime_config", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # `init_lora_weights` says whether they count
}
COMPUTED = {  # keys that are computed here
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")  # which leave the base as it is
PRINCIPAL_INITS = ("pissa", "olora")  # which take a part out of the base that depends on the base alone
HOW_TO_MERGE = "merge the adapter where it was trained (PEFT's merge_and_unload), and pass the merged model"
HOW_TO_CONVERT = (
    "save it with path_initial_model_for_weight_conversion, as PEFT's documentation of save_pretrained shows"
)
LAYER_NUMBER = r".*?\.[^.]*\.(?P<idx>\d+)\..*"  # PEFT's: the first number that follows two parts of a name
MAX_RANK_AND_ALPHA = 1 << 20  # real ones stay far below; larger ones make weights that are not finite
MATCH_SECONDS = 10  # limit for a configuration's regular expressions; those of real adapters need milliseconds
MATCH_SCRIPT = """
import json, re, sys
patterns, names = json.load(sys.stdin)
matches = [map(re.compile(pattern).fullmatch, names) for pattern in patterns]
json.dump([[match and (match.groupdict().get("idx") or True) for match in row] for row in matches], sys.stdout)
"""


@dataclass(frozen=True)
class LayerLora:
    """LoRA on one layer: weight + scaling * B A; A (R, in), B (out, R)."""

    rank: int
    alpha: float
    use_rslora: bool

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def widened(self, times: int) -> "LayerLora":
        """The same scaling with `times` the rank."""
        rank = self.rank * times
        return LayerLora(rank, self.scaling * (math.sqrt(rank) if self.use_rslora else rank), self.use_rslora)


@dataclass(frozen=True)
class AdapterConfig:
    """The values of an adapter's configuration that decide its weights, checked."""

    file: Path
    rank: int
    alpha: float
    targets: str | frozenset[str]  # a regular expression, or ends of names
    use_rslora: bool = False
    init: bool | str | None = True
    excluded: str | frozenset[str] = frozenset()
    layers: frozenset[int] = frozenset()  # none: all
    layers_patterns: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def adapted_layers(self, names: Iterable[str], head: str) -> dict[str, LayerLora]:
        """
        The layers that the adapter is on, chosen as PEFT chooses them.

        Args:
            names: all linear layers and embeddings of the model.
            head: the output layer, which PEFT leaves out of "all-linear".

        Raises:
            UsageError: a regular expression cannot be compiled, or takes too long.
        """
        names = list(names)
        if isinstance(self.targets, str) and self.targets.lower() == "all-linear":
            chosen = [name for name in names if name != head]
        elif isinstance(self.targets, str):
            chosen = self._matching("target_modules", [self.targets], names)
        else:
            chosen = [name for name in names if _ends_with(name, self.targets)]
            if self.layers:
                chosen = self._in_layers(chosen)
        if isinstance(self.excluded, str):
            excluded = set(self._matching("exclude_modules", [self.excluded], chosen))
            chosen = [name for name in chosen if name not in excluded]
        else:
            chosen = [name for name in chosen if not _ends_with(name, self.excluded)]
        ranks = self._by_pattern("rank_pattern", self.rank_pattern, chosen)
        alphas = self._by_pattern("alpha_pattern", self.alpha_pattern, chosen)
        return {
            name: LayerLora(ranks.get(name, self.rank), alphas.get(name, self.alpha), self.use_rslora)
            for name in chosen
        }

    def _in_layers(self, names: list[str]) -> list[str]:
        exact = {name for name in names if name in self.targets}  # PEFT takes whole names whatever their layer
        patterns = [rf"(?:.*?\.)?{pattern}\.(?P<idx>\d+)\..*" for pattern in self.layers_patterns] or [LAYER_NUMBER]
        numbers = self._match("layers_pattern", patterns, names)
        first = [next((number for number in row if number), None) for row in zip(*numbers, strict=True)]
        return [
            name
            for name, number in zip(names, first, strict=True)
            if name in exact or (number is not None and int(number) in self.layers)
        ]

    def _by_pattern(self, field: str, values: dict[str, Any], names: list[str]) -> dict[str, Any]:
        """Name -> the value of the first pattern that it ends with."""
        if not values:
            return {}
        matches = self._match(field, [rf"(.*\.)?({pattern})" for pattern in values], names)
        chosen: dict[str, Any] = {}
        for value, row in zip(values.values(), matches, strict=True):
            for name, matched in zip(names, row, strict=True):
                if matched:
                    chosen.setdefault(name, value)
        return chosen

    def _matching(self, field: str, patterns: list[str], names: list[str]) -> list[str]:
        (row,) = self._match(field, patterns, names)
        return [name for name, matched in zip(names, row, strict=True) if matched]

    def _match(self, field: str, patterns: list[str], names: list[str]) -> list[list[Any]]:
        """
        The results of each pattern on each name, in a process that can be stopped.

        A result is the layer number that the pattern caught, True for a match without one, or None.
        """
        try:
            result = subprocess.run(  # a process can be stopped, a match in this one cannot
                [sys.executable, "-I", "-c", MATCH_SCRIPT],
                input=json.dumps([patterns, names]),
                capture_output=True,
                text=True,
                timeout=MATCH_SECONDS,
            )
        except subprocess.TimeoutExpired:
            fault = f"takes more than {MATCH_SECONDS} s to match"
            raise UsageError(f"{self.file}: {field} {fault}: do not use this adapter, or name its layers") from None
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["its process was killed"])[-1]
            raise UsageError(f"{self.file}: {field} is not a regular expression: {reason[:200]}")
        return json.loads(result.stdout)


def _ends_with(name: str, ends: frozenset[str]) -> bool:
    """Whether `name`, or what follows one of its dots, is one of `ends`."""
    words = name.split(".")
    return any(".".join(words[i:]) in ends for i in range(len(words)))


def read_adapter_config(file: Path) -> AdapterConfig:
    """
    Read an `adapter_config.json`.

    Raises:
        UsageError: see `read_json_object`; it is not LoRA's; a bad value; or a key that is not computed here.
    """
    refuse_pointer(file)
    values = read_json_object(file)
    if values.get("peft_type") != "LORA":
        raise UsageError(f"{file} is of a {_shown(values.get('peft_type'))} adapter; only LORA is supported")
    for key, value in values.items():
        if value and value != "none" and key not in WITHOUT_EFFECT | COMPUTED:
            fault = "names code to import" if key == "megatron_config" else "is not supported"
            raise UsageError(f"{file}: {_shown(key)} ({_shown(value)}) {fault}: {HOW_TO_MERGE}")
    init = values.get("init_lora_weights", True)
    init = init.lower() if isinstance(init, str) else init
    if not isinstance(init, bool | str | None) or init not in PLAIN_INITS + PRINCIPAL_INITS:
        fault = "an initialisation that may change the base, by chance or by data"
        raise UsageError(f"{file}: init_lora_weights is {_shown(init)}, {fault}: {HOW_TO_CONVERT}")
    if not values.get("target_modules"):
        raise UsageError(f"{file} names no target_modules: is it the adapter's configuration?")

    def value_of(key: str, default: Any, wanted: str, is_valid: Callable[[Any], bool]) -> Any:
        value = default if values.get(key) is None else values[key]
        if not is_valid(value):
            raise UsageError(f"{file}: {key} is {_shown(value)}, not {wanted}")
        return value

    targets, excluded, layers_pattern = (
        value_of(key, [], "a text or a list of texts", lambda value: isinstance(value, str) or _list_of(str, value))
        for key in ("target_modules", "exclude_modules", "layers_pattern")
    )
    layers = value_of(
        "layers_to_transform", [], "a list of numbers", lambda value: type(value) is int or _list_of(int, value)
    )
    return AdapterConfig(
        file=file,
        rank=value_of("r", 8, "a whole number from 1 to 1,048,576", _is_rank),
        alpha=value_of("lora_alpha", 8, "a number up to 1,048,576", _is_alpha),
        use_rslora=value_of("use_rslora", False, "true or false", lambda value: type(value) is bool),
        init=init,
        targets=targets if isinstance(targets, str) else frozenset(targets),
        excluded=excluded if isinstance(excluded, str) else frozenset(excluded),
        layers=frozenset([layers] if type(layers) is int else layers),
        layers_patterns=(layers_pattern,) if isinstance(layers_pattern, str) else tuple(layers_pattern),
        rank_pattern=value_of("rank_pattern", {}, "names and ranks", lambda value: _each(value, _is_rank)),
        alpha_pattern=value_of("alpha_pattern", {}, "names and numbers", lambda value: _each(value, _is_alpha)),
    )


def _list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is kind for each in value)


def _each(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(is_valid, value.values()))


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_RANK_AND_ALPHA


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_RANK_AND_ALPHA


def _shown(value: Any) -> str:
    """A file's value for a message: short and on one line."""
    return f"{value!r:.60}" if isinstance(value, bool | int | float | str | None) else f"a {type(value).__name__}"
