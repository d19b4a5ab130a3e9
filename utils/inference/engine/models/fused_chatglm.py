"""ChatGLM-6B's decoder blocks by kernels alone, see fused_blocks.py; `ServedChatGLM` makes them."""

from collections.abc import Sequence

import torch
from torch import nn

from utils.inference.engine.kv_cache import LayerKVCache
from utils.inference.engine.models.fused_blocks import AttendByCache, FusedBlocks
from utils.layers.fp8 import Fp8DecodeLinear, QuantizedRows
from utils.models.modeling_chatglm import RESIDUAL_SCALE


class FusedChatGLMBlocks(FusedBlocks):
    """The residual is each layer norm's output, scaled."""

    def run_blocks(
        self, hidden_states: torch.Tensor, caches: Sequence[LayerKVCache], attend: AttendByCache
    ) -> torch.Tensor:
        """See the base class."""
        delta = None
        for block, cache in zip(self.blocks, caches, strict=True):
            attention, mlp = block.attention, block.mlp
            hidden_states, inputs = self._add_and_norm(
                hidden_states, delta, block.input_layernorm, attention.query_key_value
            )
            attended = attend(attention, cache, attention.query_key_value(inputs))
            hidden_states, inputs = self._add_and_norm(
                hidden_states, attention.dense(attended), block.post_attention_layernorm, mlp.dense_h_to_4h
            )
            delta = mlp.dense_4h_to_h(self.activate(mlp.dense_h_to_4h(inputs), False, mlp.dense_4h_to_h))
        return self._add_and_norm(hidden_states, delta, self.norm)[0]

    def _add_and_norm(
        self,
        hidden_states: torch.Tensor,
        delta: torch.Tensor | None,
        norm: nn.LayerNorm,
        next_layer: nn.Module | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | QuantizedRows]:
        """Add `delta` to the scaled hidden states; return the norm of the sum, and the same for `next_layer`."""
        quantizes = isinstance(next_layer, Fp8DecodeLinear)
        normed, quantized = self.kernels.scaled_sum_layer_norm(
            hidden_states, delta, RESIDUAL_SCALE, norm.weight, norm.bias, norm.eps, quantizes
        )
        return normed, normed if quantized is None else QuantizedRows(*quantized)
