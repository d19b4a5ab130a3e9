"""
Linear layers and MLPs of a decode step, which load their weight once for a batch of single tokens.

In: the blocks of a model in 16 bits or FP8 on a GPU. Out: the same blocks, linear layers and gated MLPs replaced
where the kernel of utils/kernels/skinny_gemm.py pays. Called by the inference engine. Not cuBLAS: its kernels do not
start while the kernel before them ends (programmatic dependent launch), which pays only where all of a decode step's
kernels do.
"""

from types import ModuleType

import torch
from torch import nn

from utils.kernels import load_skinny_gemm
from utils.layers.replace import replace_layers, share_state, subclass_with
from utils.models.architectures import GLM_MLPS


def is_decode_batch(hidden_states: torch.Tensor, max_rows: int) -> bool:
    """Whether (B, T, K) is one token each of at most `max_rows` sequences."""
    return hidden_states.shape[1] == 1 and hidden_states.shape[0] <= max_rows


class SkinnyLinear(nn.Linear):
    """`nn.Linear` in 16 bits with a skinny GEMM for decode steps."""

    max_skinny_rows: int
    is_skinny = True

    @classmethod
    def from_stock(cls, stock: nn.Linear, max_skinny_rows: int) -> "SkinnyLinear":
        """Build the layer that stands in for `stock`, whose weight it shares."""
        linear = share_state(stock, cls)
        linear.max_skinny_rows = max_skinny_rows
        return linear

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, K) -> (B, T, N)."""
        if is_decode_batch(hidden_states, self.max_skinny_rows):
            return self.skinny_matmul(hidden_states)
        return super().forward(hidden_states)

    def skinny_matmul(self, hidden_states: torch.Tensor, gated: bool = False) -> torch.Tensor:
        """(B, 1, K) -> (B, 1, N), or (B, 1, N / 2) gated by silu."""
        rows = hidden_states[:, 0].contiguous()  # (B, K)
        return torch.ops.chatglm_family.skinny_gemm(rows, self.weight, self.bias, gated)[:, None]


class SkinnyMLP:
    """Methods of one of GLM_MLPS whose activation and gate end the first skinny GEMM."""

    max_skinny_rows: int

    @classmethod
    def from_stock(cls, stock: nn.Module) -> nn.Module:
        """Build the layer that stands in for `stock`, whose linear layers, the first one skinny, it shares."""
        mlp = share_state(stock, subclass_with(cls, type(stock)))
        mlp.max_skinny_rows = stock.gate_up_proj.max_skinny_rows
        return mlp

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, K) -> (B, T, K)."""
        if not is_decode_batch(hidden_states, self.max_skinny_rows):
            return super().forward(hidden_states)
        return self.down_proj(self.gate_up_proj.skinny_matmul(hidden_states, gated=True))


def use_skinny_layers(blocks: nn.Module, kernel: ModuleType | None = None) -> None:
    """
    Replace the plain linear layers and gated MLPs in `blocks` that the kernel speeds up, in place.

    Args:
        blocks: the model's `layers`, or any module that holds them.
        kernel: utils/kernels/skinny_gemm.py (default: where it runs, else nothing is replaced).
    """
    kernel = load_skinny_gemm() if kernel is None else kernel
    if kernel is None:
        return

    def build_linear(_: str, linear: nn.Module) -> nn.Module | None:
        if type(linear) is nn.Linear and kernel.supports_weight(linear.weight):
            max_rows = kernel.max_rows(linear.weight)
            return SkinnyLinear.from_stock(linear, max_rows) if max_rows else None
        return None

    def build_mlp(_: str, mlp: nn.Module) -> nn.Module | None:
        is_gated = type(mlp) in GLM_MLPS and mlp.config.hidden_act == "silu"
        return SkinnyMLP.from_stock(mlp) if is_gated and getattr(mlp.gate_up_proj, "is_skinny", False) else None

    replace_layers(blocks, build_linear)  # also of MLPs that are no gated ones
    replace_layers(blocks, build_mlp)
