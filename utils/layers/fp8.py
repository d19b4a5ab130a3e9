"""
Frozen linear layers in 8-bit floating point (e4m3) on Hopper and newer GPUs.

The weight is held twice, as the two products need it: by output row for the forward pass, and transposed, by input
row, for the backward pass, each row with its own float32 scale. Activations and gradients are quantised by token as
they come. Both products accumulate and end in the activations' dtype.
"""

from collections.abc import Iterable

import torch
from torch import nn

from utils.common.errors import UsageError
from utils.kernels import load_skinny_gemm

FP8 = "fp8"  # what --quantize takes
LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
FIRST_CAPABILITY = (9, 0)


def check_device() -> None:
    """
    Raises:
        UsageError: the GPU has no 8-bit products with a scale a row, or there is none.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < FIRST_CAPABILITY:
        found = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        raise UsageError(f"--quantize fp8 needs a Hopper GPU or newer (found {found}): use int8, or leave it out")


def quantize_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, K) -> e4m3 (M, K) and its scales (M, 1) float32: each row's largest magnitude becomes 448."""
    values = values.float()
    scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (values / scale).to(torch.float8_e4m3fn), scale


def quantized_product(
    quantized: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    e4m3 (M, K) with its scales (M, 1) x e4m3 (N, K) with its scales (1, N), + (N,) bfloat16 -> (M, N) bfloat16;
    scales a row go with no other dtype.
    """
    factors = (quantized, weight.t(), scale, weight_scale, bias)
    return torch._scaled_mm(*factors, out_dtype=torch.bfloat16, use_fast_accum=True)


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, weight, weight_scale, columns, columns_scale, bias):
        ctx.save_for_backward(columns, columns_scale)
        return quantized_product(*quantize_rows(values), weight, weight_scale, bias)

    @staticmethod
    def backward(ctx, gradient):
        output = quantized_product(*quantize_rows(gradient.contiguous()), *ctx.saved_tensors)
        return output, None, None, None, None, None


class Fp8Linear(nn.Module):
    """A frozen `nn.Linear` in e4m3; the bias stays as it is. With `trains` a gradient can pass through it."""

    def __init__(self, linear: nn.Linear, trains: bool):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.kernels = None if trains else load_skinny_gemm()
        weight = linear.weight.detach().cuda()
        self._hold("weight", weight)
        self._hold("columns", weight.t() if trains else weight[:0])

    def _hold(self, name: str, weight: torch.Tensor) -> None:
        quantized, scale = quantize_rows(weight)
        self.register_buffer(name, quantized.contiguous(), persistent=False)
        self.register_buffer(f"{name}_scale", scale.t().contiguous(), persistent=False)

    @property
    def for_few_rows(self) -> bool:
        return self.kernels is not None and self.kernels.supports_weight(self.weight)

    def few_rows(self, hidden_states: torch.Tensor, gated: bool = False) -> torch.Tensor:
        """(..., K), of few rows in all -> (..., N), see `fp8_skinny_gemm`."""
        quantized = quantize_rows(hidden_states.reshape(-1, self.in_features))
        output = self.kernels.fp8_skinny_gemm(*quantized, self.weight, self.weight_scale, gated)
        return output.view(*hidden_states.shape[:-1], -1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.for_few_rows and hidden_states.shape[:-1].numel() <= self.kernels.MAX_ROWS:
            output = self.few_rows(hidden_states)
            return output if self.bias is None else output + self.bias
        values = hidden_states.reshape(-1, self.in_features)
        output = _Fp8Product.apply(values, *self.factors(), self.bias)
        return output.view(*hidden_states.shape[:-1], self.out_features)

    def factors(self) -> tuple[torch.Tensor, ...]:
        """The weight by row and its scales, as `quantized_product` takes them, and both by column."""
        return self.weight, self.weight_scale, self.columns, self.columns_scale


def convert_to_fp8(model: nn.Module, names: Iterable[str], trains: bool) -> None:
    """Replaces the plain linear layers whose last name, or whose adapter's, is among `names`."""
    names = set(names)
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            own = path.rpartition(".")[2] if name == "base_layer" else name
            if type(child) is nn.Linear and own in names:
                setattr(parent, name, Fp8Linear(child, trains))
