"""
MLPs for training whose activation and its gradient are kernels that compute each row once.

In: a model of either class in 16 bits on a GPU, its linear layers plain, with adapters, or in FP8. Out: the same
model, its MLPs replaced. Called by utils/training/optimize.py. Liger's SwiGLU kernel knows neither a GELU without a
gate nor FP8, where the activation is quantised as soon as it is computed.
"""

from types import ModuleType

import torch
from torch import nn

from utils.kernels import load_mlp_activation
from utils.layers.fp8 import Fp8TrainLinear, fp8_matmul, quantize_rows
from utils.layers.replace import replace_layers, share_state, subclass_with
from utils.models.architectures import GLM_MLPS
from utils.models.modeling_chatglm import ChatGLMMLP


class _Activation(torch.autograd.Function):
    """
    Inputs (T, 2 F), gate and up, -> silu(gate) * up (T, F); not gated, (T, F) -> gelu (T, F).

    torch computes the forward pass, a kernel of utils/kernels/mlp_activation.py the backward pass.
    """

    @staticmethod
    def forward(ctx, inputs, gated):
        ctx.save_for_backward(inputs)
        ctx.gated = gated
        if not gated:
            return nn.functional.gelu(inputs, approximate="tanh")
        gate, up = inputs.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx, gradient):
        (inputs,) = ctx.saved_tensors
        return torch.ops.chatglm_family.activation_gradient(gradient.contiguous(), inputs, ctx.gated), None


class _Fp8MLP(torch.autograd.Function):
    """
    (T, K) bfloat16 -> (T, K) through two FP8 layers.

    The activation between the GEMMs, and its gradient, are quantised as soon as they are computed. The weights are
    arguments, not the layers, because autograd and torch's compiler take tensors.
    """

    @staticmethod
    def forward(
        ctx,
        values,
        gated,
        first_bias,
        first_weight,
        first_weight_scale,
        first_weight_t,
        first_weight_t_scale,
        second_bias,
        second_weight,
        second_weight_scale,
        second_weight_t,
        second_weight_t_scale,
    ):
        inputs = fp8_matmul(*quantize_rows(values), first_weight, first_weight_scale, first_bias)  # (T, F or 2 F)
        ctx.save_for_backward(inputs, first_weight_t, first_weight_t_scale, second_weight_t, second_weight_t_scale)
        ctx.gated = gated
        activation, scale = torch.ops.chatglm_family.activation_fp8(inputs, gated)  # (T, F), (T, 1)
        return fp8_matmul(activation, scale, second_weight, second_weight_scale, second_bias)

    @staticmethod
    def backward(ctx, gradient):
        inputs, first_weight_t, first_weight_t_scale, second_weight_t, second_weight_t_scale = ctx.saved_tensors
        gradient = fp8_matmul(*quantize_rows(gradient.contiguous()), second_weight_t, second_weight_t_scale)
        gradient, scale = torch.ops.chatglm_family.activation_gradient_fp8(gradient, inputs, ctx.gated)
        gradient = fp8_matmul(gradient, scale, first_weight_t, first_weight_t_scale)
        return gradient, *[None] * 11  # all else is frozen


def quantizes_activation(first: nn.Module, second: nn.Module) -> bool:
    """Whether an MLP's activation is computed and quantised in one kernel, which holds a whole row."""
    return isinstance(first, Fp8TrainLinear) and isinstance(second, Fp8TrainLinear)


def _mlp(first: nn.Module, second: nn.Module, hidden_states: torch.Tensor, gated: bool) -> torch.Tensor:
    """Return second(activation(first(hidden_states))): (..., K) in 16 bits -> (..., K)."""
    values = hidden_states.flatten(0, -2)
    if quantizes_activation(first, second):
        output = _Fp8MLP.apply(
            values,
            gated,
            first.bias,
            first.weight,
            first.weight_scale,
            first.weight_t,
            first.weight_t_scale,
            second.bias,
            second.weight,
            second.weight_scale,
            second.weight_t,
            second.weight_t_scale,
        )
    else:
        output = second(_Activation.apply(first(values), gated))
    return output.view(hidden_states.shape)


class FusedGlmMLP:
    """Methods of one of GLM_MLPS with a fused activation and gradient."""

    @classmethod
    def from_stock(cls, stock: nn.Module) -> nn.Module:
        """Build the layer that stands in for `stock`, whose linear layers it shares."""
        return share_state(stock, subclass_with(cls, type(stock)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., K) in 16 bits -> (..., K)."""
        return _mlp(self.gate_up_proj, self.down_proj, hidden_states, gated=True)


class FusedChatGLMMLP(ChatGLMMLP):
    """`ChatGLMMLP` with a fused activation and gradient."""

    @classmethod
    def from_stock(cls, stock: ChatGLMMLP) -> "FusedChatGLMMLP":
        """Build the layer that stands in for `stock`, whose linear layers it shares."""
        return share_state(stock, cls)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., K) in 16 bits -> (..., K)."""
        return _mlp(self.dense_h_to_4h, self.dense_4h_to_h, hidden_states, gated=False)


def fuse_mlps(model: nn.Module, kernel: ModuleType | None = None) -> None:
    """
    Fuse every MLP of `model`, in 16 bits and on a GPU, in place; in FP8 only those whose rows the kernel holds.

    Args:
        kernel: utils/kernels/mlp_activation.py (default: where it runs, else nothing changes).
    """
    kernel = load_mlp_activation() if kernel is None else kernel
    if kernel is None:
        return

    def build(_: str, mlp: nn.Module) -> nn.Module | None:
        if type(mlp) in GLM_MLPS and mlp.config.hidden_act == "silu":
            layer_class, first, second = FusedGlmMLP, mlp.gate_up_proj, mlp.down_proj
        elif type(mlp) is ChatGLMMLP:
            layer_class, first, second = FusedChatGLMMLP, mlp.dense_h_to_4h, mlp.dense_4h_to_h
        else:
            return None
        if quantizes_activation(first, second) and not kernel.supports_intermediate_size(second.in_features):
            return None
        return layer_class.from_stock(mlp)

    replace_layers(model, build)
