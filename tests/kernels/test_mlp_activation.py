"""What an MLP computes between its two GEMMs, and the gradient, beside torch in float32."""

import pytest
import torch
from kernel_checks import FP8_ROUNDING, ON_GPU, ROUNDING, activate, assert_close, random

from utils.kernels import mlp_activation

FP8_MAX = 448
SIZES = ((300, 13696), (7, 16384), (5, 48)) if ON_GPU else ((3, 13696), (5, 48))
cases = pytest.mark.parametrize("T, F", SIZES)
gated = pytest.mark.parametrize("gated", [True, False])


@pytest.fixture
def exact(T, F, gated):
    """Inputs, the gradient of the output, and of torch in float32 the output and the gradient of the inputs."""
    inputs, gradient = 3 * random(T, F * (1 + gated)), random(T, F)
    leaf = inputs.float().requires_grad_()
    output = activate(leaf, gated)
    output.backward(gradient.float())
    return inputs, gradient, output.detach(), leaf.grad


def assert_quantized(quantized: torch.Tensor, scale: torch.Tensor, expected: torch.Tensor) -> None:
    assert scale.shape == (len(expected), 1) and scale.dtype == torch.float32
    assert (quantized.float().abs().amax(-1) == FP8_MAX).all()  # each row uses the whole range
    assert_close(quantized.float() * scale, expected, FP8_ROUNDING)


@pytest.mark.parametrize("T, F", ((2, 23040), *SIZES))  # GLM-4-32B-0414's, which no program holds
@gated
def test_gradient_in_16_bits(exact, gated):
    inputs, gradient, _, expected = exact
    actual = mlp_activation.activation_gradient(gradient, inputs, gated)
    assert actual.dtype == inputs.dtype
    assert_close(actual, expected, ROUNDING)


@cases
@gated
def test_activation_in_fp8(exact, gated):
    inputs, _, expected, _ = exact
    assert_quantized(*mlp_activation.activation_fp8(inputs, gated), expected)


@cases
@gated
def test_gradient_in_fp8(exact, gated):
    inputs, gradient, _, expected = exact
    assert_quantized(*mlp_activation.activation_gradient_fp8(gradient, inputs, gated), expected)


def test_rows_that_one_program_cannot_hold_stay_with_torch():
    assert mlp_activation.supports_intermediate_size(16384)
    assert not mlp_activation.supports_intermediate_size(16385)
