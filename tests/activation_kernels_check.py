"""The kernels of an MLP in training beside torch in float32: on a GPU, or by Triton's interpreter without one."""

import copy
import os
import sys
from pathlib import Path

import torch

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import activation_kernels, fused_mlp
from utils.chatglm import ChatGLMConfig
from utils.chatglm.modeling_chatglm import ChatGLMMLP
from utils.fp8 import convert_to_fp8

from torch import nn
from transformers import GlmConfig
from transformers.models.glm.modeling_glm import GlmMLP

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float16  # numpy, by which the interpreter computes, has no bfloat16
HALF, E4M3 = 4e-3, 3e-2  # relative distances: roundings of 2^-9 and 2^-4 at most
LAYERS = ("gate_up_proj", "down_proj", "dense_h_to_4h", "dense_4h_to_h")


def check(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    distance = ((found.float() - expected).norm() / expected.norm()).item()
    assert distance < tolerance, distance


def activation(inputs: torch.Tensor, gated: bool) -> torch.Tensor:
    if not gated:
        return nn.functional.gelu(inputs, approximate="tanh")
    gate, up = inputs.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def check_kernels(T: int, F: int, gated: bool) -> None:
    inputs = 3 * torch.randn(T, F * (1 + gated), device=DEVICE, dtype=DTYPE)
    gradient = torch.randn(T, F, device=DEVICE, dtype=DTYPE)
    exact = inputs.float().requires_grad_()
    output = activation(exact, gated)
    output.backward(gradient.float())
    check(activation_kernels.activation_gradient(gradient, inputs, gated), exact.grad, HALF)
    if not ON_GPU:  # the interpreter has no e4m3
        return
    for (quantized, scale), expected in (
        (activation_kernels.activation_fp8(inputs, gated), output.detach()),
        (activation_kernels.activation_gradient_fp8(gradient, inputs, gated), exact.grad),
    ):
        assert (quantized.float().abs().amax(-1) == 448).all()
        check(quantized.float() * scale, expected, E4M3)


def check_module(plain: nn.Module, fp8: bool) -> None:
    fused = plain.to(DEVICE, DTYPE).requires_grad_(False)
    exact = copy.deepcopy(fused).float()
    if fp8:
        convert_to_fp8(fused, LAYERS, trains=True)
    fused_mlp.fuse_mlps(fused)
    assert type(fused) in (fused_mlp.FusedGlmMLP, fused_mlp.FusedChatGLMMLP)
    values = torch.randn(2, 40, 512, device=DEVICE, dtype=DTYPE, requires_grad=True)
    exact_values = values.detach().float().requires_grad_()
    gradient = torch.randn_like(values)
    output, expected = fused(values), exact(exact_values)
    output.backward(gradient)
    expected.backward(gradient.float())
    tolerance = 3 * E4M3 if fp8 else 2 * HALF
    check(output.detach(), expected.detach(), tolerance)
    check(values.grad, exact_values.grad, tolerance)


torch.manual_seed(0)
fused_mlp.activation_kernels = lambda: activation_kernels
for gated in (True, False):
    for T, F in ((300, 13696), (7, 16384), (5, 48)) if ON_GPU else ((3, 13696), (5, 48)):
        check_kernels(T, F, gated)
for fp8 in (False, True) if ON_GPU else (False,):
    check_module(GlmMLP(GlmConfig(hidden_size=512, intermediate_size=1200, hidden_act="silu")), fp8)
    check_module(ChatGLMMLP(ChatGLMConfig(hidden_size=512, inner_hidden_size=2048)), fp8)
print("equal")
