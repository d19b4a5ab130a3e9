"""
Attention with query, key and value in one product: joined for inference, and with LoRA adapters for training. With 2
key/value heads two of the three products are tiny. In training one kernel makes rotated heads of the product of the
frozen weight; the rotary embedding works by exchange, because torch's compiler makes masked loads of slices and
concatenations.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm.modeling_glm import GlmAttention, apply_rotary_pos_emb, eager_attention_forward

from utils.kernels import load_qkv_rope_lora
from utils.layers.lora_linear import LoraLinear, add_branch
from utils.models.family import QKV
from utils.models.modeling_chatglm import ChatGLMAttention

QKV_PROJ = "qkv_proj"


def join_linear(layers: Sequence[nn.Linear]) -> nn.Linear:
    """A frozen layer whose output is that of `layers`, which have the same input, one after the other."""
    has_bias = layers[0].bias is not None
    joined = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), has_bias, device="meta")
    for kind, _ in list(joined.named_parameters()):
        values = torch.cat([getattr(layer, kind).detach() for layer in layers])
        setattr(joined, kind, nn.Parameter(values, requires_grad=False))
    return joined


class JoinedGlmAttention(GlmAttention):
    """What a `GlmAttention` over plain linear layers becomes for inference."""

    def join(self) -> None:
        parts = [getattr(self, name) for name in QKV]
        self.heads = [part.out_features // self.head_dim for part in parts]
        self.qkv_proj = join_linear(parts)
        for name in QKV:
            delattr(self, name)

    def heads_of(self, hidden_states: torch.Tensor, position_embeddings) -> tuple[torch.Tensor, ...]:
        """Query (B, H, T, D) and key (B, K, T, D) rotated, and value (B, K, T, D)."""
        query, key, value = self.heads_apart(self.qkv_proj(hidden_states))
        return *apply_rotary_pos_emb(query, key, *position_embeddings), value

    def heads_apart(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        heads = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + 2 K, T, D)
        return heads.split(self.heads, dim=1)

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, cache=None, **kwargs
    ):
        query, key, value = self.heads_of(hidden_states, position_embeddings)
        cache = cache if cache is not None else past_key_values
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.flatten(-2)), weights


def fuse_qkv(model: nn.Module) -> None:
    """Changes every attention of `model` whose three projections are plain linear layers, in place."""
    for module in model.modules():
        if type(module) is GlmAttention and all(type(getattr(module, name)) is nn.Linear for name in QKV):
            module.__class__ = JoinedGlmAttention
            module.join()


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


class _Heads(torch.autograd.Function):
    """See `qkv_rope_lora.qkv_rope_lora`."""

    @staticmethod
    def forward(ctx, heads, hidden, B, cos, sin, counts, neighbours):
        ctx.save_for_backward(hidden, B, cos, sin)
        ctx.neighbours = neighbours
        return torch.ops.chatglm_family.qkv_rope_lora(heads, hidden, B, cos, sin, counts, neighbours)

    @staticmethod
    def backward(ctx, *gradients):
        hidden, B, cos, sin = ctx.saved_tensors
        gradients = (gradient.contiguous() for gradient in gradients)
        gradient = torch.ops.chatglm_family.qkv_rope_lora_backward(*gradients, cos, sin, ctx.neighbours)  # (T, C)
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
    kernels = load_qkv_rope_lora()
    for module in model.modules() if kernels is not None else ():
        if type(module) is FusedGlmAttention:
            layers, kind = [getattr(module, name) for name in QKV], KernelGlmAttention
        elif type(module) is ChatGLMAttention:
            layers, kind = [module.query_key_value], KernelChatGLMAttention
        else:
            continue
        if all(isinstance(layer, LoraLinear) and layer.is_plain() for layer in layers):
            rank = sum(layer.r[layer.active_adapters[0]] for layer in layers)
            if kernels.supports_head_dim(module.head_dim, rank):
                module.__class__ = kind


def rotate_neighbours(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What `apply_rotary_pos_emb` of transformers' GLM computes, to the bit: elements 2 i and 2 i + 1 of a head turn by
    the i-th angle, those beyond the angles stay.

    Args:
        query: (B, H, T, D), key (B, K, T, D).
        cos, sin: (B, T, R) with R at most D; the second half of R repeats the first and is not read.
    """
    D, R = query.shape[-1], cos.shape[-1]
    cos, sin = (values[:, None, :, : R // 2] for values in (cos, sin))
    kept = nn.functional.pad(cos.repeat_interleave(2, dim=-1), (0, D - R), value=1.0)  # (B, 1, T, D)
    exchanged = nn.functional.pad(torch.stack((-sin, sin), dim=-1).flatten(-2), (0, D - R))

    def rotate(heads: torch.Tensor) -> torch.Tensor:
        return heads * kept + heads.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * exchanged

    return rotate(query), rotate(key)
