"""
The layers that an adapter trains in, at the speed of the hardware: the branch in the dtype of the base with float32
master weights, its second product added by the matrix product itself, and the projections of one input in one.
"""

from collections.abc import Sequence

from utils.chatglm.generations import QKV
from utils.joined_projections import JoinedGlmAttention, join_linear
from utils.rotary import rotate_neighbours

import torch
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.glm.modeling_glm import GlmAttention


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


class Absorbed(nn.Module):
    """Stands where a projection's own weight was that has become part of a wider one."""

    def forward(self, *args, **kwargs):
        raise RuntimeError("this projection's weight is part of qkv_proj")


class JoinedLinear(nn.Module):
    """
    One product of several linear layers, their weights laid together when it is called and again in the backward
    pass: for those that ZeRO-3 gathers. For compiled layers: elsewhere the product would be made again too.
    """

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__()
        self.layers = tuple(layers)  # which stay registered where they are

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return checkpoint(self._product, hidden_states, use_reentrant=False)

    def _product(self, hidden_states: torch.Tensor) -> torch.Tensor:
        bias = None if self.layers[0].bias is None else torch.cat([layer.bias for layer in self.layers])
        return nn.functional.linear(hidden_states, torch.cat([layer.weight for layer in self.layers]), bias)


class FusedGlmAttention(JoinedGlmAttention):
    """What a `GlmAttention` becomes whose three projections have adapters, which keep their places."""

    def fuse(self, partitioned: bool) -> None:
        bases = [getattr(self, name).base_layer for name in QKV]
        self.heads = [base.out_features // self.head_dim for base in bases]
        if partitioned:
            self.qkv_proj = JoinedLinear(bases)
            return
        self.qkv_proj = join_linear(bases)
        for name in QKV:
            getattr(self, name).base_layer = Absorbed()

    def branch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (3 r, in) and the scaled B (out, 3 r) of all three."""
        branches = [getattr(self, name).branch() for name in QKV]
        return torch.cat([A for A, _ in branches]), torch.block_diag(*[B for _, B in branches])

    def heads_of(self, hidden_states: torch.Tensor, position_embeddings) -> tuple[torch.Tensor, ...]:
        qkv = add_branch(self.qkv_proj(hidden_states), hidden_states, *self.branch())
        query, key, value = self.heads_apart(qkv)
        return *rotate_neighbours(query, key, *position_embeddings), value


def fuse_projections(model: nn.Module, partitioned: bool = False) -> None:
    """
    Makes one product of query, key and value wherever all three have an adapter over a plain weight.

    Args:
        partitioned: whether ZeRO-3 holds the weights, which then stay where they are.
    """
    for module in model.modules():
        if type(module) is not GlmAttention:
            continue
        projections = [getattr(module, name) for name in QKV]
        if all(
            isinstance(projection, LoraLinear)
            and projection.is_plain()
            and type(projection.base_layer) is nn.Linear
            and isinstance(projection.lora_dropout[projection.active_adapters[0]], nn.Identity)
            for projection in projections
        ):
            module.__class__ = FusedGlmAttention
            module.fuse(partitioned)
