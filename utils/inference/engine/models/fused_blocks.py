"""
A model's decoder blocks on a GPU by GEMMs and kernels alone, without torch.compile, which takes long.

In: hidden states of a prefill or a decode step. Out: those before the head. `ModelRunner` calls it while it captures
CUDA graphs. The sum behind a block and the norm before the next one are one kernel, so the blocks run as one chain and
not one by one. Here is what the architectures have in common; fused_glm.py and fused_chatglm.py have the rest.

Shapes: B sequences, T tokens of each, E hidden size, H query heads, D head size, C outputs of query, key and value.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import nn

from utils.inference.engine.kv_cache import LayerKVCache
from utils.kernels import load_inference_block
from utils.layers.fp8 import Fp8DecodeLinear, QuantizedRows

Attend = Callable[[nn.Module, LayerKVCache, torch.Tensor], torch.Tensor]  # query (B T, H, D) -> (B T, H, D)
AttendByCache = Callable[[nn.Module, LayerKVCache, torch.Tensor], torch.Tensor]  # qkv (B, T, C) -> (B, T, H D)
Places = tuple[torch.Tensor, torch.Tensor]  # of tokens in the cache, the last two arguments of the kernel `rotate`


def has_kernels_for(head_dim: int, *row_sizes: int) -> bool:
    """Whether the kernels run here, for heads and rows of these sizes."""
    kernels = load_inference_block()
    return kernels is not None and head_dim & (head_dim - 1) == 0 and all(map(kernels.supports_row, row_sizes))


class FusedBlocks(ABC):
    """
    The blocks of a model and the norm behind them.

    Args:
        blocks: that the kernels compute.
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
        places: Places,
        attend: Attend,
    ) -> torch.Tensor:
        """
        Return the normed hidden states (B, T, E) behind the last block; keys and values are in the cache.

        Args:
            hidden_states: (B, T, E), contiguous.
            position_ids: (B T, coordinates) int64.
            attend: attention of a layer, with its cache and its queries.
        """

        def attend_by_cache(attention: nn.Module, cache: LayerKVCache, qkv: torch.Tensor) -> torch.Tensor:
            layer_caches = cache.keys, cache.values
            query = self.kernels.rotate(qkv.flatten(0, 1), self.factors, position_ids, layer_caches, *places)
            return attend(attention, cache, query).view(*qkv.shape[:2], -1)

        return self.run_blocks(hidden_states, caches, attend_by_cache)

    @abstractmethod
    def run_blocks(
        self, hidden_states: torch.Tensor, caches: Sequence[LayerKVCache], attend: AttendByCache
    ) -> torch.Tensor:
        """The same, with an `attend` that rotates, and writes keys and values into the cache."""

    def activate(self, inputs: torch.Tensor, gated: bool, next_layer: nn.Module) -> torch.Tensor | QuantizedRows:
        """Return the activation between the GEMMs of an MLP, as `next_layer` takes it."""
        if isinstance(next_layer, Fp8DecodeLinear):
            return QuantizedRows(*self.kernels.activate_and_quantize(inputs, gated))
        return self.kernels.activate(inputs, gated)
