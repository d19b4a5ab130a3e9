"""INT8 and INT4 weights in 16 bits again, and GEMMs that read the integers, beside torch."""

import pytest
import torch
from kernel_checks import DEVICE, ON_GPU, ROUNDING, activate, assert_close, random

from utils.kernels.int_weight_gemm import dequantize_with_triton, int_weight_gemm
from utils.kernels.triton_utils import arrival_counters
from utils.layers.quantization import dequantize

SHAPES = [(1, 1), (3, 17), (129, 1031)] + ([(4608, 4096)] if ON_GPU else [])
GEMMS = [(3, 70, 300), (16, 130, 64), (17, 64, 1024), (64, 40, 129)]
GEMMS += [(64, 13696, 4096), (1, 4608, 2048), (8, 4096, 6848), (64, 65024, 4096)] if ON_GPU else []
bits = pytest.mark.parametrize("bits", [8, 4])


def random_weight(rows: int, stored_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers (rows, stored_columns) int8, 8 / bits to a byte, and scales (rows,) float16."""
    weight = torch.randint(-128, 128, (rows, stored_columns), dtype=torch.int8, device=DEVICE)
    return weight, torch.rand(rows, device=DEVICE).half()


@bits
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16])
@pytest.mark.parametrize("rows, stored_columns", SHAPES)
def test_weights_are_those_of_torch_to_the_bit(rows, stored_columns, dtype, bits):
    weight, scale = random_weight(rows, stored_columns)
    expected = dequantize(weight, scale, bits, dtype)
    assert torch.equal(dequantize_with_triton(weight, scale, bits, dtype), expected)


@bits
@pytest.mark.parametrize("epilogue", ["none", "bias", "gate"])
@pytest.mark.parametrize("M, N, stored_columns", GEMMS)
def test_gemm_over_integers(bits, M, N, stored_columns, epilogue):
    """One split along K and several, rows and columns that fill no tile."""
    weight, scale = random_weight(2 * N if epilogue == "gate" else N, stored_columns)
    scale /= 2**bits
    x, bias = random(M, stored_columns * 8 // bits) / 16, random(N) if epilogue == "bias" else None
    expected = x.float() @ dequantize(weight, torch.ones_like(scale), bits, torch.float32).T * scale.float()
    if epilogue == "gate":
        expected = activate(expected, gated=True)
    elif bias is not None:
        expected += bias.float()
    output = int_weight_gemm(x, weight, scale, bias, bits, gated=epilogue == "gate")
    assert output.dtype == x.dtype
    assert_close(output, expected, ROUNDING)
    assert not arrival_counters(DEVICE).any()
