"""The LoRA term of several adapters in one batch, beside torch row by row."""

import pytest
import torch
from kernel_checks import DEVICE, ON_GPU, ROUNDING, assert_close, random

from utils.kernels.grouped_lora import grouped_lora, supports_widths

# Rows that fill no tile, or several; K that fills no block; ranks beyond one tile; one projection, and three.
CASES = [
    pytest.param(5, 200, 1, 3, [48], id="few rows"),
    pytest.param(130, 192, 3, 8, [128, 32, 32], id="query, key and value in several tiles of rows"),
    pytest.param(20, 2100, 2, 24, [64, 16, 16], id="more than one block of K for a split"),
    pytest.param(17, 100, 2, 70, [32, 16, 16], id="ranks in several tiles"),
] + [
    pytest.param(64, 4096, 8, 8, [4096, 256, 256], id="ChatGLM3-6B"),
    pytest.param(512, 4096, 8, 64, [4096, 256, 256], id="ChatGLM3-6B, rank 64"),
    pytest.param(4096, 13696, 3, 16, [4096], id="a prefill of the MLP"),
] * ON_GPU  # fmt: skip
cases = pytest.mark.parametrize("M, K, L, R, widths", CASES)


def random_case(M: int, K: int, L: int, R: int, widths: list[int]) -> tuple:
    """The arguments of `grouped_lora`; row 0 has no adapter, and with several adapters no row has the last one."""
    adapters = torch.randint(0, max(2, L), (M,), device=DEVICE)
    adapters[0], adapters[-1] = 0, 1
    factors = random(L, len(widths) * R, K) * K**-0.5, random(L, sum(widths), R)
    return random(M, K), random(M, sum(widths)), *factors, adapters, widths


def expected_rows(x, output, A, B, adapters, widths):
    """In float32, one row and one projection after another."""
    expected = output.float()
    R = B.shape[-1]
    for row, adapter in enumerate(adapters.tolist()):
        for projection, outputs in enumerate(expected[row].split(widths) if adapter else ()):
            first = sum(widths[:projection])
            own_A = A[adapter - 1, projection * R : (projection + 1) * R].float()
            own_B = B[adapter - 1, first : first + widths[projection]].float()
            outputs += own_B @ (own_A @ x[row].float())
    return expected


@cases
def test_each_row_has_the_term_of_its_adapter(M, K, L, R, widths):
    arguments = random_case(M, K, L, R, widths)
    result = grouped_lora(*arguments)
    assert result.dtype == arguments[1].dtype
    assert_close(result, expected_rows(*arguments), ROUNDING)
    assert torch.equal(result[0], arguments[1][0])


def test_factors_of_absent_adapters_are_not_read():
    x, output, A, B, adapters, widths = random_case(40, 128, 4, 8, [32, 16, 16])
    adapters[adapters == 3] = 0
    expected = grouped_lora(x, output, A, B, adapters, widths)
    for factor in (A, B):
        factor[2:] = torch.nan
    assert torch.equal(grouped_lora(x, output, A, B, adapters, widths), expected)


def test_a_row_does_not_depend_on_the_rows_beside_it():
    x, output, A, B, adapters, widths = random_case(40, 128, 4, 8, [32, 16, 16])
    expected = grouped_lora(x, output, A, B, adapters, widths)
    x[0], output[1], adapters[2:9] = torch.inf, torch.nan, 2
    assert torch.equal(grouped_lora(x, output, A, B, adapters, widths)[9:], expected[9:])


@cases
def test_the_operator_is_one_that_torch_compiles(M, K, L, R, widths):
    arguments = random_case(M, K, L, R, widths)
    torch.library.opcheck(grouped_lora, arguments, test_utils=("test_schema", "test_faketensor"))


def test_supported_widths():
    assert supports_widths([4096, 256, 256]) and supports_widths([16])
    assert not supports_widths([4096, 264, 256]) and not supports_widths([64] * 4)
