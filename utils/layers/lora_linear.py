"""A linear layer with a LoRA adapter: the branch in the dtype of the base, with float32 master weights."""

import torch
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import nn


def add_branch(output: torch.Tensor, hidden_states: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """output (..., out) + hidden_states (..., in) A^T B^T, in the dtype of `output`; A (r, in), B (out, r)."""
    hidden = nn.functional.linear(hidden_states, A.to(hidden_states.dtype))
    added = torch.addmm(output.flatten(0, -2), hidden.flatten(0, -2), B.to(output.dtype).t())
    return added.view(output.shape)


class LoraLinear(PeftLoraLinear):
    """PEFT's layer with one adapter; PEFT casts the input to the adapter's float32 instead."""

    def branch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and the scaled B (out, r), in their own dtype."""
        (name,) = self.active_adapters
        return self.lora_A[name].weight, self.lora_B[name].weight * self.scaling[name]

    def is_plain(self) -> bool:
        """Whether it is base + branch and nothing else."""
        names = self.active_adapters
        return not (self.disable_adapters or self.merged or len(names) != 1 or names[0] in self.lora_variant)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if args or kwargs or not self.is_plain():
            return super().forward(x, *args, **kwargs)
        return add_branch(self.base_layer(x), self.lora_dropout[self.active_adapters[0]](x), *self.branch())
