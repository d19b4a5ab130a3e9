"""
GLM's decoder blocks on a GPU by GEMMs and kernels alone, without torch.compile, which takes long.

In: hidden states of a prefill or a decode step. Out: those before the head. `ServedGlm` makes it where each block is
of the kind that the kernels compute; `ModelRunner` calls it while it captures CUDA graphs. The sum behind a block and
the norm before the next one are one kernel, so the blocks run as one chain and not one by one.

Shapes: B sequences, T tokens of each, E hidden size, H query heads, D head size.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from utils.inference.engine.kv_cache import LayerKVCache
from utils.kernels import load_inference_block
from utils.layers.fp8 import Fp8DecodeLinear, QuantizedRows
from utils.layers.fused_qkv import FusedQKVAttention, project_frozen
from utils.layers.skinny_linear import SkinnyMLP, is_decode_batch
from utils.models.architectures import GLM_MLPS

Attend = Callable[[nn.Module, LayerKVCache, torch.Tensor], torch.Tensor]  # query (B T, H, D) -> (B T, H, D)


def can_fuse(block: nn.Module) -> bool:
    """Whether the kernels compute this block: a fused frozen projection of query, key and value, and SwiGLU."""
    attention, mlp, kernels = block.self_attn, block.mlp, load_inference_block()
    if kernels is None or not isinstance(attention, FusedQKVAttention) or attention.project is not project_frozen:
        return False
    sizes = attention.config.hidden_size, attention.config.intermediate_size
    is_power_of_2 = attention.head_dim & (attention.head_dim - 1) == 0
    is_swiglu = isinstance(mlp, GLM_MLPS) and mlp.config.hidden_act == "silu"
    return is_swiglu and is_power_of_2 and all(map(kernels.supports_row, sizes))


class FusedBlocks:
    """
    The blocks of a model and the norm behind them.

    Args:
        blocks: each of which `can_fuse`.
        factors: cos and sin of all positions (positions, F), in the dtype of the model.
    """

    def __init__(self, blocks: Sequence[nn.Module], norm: nn.Module, factors: tuple[torch.Tensor, torch.Tensor]):
        self.blocks, self.norm, self.factors = blocks, norm, factors
        self.kernels = load_inference_block()

    def run(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        caches: Sequence[LayerKVCache],
        places: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
    ) -> torch.Tensor:
        """
        Return the normed hidden states (B, T, E) behind the last block; keys and values are in the cache.

        Args:
            hidden_states: (B, T, E), contiguous.
            position_ids: (B T,) int64.
            places: of the tokens in the cache, the last two arguments of the kernel `rotate`.
            attend: attention of a layer, with its cache and its queries.
        """
        delta, delta_norm = None, None
        for block, cache in zip(self.blocks, caches, strict=True):
            attention, mlp = block.self_attn, block.mlp
            hidden_states, normed = self._add_and_norm(
                hidden_states, delta, delta_norm, block.input_layernorm, attention.qkv_proj
            )
            qkv = attention.qkv_proj(normed).flatten(0, 1)  # (B T, C)
            query = self.kernels.rotate(qkv, self.factors, position_ids, (cache.keys, cache.values), *places)
            attended = attend(attention, cache, query).view(*hidden_states.shape[:2], -1)
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
        gate_and_up = mlp.gate_up_proj(normed)
        if isinstance(mlp.down_proj, Fp8DecodeLinear):
            return mlp.down_proj(QuantizedRows(*self.kernels.swiglu_quantized(gate_and_up)))
        return mlp.down_proj(self.kernels.swiglu(gate_and_up))
