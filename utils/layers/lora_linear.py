"""
A linear layer with a LoRA adapter whose branch runs in the dtype of the base.

In: a frozen linear layer of any kind (16 bits, FP8, integers); PEFT builds `LoraLinear` around it, because
utils/lora/adapter.py registers the class for `nn.Linear`. Out: base + branch, with float32 adapter weights. PEFT's own
layer casts the input to float32 instead, which doubles the traffic of a 16-bit run.
"""

import torch
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import nn


def add_lora(output: torch.Tensor, hidden_states: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """
    Return output + hidden_states A^T B^T in the dtype of `output`.

    Args:
        output: (..., out).
        hidden_states: (..., in).
        A: (R, in).
        B: (out, R), with the scaling in it.
    """
    hidden = nn.functional.linear(hidden_states, A.to(hidden_states.dtype))  # (..., R)
    result = torch.addmm(output.flatten(0, -2), hidden.flatten(0, -2), B.to(output.dtype).t())
    return result.view(output.shape)


class LoraLinear(PeftLoraLinear):
    """PEFT's LoRA layer with one adapter, computed in the dtype of its base."""

    def lora_ab(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A (R, in) and the scaled B (out, R) of the one adapter, in their own dtype."""
        (name,) = self.active_adapters
        return self.lora_A[name].weight, self.lora_B[name].weight * self.scaling[name]

    def lora_input(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what A is applied to: `hidden_states` after the adapter's dropout."""
        return self.lora_dropout[self.active_adapters[0]](hidden_states)

    def is_plain(self) -> bool:
        """Whether the layer is base + one branch: not merged, not disabled, no LoRA variant."""
        names = self.active_adapters
        return not (self.disable_adapters or self.merged or len(names) != 1 or names[0] in self.lora_variant)

    def has_dropout(self) -> bool:
        """Whether the one adapter drops inputs in training."""
        return not isinstance(self.lora_dropout[self.active_adapters[0]], nn.Identity)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        if args or kwargs or not self.is_plain():
            return super().forward(x, *args, **kwargs)
        return add_lora(self.base_layer(x), self.lora_input(x), *self.lora_ab())
