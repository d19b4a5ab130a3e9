"""GEMMs of at most 64 rows, in 16 bits and in FP8, beside torch in float32."""

import pytest
import torch
from kernel_checks import DEVICE, ON_GPU, ROUNDING, activate, assert_close, random

from utils.kernels.skinny_gemm import fp8_skinny_gemm, skinny_gemm, supports_weight
from utils.kernels.triton_utils import arrival_counters
from utils.layers.fp8 import quantize_rows

FP8_SUMS = 8e-3  # Hopper adds FP8 products up in some 14 bits (DeepSeek-V3, arXiv:2412.19437, 3.3.2)
# Each tile height and width that the launch tells apart, rows and outputs that fill no tile, and one split along K.
SHAPES = (
    ((64, 27392, 4096), (3, 4608, 4096), (64, 4096, 13696), (17, 4000, 16384), (40, 512, 4096))
    if ON_GPU
    else ((5, 100, 256), (33, 130, 384), (17, 70, 8192))
)
shapes = pytest.mark.parametrize("M, N, K", SHAPES)
epilogues = pytest.mark.parametrize("epilogue", ["none", "bias", "gate"])


def finish(product: torch.Tensor, epilogue: str, bias: torch.Tensor | None) -> torch.Tensor:
    """What a GEMM makes of its float32 sums."""
    if epilogue == "gate":
        return activate(product, gated=True)
    return product if bias is None else product + bias.float()


@shapes
@epilogues
def test_gemm_in_16_bits(M, N, K, epilogue):
    x, weight, bias = random(M, K), random(N, K), random(N) if epilogue == "bias" else None
    expected = finish(x.float() @ weight.float().T, epilogue, bias)
    output = skinny_gemm(x, weight, bias, gated=epilogue == "gate")
    assert output.dtype == x.dtype
    assert_close(output, expected, ROUNDING)
    assert not arrival_counters(DEVICE).any()


@shapes
@epilogues
def test_gemm_in_fp8(M, N, K, epilogue):
    bias = random(N).bfloat16() if epilogue == "bias" else None
    (x, x_scale), (weight, weight_scale) = quantize_rows(random(M, K)), quantize_rows(random(N, K))
    output = fp8_skinny_gemm(x, x_scale, weight, weight_scale.t().contiguous(), bias, gated=epilogue == "gate")
    expected = finish((x.float() * x_scale) @ (weight.float() * weight_scale).T, epilogue, bias)
    assert output.dtype == torch.bfloat16
    assert_close(output, expected, FP8_SUMS)
    assert not arrival_counters(DEVICE).any()


@pytest.mark.parametrize(
    "N, K, is_supported",
    [(4096, 4096, True), (8192, 128, True), (8191, 128, False), (16384, 64, False), (4096, 4095, False)],
)
def test_small_weights_and_uneven_ones_stay_with_torch(N, K, is_supported):
    assert supports_weight(torch.empty(N, K, device="meta")) is is_supported
