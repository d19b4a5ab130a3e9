"""An MLP in training: what is between its products, and its gradient, by kernels that read and compute a row once."""

import torch
from torch import nn
from transformers.models.glm.modeling_glm import GlmMLP

from utils.kernels import load_mlp_activation
from utils.layers.fp8 import Fp8Linear, quantize_rows, quantized_product
from utils.models.modeling_chatglm import ChatGLMMLP


class _Activation(torch.autograd.Function):
    """The inputs (T, ...) in 16 bits, see utils/kernels/mlp_activation.py -> (T, F)."""

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
    (T, K) bfloat16, whether it is gated, bias and `factors` of the first layer, and of the second -> (T, K). What is
    between the two products, and its gradient, is quantised as soon as it is known.
    """

    @staticmethod
    def forward(ctx, values, gated, *layers):
        bias, weight, scale, columns, columns_scale, bias_2, weight_2, scale_2, columns_2, columns_scale_2 = layers
        inputs = quantized_product(*quantize_rows(values), weight, scale, bias)
        ctx.save_for_backward(inputs, columns, columns_scale, columns_2, columns_scale_2)
        ctx.gated = gated
        quantized = torch.ops.chatglm_family.activation_fp8(inputs, gated)
        return quantized_product(*quantized, weight_2, scale_2, bias_2)

    @staticmethod
    def backward(ctx, gradient):
        inputs, columns, columns_scale, columns_2, columns_scale_2 = ctx.saved_tensors
        gradient = quantized_product(*quantize_rows(gradient.contiguous()), columns_2, columns_scale_2)
        quantized = torch.ops.chatglm_family.activation_gradient_fp8(gradient, inputs, ctx.gated)
        return quantized_product(*quantized, columns, columns_scale), *[None] * 11


def _compute(first: nn.Module, second: nn.Module, hidden_states: torch.Tensor, gated: bool) -> torch.Tensor:
    """(..., K) in 16 bits -> (..., K)."""
    values = hidden_states.flatten(0, -2)
    layers = (first, second)
    if all(isinstance(layer, Fp8Linear) for layer in layers):
        tensors = [tensor for layer in layers for tensor in (layer.bias, *layer.factors())]
        output = _Fp8MLP.apply(values, gated, *tensors)
    else:
        output = second(_Activation.apply(first(values), gated))
    return output.view(hidden_states.shape)


class FusedGlmMLP(GlmMLP):
    """What a `GlmMLP` becomes."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _compute(self.gate_up_proj, self.down_proj, hidden_states, gated=True)


class FusedChatGLMMLP(ChatGLMMLP):
    """What a `ChatGLMMLP` becomes."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _compute(self.dense_h_to_4h, self.dense_4h_to_h, hidden_states, gated=False)


def fuse_mlps(model: nn.Module) -> None:
    """Changes every MLP of `model`, on a GPU and in 16 bits, whose rows the kernels can hold, in place."""
    kernels = load_mlp_activation()
    if kernels is None:
        return
    for module in model.modules():
        if type(module) is GlmMLP and module.config.hidden_act == "silu":
            fused, columns = FusedGlmMLP, module.down_proj.in_features
        elif type(module) is ChatGLMMLP:
            fused, columns = FusedChatGLMMLP, module.dense_4h_to_h.in_features
        else:
            continue
        if kernels.supports_intermediate_size(columns):
            module.__class__ = fused
