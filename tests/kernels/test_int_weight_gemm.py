"""INT8 and INT4 weights in 16 bits again, and GEMMs that read the integers, beside torch."""

import pytest
import torch
from kernel_checks import DEVICE, DTYPE, ON_GPU, ROUNDING, assert_close, random

from utils.kernels.int_weight_gemm import dequantize_with_triton, int_weight_gemm
from utils.layers.quantization import dequantize

SHAPES = [(1, 1), (3, 17), (129, 1031)] + ([(4608, 4096)] if ON_GPU else [])
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
@pytest.mark.parametrize("M, N, stored_columns", [(3, 70, 300), (16, 130, 65), (17, 64, 256), (64, 40, 129)])
def test_gemm_over_integers(bits, M, N, stored_columns):
    weight, scale = random_weight(N, stored_columns)
    x = random(M, stored_columns * 8 // bits)
    expected = x.float() @ dequantize(weight, scale, bits, DTYPE).float().T
    output = int_weight_gemm(x, weight, scale, bits)
    assert output.dtype == x.dtype
    assert_close(output, expected, ROUNDING)
