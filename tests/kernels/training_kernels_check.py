"""The kernels of training beside torch in float32: on a GPU, or by Triton's interpreter without one."""

import copy
import os
import sys
from pathlib import Path

import torch

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch import nn
from transformers import GlmConfig, GlmForCausalLM
from transformers.models.glm.modeling_glm import GlmAttention, GlmMLP, GlmRotaryEmbedding

from utils.kernels import mlp_activation, qkv_rope_lora
from utils.layers import fused_mlp, fused_qkv
from utils.layers.fp8 import convert_to_fp8
from utils.layers.fused_qkv import fuse_projections
from utils.lora.adapter import attach_adapter
from utils.models import ChatGLMConfig, ChatGLMForConditionalGeneration
from utils.models.modeling_chatglm import ChatGLMAttention, ChatGLMMLP, ChatGLMRotaryEmbedding

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
    check(mlp_activation.activation_gradient(gradient, inputs, gated), exact.grad, HALF)
    if not ON_GPU:  # the interpreter has no e4m3
        return
    for (quantized, scale), expected in (
        (mlp_activation.activation_fp8(inputs, gated), output.detach()),
        (mlp_activation.activation_gradient_fp8(gradient, inputs, gated), exact.grad),
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


def check_heads(attention: nn.Module, size: int, factors: tuple[torch.Tensor, ...], tolerance: float) -> None:
    """An attention whose projections have adapters, with 2 x 70 tokens."""
    plain = attention.to(DEVICE)
    fused = copy.deepcopy(plain)
    fused_qkv.fuse_heads(fused)
    assert type(fused) is not type(plain)
    values = torch.randn(2, 70, size, device=DEVICE, dtype=factors[0].dtype)
    found = []
    for module in (plain, fused):
        inputs = values.clone().requires_grad_()
        outputs = torch.cat([heads.flatten(0, 1) for heads in module.heads_of(inputs, factors)])
        outputs.backward(torch.sin(torch.arange(outputs.numel(), device=DEVICE)).view(outputs.shape).to(outputs))
        trained = [parameter.grad for _, parameter in sorted(module.named_parameters()) if parameter.requires_grad]
        assert trained and all(gradient is not None and gradient.norm() > 0 for gradient in trained)
        found.append((outputs.detach(), inputs.grad, *trained))
    for expected, actual in zip(*found, strict=True):
        check(actual, expected, tolerance)


def with_adapter(model: nn.Module, targets: list[str], dtype: torch.dtype) -> nn.Module:
    """The first attention of a model, its adapter's weights random and in float32."""
    model = attach_adapter(model.to(dtype), 4, 8, 0.0, targets, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    fuse_projections(model)
    return next(module for module in model.modules() if isinstance(module, GlmAttention | ChatGLMAttention))


def check_all_heads(dtype: torch.dtype, tolerance: float) -> None:
    positions = torch.randint(0, 500, (2, 2, 70), device=DEVICE)
    for size, count in ((256, 4), (96, 3)):
        common = {"hidden_size": size, "num_attention_heads": count, "vocab_size": 64}
        config = ChatGLMConfig(**common, num_layers=1, inner_hidden_size=64)
        model = with_adapter(ChatGLMForConditionalGeneration(config), ["query_key_value"], dtype)
        factors = ChatGLMRotaryEmbedding(config)(torch.zeros(1, device=DEVICE, dtype=dtype), positions)
        check_heads(model, size, factors, tolerance)
    for keys, share in ((2, 0.5), (4, 1.0), (1, 0.25)):
        config = GlmConfig(
            hidden_size=192, num_attention_heads=4, num_key_value_heads=keys, head_dim=64, num_hidden_layers=1,
            intermediate_size=64, vocab_size=64, attention_bias=True, pad_token_id=0,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share},
        )  # fmt: skip
        model = with_adapter(GlmForCausalLM(config), ["q_proj", "k_proj", "v_proj"], dtype)
        values = torch.zeros(1, device=DEVICE, dtype=dtype)
        factors = GlmRotaryEmbedding(config).to(DEVICE)(values, positions[:, 0])
        check_heads(model, 192, factors, tolerance)


torch.manual_seed(0)
fused_mlp.load_mlp_activation = lambda: mlp_activation
fused_qkv.load_qkv_rope_lora = lambda: qkv_rope_lora
assert qkv_rope_lora.supports_head_dim(128, 3 * 32) and not qkv_rope_lora.supports_head_dim(128, 3 * 64)
check_all_heads(*((torch.bfloat16, 2 * HALF) if ON_GPU else (torch.float32, 1e-5)))
for gated in (True, False):
    for T, F in ((300, 13696), (7, 16384), (5, 48)) if ON_GPU else ((3, 13696), (5, 48)):
        check_kernels(T, F, gated)
for fp8 in (False, True) if ON_GPU else (False,):
    check_module(GlmMLP(GlmConfig(hidden_size=512, intermediate_size=1200, hidden_act="silu")), fp8)
    check_module(ChatGLMMLP(ChatGLMConfig(hidden_size=512, inner_hidden_size=2048)), fp8)
print("equal")
