"""Query, key and value of `GlmAttention` in one product: with 2 key/value heads two of the three are tiny."""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm.modeling_glm import GlmAttention, apply_rotary_pos_emb, eager_attention_forward

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
JOINED = "qkv_proj"


class JoinedGlmAttention(GlmAttention):
    """What a `GlmAttention` over plain linear layers becomes for inference."""

    def join(self) -> None:
        parts = [getattr(self, name) for name in PROJECTIONS]
        self.heads = [part.out_features // self.head_dim for part in parts]
        self.qkv_proj = nn.Linear(
            parts[0].in_features, sum(part.out_features for part in parts), parts[0].bias is not None, device="meta"
        )
        for kind, _ in list(self.qkv_proj.named_parameters()):
            joined = torch.cat([getattr(part, kind).detach() for part in parts])
            setattr(self.qkv_proj, kind, nn.Parameter(joined, requires_grad=False))
        for name in PROJECTIONS:
            delattr(self, name)

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, cache=None, **kwargs
    ):
        heads = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + 2 K, T, D)
        query, key, value = heads.split(self.heads, dim=1)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        cache = cache if cache is not None else past_key_values
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(output.flatten(-2)), weights


def join_projections(model: nn.Module) -> None:
    """Changes every attention of `model` whose three projections are plain linear layers, in place."""
    for module in model.modules():
        if type(module) is GlmAttention and all(type(getattr(module, name)) is nn.Linear for name in PROJECTIONS):
            module.__class__ = JoinedGlmAttention
            module.join()
