"""Heads of attention in training: one kernel from the product of the frozen weight to rotated query, key and value."""

from utils.chatglm.generations import QKV
from utils.chatglm.modeling_chatglm import ChatGLMAttention
from utils.lora_layers import FusedGlmAttention, LoraLinear
from utils.optional_kernels import heads_kernels

import torch
from torch import nn


class _Heads(torch.autograd.Function):
    """See `heads_kernels.heads_of`."""

    @staticmethod
    def forward(ctx, heads, hidden, B, cos, sin, counts, neighbours):
        ctx.save_for_backward(hidden, B, cos, sin)
        ctx.neighbours = neighbours
        return torch.ops.chatglm_family.heads_of(heads, hidden, B, cos, sin, counts, neighbours)

    @staticmethod
    def backward(ctx, *gradients):
        hidden, B, cos, sin = ctx.saved_tensors
        gradients = (gradient.contiguous() for gradient in gradients)
        gradient = torch.ops.chatglm_family.heads_gradient(*gradients, cos, sin, ctx.neighbours)  # (T, C)
        return gradient, gradient @ B, gradient.t() @ hidden, None, None, None, None


def _heads_of(
    heads: torch.Tensor, hidden: torch.Tensor, B: torch.Tensor, factors, counts: list[int], neighbours: bool
) -> tuple[torch.Tensor, ...]:
    """Heads (batch, T, C), hidden (batch, T, R), B (C, R) -> query, key and value, each (batch, its heads, T, D)."""
    size = factors[0].shape[-1]
    cos, sin = (factor.reshape(-1, size).contiguous() for factor in factors)
    tensors = (heads.flatten(0, 1), hidden.flatten(0, 1), B.to(heads.dtype).contiguous())
    apart = _Heads.apply(*tensors, cos, sin, counts, neighbours)
    return tuple(states.unflatten(0, (len(heads), -1)).transpose(1, 2) for states in apart)


class KernelGlmAttention(FusedGlmAttention):
    """What a `FusedGlmAttention` becomes."""

    def heads_of(self, hidden_states: torch.Tensor, position_embeddings) -> tuple[torch.Tensor, ...]:
        A, B = self.branch()
        hidden = nn.functional.linear(hidden_states, A.to(hidden_states.dtype))
        heads = self.qkv_proj(hidden_states)
        return _heads_of(heads, hidden, B, position_embeddings, self.heads[:2], neighbours=True)


class KernelChatGLMAttention(ChatGLMAttention):
    """What a `ChatGLMAttention` becomes whose product has an adapter."""

    def heads_of(self, hidden_states: torch.Tensor, position_embeddings) -> tuple[torch.Tensor, ...]:
        layer = self.query_key_value
        A, B = layer.branch()
        inputs = layer.lora_dropout[layer.active_adapters[0]](hidden_states)
        hidden = nn.functional.linear(inputs, A.to(hidden_states.dtype))
        heads = layer.base_layer(hidden_states)
        count = heads.shape[-1] // (3 * self.head_dim)
        return _heads_of(heads, hidden, B, position_embeddings, [count, count], neighbours=False)


def fuse_heads(model: nn.Module) -> None:
    """Changes every attention of `model` with one adapter on its query, key and value, on a GPU, in place."""
    kernels = heads_kernels()
    for module in model.modules() if kernels is not None else ():
        if type(module) is FusedGlmAttention:
            layers, kind = [getattr(module, name) for name in QKV], KernelGlmAttention
        elif type(module) is ChatGLMAttention:
            layers, kind = [module.query_key_value], KernelChatGLMAttention
        else:
            continue
        if all(isinstance(layer, LoraLinear) and layer.is_plain() for layer in layers):
            rank = sum(layer.r[layer.active_adapters[0]] for layer in layers)
            if kernels.fits(module.head_dim, rank):
                module.__class__ = kind
