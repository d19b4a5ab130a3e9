"""
A linear layer with several LoRA adapters beside it, each sequence of a batch computing with its own.

In: a frozen linear layer of any kind (16 bits, FP8, integers) and the factors of all adapters. Out: base + branch.
utils/lora/multi_lora.py puts the layers into a model; `fuse_qkv` makes one of those of query, key and value. The base
layer stays what it would be without adapters, so a decode step keeps its skinny GEMM. In 16 bits on a GPU the branch
is two launches of utils/kernels/grouped_lora.py; elsewhere torch computes it. PEFT's `adapter_names` splits the batch
in Python and computes each adapter by itself, which no CUDA graph can hold.

Shapes: L adapters, R rank, P projections that share an input (1, or query, key and value fused).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from utils.kernels import load_grouped_lora


class AdapterChoice:
    """
    Which adapter each sequence of the next forward pass computes with; all layers of a model share one.

    `rows` is (B, 1), or (B, T) where tokens of one row differ, int64: the number of the adapter, counted from 1; 0 is
    the base model.
    """

    rows: torch.Tensor


class LoraFactors(NamedTuple):
    """The factors of L adapters on P projections, zeros where an adapter has none or a smaller rank."""

    A: torch.Tensor  # (L, P R, in)
    B: torch.Tensor  # (L, out, R), multiplied by the scaling
    widths: list[int]  # outputs of each projection; their sum is out

    @classmethod
    def of_pairs(cls, pairs: Sequence[tuple[torch.Tensor, torch.Tensor] | None]) -> "LoraFactors":
        """
        Return the factors on one layer.

        Args:
            pairs: of each adapter A (r, in) and the scaled B (out, r), r at most R; None where it has none.
        """
        A, B = max((pair for pair in pairs if pair), key=lambda pair: len(pair[0]))
        factors = cls(A.new_zeros(len(pairs), *A.shape), B.new_zeros(len(pairs), *B.shape), [len(B)])
        for number, pair in enumerate(pairs):
            if pair:
                rank = len(pair[0])
                factors.A[number, :rank], factors.B[number, :, :rank] = pair
        return factors

    @classmethod
    def concatenate(cls, factors: Sequence["LoraFactors"]) -> "LoraFactors":
        """Return the factors on layers that share an input as those of one layer, whose outputs are theirs."""
        rank = max(each.B.shape[-1] for each in factors)
        A = [nn.functional.pad(each.A, (0, 0, 0, rank - each.B.shape[-1])) for each in factors]
        B = [nn.functional.pad(each.B, (0, rank - each.B.shape[-1])) for each in factors]
        return cls(torch.cat(A, dim=1), torch.cat(B, dim=1), [width for each in factors for width in each.widths])

    def to(self, dtype: torch.dtype, device: torch.device) -> "LoraFactors":
        """Return the factors in `dtype` on `device`."""
        return self._replace(A=self.A.to(device, dtype), B=self.B.to(device, dtype))


class MixedLoraLinear(nn.Module):
    """
    A frozen linear layer with several adapters.

    Args:
        base_layer: in -> out.
        factors: in the dtype and on the device that the layer computes in.
        choice: shared by the layers of the model.
    """

    def __init__(self, base_layer: nn.Module, factors: LoraFactors, choice: AdapterChoice):
        super().__init__()
        self.base_layer, self.choice, self.widths = base_layer, choice, factors.widths
        self.register_buffer("A", factors.A.contiguous(), persistent=False)
        self.register_buffer("B", factors.B.contiguous(), persistent=False)
        is_offloaded = torch.cuda.is_available() and not factors.A.is_cuda
        kernel = load_grouped_lora() if factors.A.dtype.itemsize == 2 and not is_offloaded else None
        self.has_kernel = kernel is not None and kernel.supports_widths(self.widths)

    @property
    def factors(self) -> LoraFactors:
        """The factors of all adapters."""
        return LoraFactors(self.A, self.B, self.widths)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, in) -> (B, T, out)."""
        output = self.base_layer(hidden_states)
        rows = self.choice.rows.to(hidden_states.device)
        if not self.has_kernel:
            return output + self._branch(hidden_states, rows)
        result = torch.ops.chatglm_family.grouped_lora(
            hidden_states.flatten(0, -2).contiguous(),
            output.flatten(0, -2).contiguous(),
            self.A,
            self.B,
            rows.expand(hidden_states.shape[:-1]).flatten().contiguous(),
            self.widths,
        )
        return result.view(output.shape)

    def _branch(self, hidden_states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Compute the ranks of all adapters for every token, and set those of other adapters than its own to 0."""
        L, _, R = self.B.shape
        inner = nn.functional.linear(hidden_states, self.A.flatten(0, 1)).unflatten(-1, (L, -1, R))  # (B, T, L, P, R)
        others = rows[..., None] != torch.arange(1, L + 1, device=rows.device)  # (B, T, L)
        inner = inner.masked_fill(others[..., None, None], 0)
        branches = [
            nn.functional.linear(inner[..., projection, :].flatten(-2), B.transpose(0, 1).flatten(1))
            for projection, B in enumerate(self.B.split(self.widths, dim=1))
        ]
        return torch.cat(branches, dim=-1)


def base_layer_of(layer: nn.Module) -> nn.Module:
    """Return the layer below the adapters of `layer`, or `layer` itself."""
    return layer.base_layer if isinstance(layer, MixedLoraLinear) else layer


def add_adapters_of(layers: Sequence[nn.Module], fused: nn.Linear) -> nn.Module:
    """
    Return `fused`, the base layers of `layers` concatenated, with the adapters of those that have some.

    Args:
        layers: with one input; a layer is a `MixedLoraLinear` or has no adapters.
    """
    mixed = [layer for layer in layers if isinstance(layer, MixedLoraLinear)]
    if not mixed:
        return fused
    A, B = mixed[0].A, mixed[0].B
    factors = [
        layer.factors
        if isinstance(layer, MixedLoraLinear)
        else LoraFactors(A[:, :0], B.new_zeros(len(B), layer.out_features, 0), [layer.out_features])
        for layer in layers
    ]
    return MixedLoraLinear(fused, LoraFactors.concatenate(factors), mixed[0].choice)
