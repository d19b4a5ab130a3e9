"""Several LoRA adapters on one model, each row of a batch computing with its own."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from utils.lora.formats import PEFT_KEY_PREFIX, read_adapter


class AdapterChoice:
    """Which adapter each row, or token, of the batch computes with: `rows`, (B, 1 or T) int64; 0 is none."""

    rows: torch.Tensor


class MixedLoraLinear(nn.Module):
    """
    A frozen linear layer and the branches of adapters beside it, which are computed as one: of all their ranks, those
    of other adapters than a token's own are then set to 0.

    Args:
        down: (R, in), R the sum of the ranks, and up: (out, R), the scaling in it.
        owners: (R,) int64, the number of the adapter that each rank is of.
    """

    def __init__(self, base_layer, down: torch.Tensor, up: torch.Tensor, owners: torch.Tensor, choice: AdapterChoice):
        super().__init__()
        self.base_layer, self.choice = base_layer, choice
        for name, values in (("down", down), ("up", up), ("owners", owners)):
            self.register_buffer(name, values, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, in) -> (B, T, out)."""
        inner = nn.functional.linear(hidden_states, self.down)
        own = self.choice.rows[..., None].to(self.owners.device) == self.owners
        return self.base_layer(hidden_states) + nn.functional.linear(inner * own, self.up)


def add_adapters(model: PreTrainedModel, paths: Mapping[str, str | Path], lora_alpha: int | None = None) -> None:
    """
    Puts adapters on `model`, which may be quantised, or dispatched by accelerate. Its attribute `adapter_choice` then
    says which row takes which; they count from 1 in the order of `paths`.

    Raises:
        UsageError: see `read_adapter`.
    """
    modules = dict(model.named_modules())
    found: dict[str, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
    for number, path in enumerate(paths.values(), start=1):
        adapter = read_adapter(path, model, lora_alpha)
        for name, branch in adapter.branches.items():
            down, up = (adapter.state[f"{PEFT_KEY_PREFIX}{name}.lora_{kind}.weight"] for kind in "AB")
            found.setdefault(name, []).append((number, down, up * branch.scaling))
    model.adapter_choice = choice = AdapterChoice()
    for name, branches in found.items():
        layer = modules[name]
        hook = getattr(layer, "_hf_hook", None)
        device = hook.execution_device if hook and hook.execution_device is not None else layer.weight.device
        place = {"dtype": model.dtype, "device": device}
        down = torch.cat([down for _, down, _ in branches]).to(**place)
        up = torch.cat([up for _, _, up in branches], dim=1).to(**place)
        owners = torch.tensor([number for number, down, _ in branches for _ in down], device=device)
        parent, _, last = name.rpartition(".")
        setattr(modules[parent], last, MixedLoraLinear(layer, down, up, owners, choice))
