"""GLM's decoder blocks by kernels alone, see fused_blocks.py; `ServedGlm` makes them where the kernels compute all."""

from collections.abc import Sequence

import torch
from torch import nn

from utils.inference.engine.kv_cache import LayerKVCache
from utils.inference.engine.models.fused_blocks import AttendByCache, FusedBlocks, has_kernels_for
from utils.layers.fp8 import Fp8DecodeLinear, QuantizedRows
from utils.layers.fused_qkv import FusedQKVAttention, project_frozen
from utils.layers.skinny_linear import SkinnyMLP, is_decode_batch
from utils.models.architectures import GLM_MLPS


def can_fuse(block: nn.Module) -> bool:
    """Whether the kernels compute this block: a fused frozen projection of query, key and value, and SwiGLU."""
    attention, mlp = block.self_attn, block.mlp
    if not isinstance(attention, FusedQKVAttention) or attention.project is not project_frozen:
        return False
    is_swiglu = isinstance(mlp, GLM_MLPS) and mlp.config.hidden_act == "silu"
    config = attention.config
    return is_swiglu and has_kernels_for(attention.head_dim, config.hidden_size, config.intermediate_size)


class FusedGlmBlocks(FusedBlocks):
    """Blocks each of which `can_fuse`."""

    def run_blocks(
        self, hidden_states: torch.Tensor, caches: Sequence[LayerKVCache], attend: AttendByCache
    ) -> torch.Tensor:
        """See the base class."""
        delta, delta_norm = None, None
        for block, cache in zip(self.blocks, caches, strict=True):
            attention, mlp = block.self_attn, block.mlp
            hidden_states, normed = self._add_and_norm(
                hidden_states, delta, delta_norm, block.input_layernorm, attention.qkv_proj
            )
            attended = attend(attention, cache, attention.qkv_proj(normed))
            delta, delta_norm = attention.o_proj(attended), getattr(block, "post_self_attn_layernorm", None)
            hidden_states, normed = self._add_and_norm(
                hidden_states, delta, delta_norm, block.post_attention_layernorm, mlp.gate_up_proj
            )
            delta, delta_norm = self._mlp(mlp, normed), getattr(block, "post_mlp_layernorm", None)
        return self._add_and_norm(hidden_states, delta, delta_norm, self.norm)[1]

    def _add_and_norm(
        self,
        hidden_states: torch.Tensor,
        delta: torch.Tensor | None,
        delta_norm: nn.Module | None,
        norm: nn.Module,
        next_layer: nn.Module | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | QuantizedRows]:
        """Add `delta`, normed by `delta_norm` if there is one; return the sum, and its norm for `next_layer`."""
        hidden_states, normed, scale = self.kernels.add_rms_norm(
            hidden_states,
            delta,
            norm.weight,
            norm.variance_epsilon,
            None if delta_norm is None else delta_norm.weight,
            quantizes=isinstance(next_layer, Fp8DecodeLinear),
        )
        return hidden_states, normed if scale is None else QuantizedRows(normed, scale)

    def _mlp(self, mlp: nn.Module, normed: torch.Tensor | QuantizedRows) -> torch.Tensor:
        if isinstance(mlp, SkinnyMLP) and is_decode_batch(normed, mlp.max_skinny_rows):
            return mlp(normed)
        return mlp.down_proj(self.activate(mlp.gate_up_proj(normed), True, mlp.down_proj))
