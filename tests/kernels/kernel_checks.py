"""Where the tests of kernels run, in which dtype, and how near a result must be to float32."""

import pytest
import torch
from torch import nn

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float16  # Triton's interpreter computes with NumPy, without bfloat16
ROUNDING = 4e-3  # of a result in 16 bits: bfloat16 rounds by up to 2^-9
# e4m3 rounds by up to 2^-4. Triton's interpreter loses a carry into the exponent, which halves some numbers.
FP8_ROUNDING = 3e-2 if ON_GPU else 0.12
fp8_on_a_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: torch multiplies FP8 matrices only there")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Compare by the relative error of the whole tensor, ||actual - expected|| / ||expected||."""
    assert actual.shape == expected.shape
    error = ((actual.float() - expected).norm() / expected.norm()).item()
    assert error < tolerance


def activate(inputs: torch.Tensor, gated: bool) -> torch.Tensor:
    """(T, 2 F) -> silu(gate) * up (T, F) where `gated`, else gelu(inputs) by tanh."""
    if not gated:
        return nn.functional.gelu(inputs, approximate="tanh")
    gate, up = inputs.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up
