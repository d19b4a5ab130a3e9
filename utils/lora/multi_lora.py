"""
Several LoRA adapters on one model, each sequence of a batch computing with its own.

`utils/inference/job.py` and `tools/evaluate.py` call `add_adapters`. Before each forward pass, the code that runs the
model sets which adapter each sequence takes, in the `AdapterChoice` that `adapter_choice_of(model)` returns. All
layers of the model share it. PEFT's `adapter_names` splits the batch in Python and computes each adapter by itself,
which no CUDA graph can hold.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from utils.lora.formats import PEFT_KEY_PREFIX, read_adapter


class AdapterChoice:
    """
    Which adapter each sequence of the next forward pass computes with.

    `rows` is (B, 1), or (B, T) where tokens of one row differ, int64: the number of the adapter, counted from 1 in the
    order that `add_adapters` got them; 0 is the base model.
    """

    rows: torch.Tensor


class LoraFactors(NamedTuple):
    """The factors of one adapter on one layer."""

    number: int  # of the adapter, counted from 1
    A: torch.Tensor  # (R, in)
    B: torch.Tensor  # (out, R), multiplied by the scaling


class MixedLoraLinear(nn.Module):
    """
    A frozen linear layer with several adapters beside it, computed as one.

    It computes the ranks of all adapters for every token, and sets those of other adapters than the token's own to 0.

    Args:
        base_layer: in -> out.
        factors: those of each adapter on this layer; R is the sum of their ranks.
        choice: shared by the layers of the model.
        dtype, device: where the factors compute.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        factors: list[LoraFactors],
        choice: AdapterChoice,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        self.base_layer, self.choice = base_layer, choice
        A = torch.cat([each.A for each in factors]).to(dtype=dtype, device=device)
        B = torch.cat([each.B for each in factors], dim=1).to(dtype=dtype, device=device)
        numbers = torch.tensor([each.number for each in factors for _ in each.A], device=device)
        self.register_buffer("A", A, persistent=False)  # (R, in)
        self.register_buffer("B", B, persistent=False)  # (out, R)
        self.register_buffer("adapter_of_rank", numbers, persistent=False)  # (R,) int64

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, in) -> (B, T, out)."""
        inner = nn.functional.linear(hidden_states, self.A)  # (B, T, R)
        own = self.choice.rows[..., None].to(self.adapter_of_rank.device) == self.adapter_of_rank
        return self.base_layer(hidden_states) + nn.functional.linear(inner * own, self.B)


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
    factors_of: dict[str, list[LoraFactors]] = defaultdict(list)
    for number, path in enumerate(paths.values(), start=1):
        adapter = read_adapter(path, model, lora_alpha)
        for name, lora in adapter.layers.items():
            A, B = (adapter.state[f"{PEFT_KEY_PREFIX}{name}.lora_{kind}.weight"] for kind in "AB")
            factors_of[name].append(LoraFactors(number, A, B * lora.scaling))
    model.adapter_choice = choice = AdapterChoice()
    for name, factors in factors_of.items():
        layer = modules[name]
        hook = getattr(layer, "_hf_hook", None)
        device = hook.execution_device if hook and hook.execution_device is not None else layer.weight.device
        parent, _, last = name.rpartition(".")
        setattr(modules[parent], last, MixedLoraLinear(layer, factors, choice, model.dtype, device))
    return choice


def adapter_choice_of(model: PreTrainedModel) -> AdapterChoice | None:
    """
    The choice of a model with several adapters, else None.

    `add_adapters` keeps it as the model's attribute `adapter_choice`.
    """
    return getattr(model, "adapter_choice", None)
