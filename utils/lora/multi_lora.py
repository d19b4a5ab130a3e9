"""
Several LoRA adapters on one model, each sequence of a batch computing with its own.

`utils/inference/job.py` and `tools/evaluate.py` call `add_adapters`. Before each forward pass, the code that runs the
model sets which adapter each sequence takes, in the `AdapterChoice` that `adapter_choice_of(model)` returns. What the
layers compute is in utils/layers/mixed_lora.py.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from utils.layers.mixed_lora import AdapterChoice, LoraFactors, MixedLoraLinear
from utils.lora.formats import PEFT_KEY_PREFIX, read_adapter


def add_adapters(
    model: PreTrainedModel, paths: Mapping[str, str | Path], lora_alpha: int | None = None
) -> AdapterChoice:
    """
    Put adapters on `model`, which may be quantised, or dispatched by accelerate.

    Args:
        paths: name -> any adapter that `read_adapter` can read; their order numbers them from 1.
        lora_alpha: for adapters that do not record it.

    Returns:
        The choice that decides which sequence takes which; `adapter_choice_of(model)` returns the same.

    Raises:
        UsageError: see `read_adapter`.
    """
    modules = dict(model.named_modules())
    pairs_of: dict[str, list[tuple[torch.Tensor, torch.Tensor] | None]] = defaultdict(lambda: [None] * len(paths))
    for index, path in enumerate(paths.values()):
        adapter = read_adapter(path, model, lora_alpha)
        for name, lora in adapter.layers.items():
            A, B = (adapter.state[f"{PEFT_KEY_PREFIX}{name}.lora_{kind}.weight"] for kind in "AB")
            pairs_of[name][index] = A, B * lora.scaling
    model.adapter_choice = choice = AdapterChoice()
    for name, pairs in pairs_of.items():
        layer = modules[name]
        hook = getattr(layer, "_hf_hook", None)
        device = hook.execution_device if hook and hook.execution_device is not None else layer.weight.device
        factors = LoraFactors.of_pairs(pairs).to(model.dtype, device)
        parent, _, last = name.rpartition(".")
        setattr(modules[parent], last, MixedLoraLinear(layer, factors, choice))
    return choice


def adapter_choice_of(model: PreTrainedModel) -> AdapterChoice | None:
    """
    The choice of a model with several adapters, else None.

    `add_adapters` keeps it as the model's attribute `adapter_choice`.
    """
    return getattr(model, "adapter_choice", None)
