"""FP8 layers against the layers they stand in for; torch multiplies FP8 rows on a CPU too."""

import pytest
import torch
from torch import nn

from utils.layers.fp8 import Fp8DecodeLinear, Fp8TrainLinear, convert_to_fp8

has_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not has_hopper, reason="needs a Hopper GPU"))]


def linear_on(device):
    return nn.Linear(1024, 512, device=device, dtype=torch.bfloat16).requires_grad_(False)


def assert_near(actual, expected):
    assert (actual - expected).float().norm() < 0.05 * expected.float().norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-9])
def test_both_directions_of_training(scale, device):
    """Also of gradients as small as those of a mean over many tokens."""
    torch.manual_seed(0)
    linear = linear_on(device)
    values = torch.randn(256, 1024, device=device, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(256, 512, device=device, dtype=torch.bfloat16) * scale
    output = Fp8TrainLinear(linear, device)(values)
    output.backward(gradient)
    assert_near(output.detach(), linear(values.detach()))
    assert_near(values.grad, gradient @ linear.weight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(3, 1, 1024), (1, 80, 1024)], ids=["decode", "prefill"])
def test_decoding(shape, device):
    torch.manual_seed(0)
    linear = linear_on(device)
    layer = Fp8DecodeLinear(linear, device)
    assert {name for name, _ in layer.named_buffers()} == {"weight", "weight_scale"}
    values = torch.randn(shape, device=device, dtype=torch.bfloat16)
    output = layer(values)
    assert output.shape == (*shape[:-1], 512)
    assert_near(output, linear(values))


def test_layers_are_converted_by_name():
    """Also inside an adapter, which keeps its own two layers."""
    adapter = nn.ModuleDict({"base_layer": nn.Linear(16, 16), "lora_A": nn.ModuleDict({"default": nn.Linear(16, 16)})})
    model = nn.ModuleDict({"q_proj": adapter, "o_proj": nn.Linear(16, 16), "lm_head": nn.Linear(16, 16)})
    for _ in range(2):
        convert_to_fp8(model.bfloat16(), ["q_proj", "o_proj"], trains=False, device="cpu")
        kinds = {path: type(module) for path, module in model.named_modules() if not list(module.children())}
        assert kinds == {
            "q_proj.base_layer": Fp8DecodeLinear,
            "q_proj.lora_A.default": nn.Linear,
            "o_proj": Fp8DecodeLinear,
            "lm_head": nn.Linear,
        }
