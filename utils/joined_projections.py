"""Query, key and value of `GlmAttention` in one product: with 2 key/value heads two of the three are tiny."""

from collections.abc import Sequence

from utils.chatglm.generations import QKV

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm.modeling_glm import GlmAttention, apply_rotary_pos_emb, eager_attention_forward

JOINED = "qkv_proj"


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


def join_projections(model: nn.Module) -> None:
    """Changes every attention of `model` whose three projections are plain linear layers, in place."""
    for module in model.modules():
        if type(module) is GlmAttention and all(type(getattr(module, name)) is nn.Linear for name in QKV):
            module.__class__ = JoinedGlmAttention
            module.join()
