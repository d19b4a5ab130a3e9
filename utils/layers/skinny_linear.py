"""Linear layers and MLPs that read their weight once for a token of each of few rows."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers.models.glm.modeling_glm import GlmMLP

from utils.kernels.skinny_gemm import MAX_ROWS, skinny_gemm, supports_weight


def is_for_few(hidden_states: torch.Tensor) -> bool:
    """(B, T, K): whether this is a token of each of few rows."""
    return hidden_states.shape[1] == 1 and hidden_states.shape[0] <= MAX_ROWS


class FewRowsLinear(nn.Linear):
    """What an `nn.Linear` in 16 bits becomes that is to read its weight once for a token of each of few rows."""

    for_few_rows = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, K) -> (B, T, N)."""
        return self.few_rows(hidden_states) if is_for_few(hidden_states) else super().forward(hidden_states)

    def few_rows(self, hidden_states: torch.Tensor, gated: bool = False) -> torch.Tensor:
        """(B, 1, K) -> (B, 1, N), see `skinny_gemm`."""
        return skinny_gemm(hidden_states[:, 0].contiguous(), self.weight, self.bias, gated)[:, None]


class FewRowsMLP(GlmMLP):
    """What a `GlmMLP` becomes whose products are of few rows: activation and gate are the first one's end."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not is_for_few(hidden_states):
            return super().forward(hidden_states)
        return self.down_proj(self.gate_up_proj.few_rows(hidden_states, gated=True))


def convert_layers(layers: Iterable[nn.Module]) -> None:
    """Changes every plain linear layer and gated MLP in `layers` that is worth it, in place."""
    for layer in layers:
        for module in layer.modules():
            if type(module) is nn.Linear and supports_weight(module.weight):
                module.__class__ = FewRowsLinear
        for module in layer.modules():
            gated = type(module) is GlmMLP and module.config.hidden_act == "silu"
            if gated and getattr(module.gate_up_proj, "for_few_rows", False):
                module.__class__ = FewRowsMLP
