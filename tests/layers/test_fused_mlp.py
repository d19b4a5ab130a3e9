"""MLPs whose activation is a kernel: the code around the kernels (tests/kernels checks the kernels themselves)."""

import copy
from types import SimpleNamespace

import pytest
import torch
from reference_ops import reference_ops
from torch import nn
from transformers import Glm4Config, GlmConfig
from transformers.models.glm.modeling_glm import GlmMLP
from transformers.models.glm4.modeling_glm4 import Glm4MLP

from utils.layers.fp8 import convert_to_fp8
from utils.layers.fused_mlp import FusedChatGLMMLP, FusedGlmMLP, fuse_mlps
from utils.models import ChatGLMConfig
from utils.models.modeling_chatglm import ChatGLMMLP

LAYERS = ("gate_up_proj", "down_proj", "dense_h_to_4h", "dense_4h_to_h")
FUSED = {"gated": FusedGlmMLP, "gated, GLM-4-0414": FusedGlmMLP, "gelu": FusedChatGLMMLP}
KERNEL = SimpleNamespace(supports_intermediate_size=lambda size: size == 96)
MLPS = {
    "gated": lambda: GlmMLP(GlmConfig(hidden_size=64, intermediate_size=96, hidden_act="silu")),
    "gated, GLM-4-0414": lambda: Glm4MLP(Glm4Config(hidden_size=64, intermediate_size=96, hidden_act="silu")),
    "gelu": lambda: ChatGLMMLP(ChatGLMConfig(hidden_size=64, num_attention_heads=4, inner_hidden_size=96)),
}


def block(kind):
    """A parent of one MLP in bfloat16."""
    torch.manual_seed(0)
    return nn.ModuleDict({"mlp": MLPS[kind]().to(torch.bfloat16).requires_grad_(False)})


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("kind", MLPS)
def test_fused_mlps_compute_what_others_do(kind, is_fp8, is_compiled):
    plain = block(kind)
    if is_fp8:
        convert_to_fp8(plain, LAYERS, trains=True, device="cpu")
    fused = copy.deepcopy(plain)
    fuse_mlps(fused, KERNEL)
    assert isinstance(fused["mlp"], FUSED[kind]) and isinstance(fused["mlp"], type(plain["mlp"]))
    hidden_states = torch.randn(2, 24, 64, dtype=torch.bfloat16)
    gradient = torch.randn_like(hidden_states)
    results = []
    with reference_ops():
        compiled = torch.compile(fused["mlp"], backend="aot_eager", fullgraph=True)
        for mlp in (plain["mlp"], compiled if is_compiled else fused["mlp"]):
            values = hidden_states.clone().requires_grad_()
            output = mlp(values)
            output.backward(gradient)
            results.append((output.detach().float(), values.grad.float()))
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).norm() < (0.03 if is_fp8 else 0.006) * expected.norm()


@pytest.mark.parametrize("kind", MLPS)
def test_fused_mlps_share_weights_and_names(kind):
    model = block(kind).eval()
    names, parameters = list(model.state_dict()), list(model.parameters())
    for _ in range(2):
        fuse_mlps(model, KERNEL)
        assert isinstance(model["mlp"], FUSED[kind]) and not model["mlp"].training
        assert list(model.state_dict()) == names
        assert all(after is before for after, before in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("kind", MLPS)
def test_mlps_that_no_kernel_holds_stay(kind):
    """Only in FP8 must a program hold a whole row."""
    model, no_row = block(kind), SimpleNamespace(supports_intermediate_size=lambda size: False)
    stock = model["mlp"]
    if not torch.cuda.is_available():
        fuse_mlps(model)
        assert model["mlp"] is stock
    convert_to_fp8(model, LAYERS, trains=True, device="cpu")
    fuse_mlps(model, no_row)
    assert model["mlp"] is stock
    model = block(kind)
    fuse_mlps(model, no_row)
    assert isinstance(model["mlp"], FUSED[kind])
