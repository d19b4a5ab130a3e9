"""Layers with a skinny GEMM: which layers get one and when it is called (tests/kernels checks the kernel itself)."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from reference_ops import reference_ops
from torch import nn
from transformers import Glm4Config, GlmConfig
from transformers.models.glm.modeling_glm import GlmMLP
from transformers.models.glm4.modeling_glm4 import Glm4MLP

from utils.layers.skinny_linear import SkinnyLinear, SkinnyMLP, use_skinny_layers

KERNEL = SimpleNamespace(max_rows=lambda weight: 4, supports_weight=lambda weight: weight.numel() >= 64 * 64)


MLPS = {GlmMLP: GlmConfig, Glm4MLP: Glm4Config}


def blocks(hidden_act="silu", mlp_class=GlmMLP):
    torch.manual_seed(0)
    config = MLPS[mlp_class](hidden_size=64, intermediate_size=96, hidden_act=hidden_act)
    return nn.ModuleList([nn.ModuleDict({"mlp": mlp_class(config), "small": nn.Linear(64, 8)})])


@pytest.mark.parametrize("mlp_class", MLPS)
@pytest.mark.parametrize("shape", [(3, 1, 64), (4, 1, 64), (5, 1, 64), (2, 3, 64)])
def test_outputs_are_those_of_the_stock_layers(shape, mlp_class):
    stock, skinny = blocks(mlp_class=mlp_class), blocks(mlp_class=mlp_class)
    use_skinny_layers(skinny, KERNEL)
    hidden_states = torch.randn(shape)
    with reference_ops(), torch.no_grad():
        actual = skinny[0]["mlp"](hidden_states)
        assert (actual - stock[0]["mlp"](hidden_states)).abs().max() <= 1e-6


@pytest.mark.parametrize("mlp_class", MLPS)
def test_layers_share_weights_and_names(mlp_class):
    model = blocks(mlp_class=mlp_class)
    names, parameters = list(model.state_dict()), list(model.parameters())
    for _ in range(2):
        use_skinny_layers(model, KERNEL)
        mlp = model[0]["mlp"]
        assert isinstance(mlp, SkinnyMLP) and isinstance(mlp, mlp_class) and type(model[0]["small"]) is nn.Linear
        assert type(mlp.gate_up_proj) is SkinnyLinear and type(mlp.down_proj) is SkinnyLinear
        assert list(model.state_dict()) == names
        assert all(after is before for after, before in zip(model.parameters(), parameters, strict=True))


def test_other_activations_keep_their_mlp():
    model = blocks("gelu")
    use_skinny_layers(model, KERNEL)
    assert type(model[0]["mlp"]) is GlmMLP and type(model[0]["mlp"].gate_up_proj) is SkinnyLinear


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel may run there")
def test_without_a_kernel_nothing_is_replaced():
    model = blocks()
    use_skinny_layers(model)
    assert type(model[0]["mlp"]) is GlmMLP and type(model[0]["mlp"].down_proj) is nn.Linear


def test_the_module_imports_no_triton():
    code = "import sys, utils.layers.skinny_linear; print([n for n in sys.modules if n.split('.')[0] == 'triton'])"
    command = [sys.executable, "-c", f"import sys; sys.modules['triton'] = None; {code}"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "['triton']"  # the entry that forbids it
