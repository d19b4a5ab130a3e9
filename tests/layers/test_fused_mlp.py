"""MLPs whose activation is a kernel: the code around the kernels (tests/kernels checks the kernels themselves)."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GlmConfig
from transformers.models.glm.modeling_glm import GlmMLP

from utils.layers import fp8, fused_mlp
from utils.layers.fp8 import convert_to_fp8, quantize_rows
from utils.models import ChatGLMConfig
from utils.models.modeling_chatglm import ChatGLMMLP

LAYERS = ("gate_up_proj", "down_proj", "dense_h_to_4h", "dense_4h_to_h")
MLPS = {
    "gated": lambda: GlmMLP(GlmConfig(hidden_size=64, intermediate_size=96, hidden_act="silu")),
    "gelu": lambda: ChatGLMMLP(ChatGLMConfig(hidden_size=64, num_attention_heads=4, inner_hidden_size=96)),
}


def activate(inputs: torch.Tensor, gated: bool) -> torch.Tensor:
    if not gated:
        return nn.functional.gelu(inputs, approximate="tanh")
    gate, up = inputs.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def differentiate(gradient: torch.Tensor, inputs: torch.Tensor, gated: bool) -> torch.Tensor:
    gradient, inputs = gradient.float(), inputs.float()
    if not gated:
        return torch.ops.aten.gelu_backward(gradient, inputs, approximate="tanh")
    gate, up = inputs.chunk(2, dim=-1)
    share = gate.sigmoid()
    return torch.cat([gradient * up * share * (1 + gate * (1 - share)), gradient * gate * share], dim=-1)


def product(quantized, scale, weight, weight_scale, bias=None):
    output = (quantized.float() * scale) @ (weight.float() * weight_scale.t()).T
    return (output if bias is None else output + bias.float()).to(torch.bfloat16)


@pytest.fixture(scope="module")
def ops():
    """The kernels' operators, by torch, where there are no kernels."""
    with torch.library._scoped_library("chatglm_family", "FRAGMENT") as library:
        inputs = "Tensor inputs, bool gated"
        for name, arguments, results, call in (
            ("activation_fp8", inputs, "(Tensor, Tensor)", lambda x, gated: quantize_rows(activate(x.float(), gated))),
            (
                "activation_gradient",
                f"Tensor gradient, {inputs}",
                "Tensor",
                lambda d, *x: differentiate(d, *x).to(d.dtype),
            ),
            (
                "activation_gradient_fp8",
                f"Tensor gradient, {inputs}",
                "(Tensor, Tensor)",
                lambda d, *x: quantize_rows(differentiate(d, *x)),
            ),
        ):
            library.define(f"{name}({arguments}) -> {results}")
            library.impl(name, call, "CompositeExplicitAutograd")
        yield


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the operators are the kernels: see tests/kernels")
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("kind", MLPS)
def test_fused_mlps_compute_what_others_do(kind, is_fp8, is_compiled, ops, monkeypatch):
    for module in (fp8, fused_mlp):
        monkeypatch.setattr(module, "quantized_product", product)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    torch.manual_seed(0)
    plain = MLPS[kind]().to(torch.bfloat16).requires_grad_(False)
    if is_fp8:
        convert_to_fp8(plain, LAYERS, trains=True)
    fused = copy.deepcopy(plain)
    fused_mlp.fuse_mlps(fused)
    assert type(fused) is type(plain)  # without kernels
    monkeypatch.setattr(
        fused_mlp,
        "load_mlp_activation",
        lambda: SimpleNamespace(supports_intermediate_size=lambda columns: columns == 96),
    )
    fused_mlp.fuse_mlps(fused)
    assert isinstance(fused, type(plain)) and type(fused) is not type(plain)
    hidden_states = torch.randn(2, 24, 64, dtype=torch.bfloat16)
    gradient = torch.randn_like(hidden_states)
    results = []
    for mlp in (plain, torch.compile(fused, backend="aot_eager", fullgraph=True) if is_compiled else fused):
        values = hidden_states.clone().requires_grad_()
        output = mlp(values)
        output.backward(gradient)
        results.append((output.detach().float(), values.grad.float()))
    for expected, found in zip(*results, strict=True):
        assert (found - expected).norm() < (0.03 if is_fp8 else 0.006) * expected.norm()
