"""
Frozen linear layers in 8-bit floating point (e4m3) on Hopper and newer GPUs.

In: a model in bfloat16 and the names of its linear layers. Out: the same model, these layers replaced. Called by
utils/training/optimize.py (`Fp8TrainLinear`) and utils/inference/placement.py (`Fp8DecodeLinear`).

Training holds the weight twice, as its two GEMMs need it: by output row for the forward pass, and transposed for the
backward pass, each row with its own float32 scale. That is the memory of 16 bits and no transposition in a step.
Activations and gradients are quantised by token as they come. torchao has no such frozen layout: it casts a 16-bit
weight, which it keeps, in every step.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from utils.common.errors import UsageError
from utils.kernels import load_inference_block, load_skinny_gemm
from utils.layers.replace import replace_layers

FP8 = "fp8"  # the value of --quantize
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
MIN_CAPABILITY = (9, 0)  # Hopper: the first GPUs with an FP8 GEMM that takes a scale per row


class QuantizedRows(NamedTuple):
    """The input of a GEMM: e4m3 (..., K), and the scale of each of its M rows, (M, 1) float32."""

    values: torch.Tensor
    scale: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """That of the values."""
        return self.values.shape


def check_device() -> None:
    """
    Check that this GPU has FP8 GEMMs with a scale per row.

    Raises:
        UsageError: it has none, or there is no GPU.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < MIN_CAPABILITY:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        raise UsageError(f"--quantize fp8 needs a Hopper GPU or newer (found {device}): use int8, or leave it out")


def quantize_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, K) -> e4m3 (M, K) and its scales (M, 1) float32: each row's largest magnitude becomes 448."""
    values = values.float()
    scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    return (values / scale).to(torch.float8_e4m3fn), scale


def fp8_matmul(
    quantized: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Multiply quantised rows by a quantised weight -> (M, N) bfloat16.

    Scales per row exist for no other output dtype.

    Args:
        quantized: (M, K) e4m3.
        scale: (M, 1) float32.
        weight: (N, K) e4m3.
        weight_scale: (1, N) float32.
        bias: (N,) bfloat16.
    """
    return torch._scaled_mm(
        quantized, weight.t(), scale, weight_scale, bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


class _Fp8Matmul(torch.autograd.Function):
    """(M, K) bfloat16 times a frozen weight -> (M, N), with both GEMMs in FP8."""

    @staticmethod
    def forward(ctx, values, weight, weight_scale, weight_t, weight_t_scale, bias):
        ctx.save_for_backward(weight_t, weight_t_scale)
        return fp8_matmul(*quantize_rows(values), weight, weight_scale, bias)

    @staticmethod
    def backward(ctx, gradient):
        weight_t, weight_t_scale = ctx.saved_tensors
        gradient = fp8_matmul(*quantize_rows(gradient.contiguous()), weight_t, weight_t_scale)
        return gradient, None, None, None, None, None


class _Fp8Linear(nn.Module):
    """Base of both layers: (N, K) e4m3 buffers with scales (1, N) float32; the bias stays as it was."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias

    def _quantize(self, name: str, weight: torch.Tensor) -> None:
        quantized, scale = quantize_rows(weight)
        self.register_buffer(name, quantized.contiguous(), persistent=False)
        self.register_buffer(f"{name}_scale", scale.t().contiguous(), persistent=False)


class Fp8TrainLinear(_Fp8Linear):
    """A frozen `nn.Linear` in e4m3 through which gradients pass."""

    def __init__(self, linear: nn.Linear, device: torch.device | str = "cuda"):
        super().__init__(linear)
        weight = linear.weight.detach().to(device)
        self._quantize("weight", weight)
        self._quantize("weight_t", weight.t())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., K) bfloat16 -> (..., N)."""
        output = _Fp8Matmul.apply(
            hidden_states.reshape(-1, self.in_features),
            self.weight,
            self.weight_scale,
            self.weight_t,
            self.weight_t_scale,
            self.bias,
        )
        return output.view(*hidden_states.shape[:-1], self.out_features)


class Fp8DecodeLinear(_Fp8Linear):
    """
    An `nn.Linear` in e4m3 for inference; up to `max_skinny_rows` tokens go through the skinny GEMM.

    Its input is in bfloat16, or quantised already by the layer before.
    """

    def __init__(self, linear: nn.Linear, device: torch.device | str = "cuda"):
        super().__init__(linear)
        self._quantize("weight", linear.weight.detach().to(device))
        kernel = load_skinny_gemm()
        is_skinny = kernel is not None and kernel.supports_weight(self.weight)
        self.max_skinny_rows = kernel.max_rows(self.weight) if is_skinny else 0

    @property
    def is_skinny(self) -> bool:
        """Whether `skinny_matmul` may be called."""
        return self.max_skinny_rows > 0

    def skinny_matmul(self, hidden_states: torch.Tensor | QuantizedRows, gated: bool = False) -> torch.Tensor:
        """(..., K) of at most `max_skinny_rows` tokens -> (..., N), or (..., N / 2) gated by silu."""
        rows = self._quantized(hidden_states)
        output = torch.ops.chatglm_family.fp8_skinny_gemm(*rows, self.weight, self.weight_scale, self.bias, gated)
        return output.view(*hidden_states.shape[:-1], -1)

    def forward(self, hidden_states: torch.Tensor | QuantizedRows) -> torch.Tensor:
        """(..., K) -> (..., N) bfloat16."""
        if self.is_skinny and hidden_states.shape[:-1].numel() <= self.max_skinny_rows:
            return self.skinny_matmul(hidden_states)
        output = fp8_matmul(*self._quantized(hidden_states), self.weight, self.weight_scale, self.bias)
        return output.view(*hidden_states.shape[:-1], self.out_features)

    def _quantized(self, hidden_states: torch.Tensor | QuantizedRows) -> QuantizedRows:
        """(..., K) -> (M, K): by one kernel, or by torch operations for torch's compiler to fuse."""
        if isinstance(hidden_states, QuantizedRows):
            return QuantizedRows(hidden_states.values.reshape(-1, self.in_features), hidden_states.scale)
        rows = hidden_states.reshape(-1, self.in_features)
        kernel = None if torch.compiler.is_compiling() else load_inference_block()
        if kernel is None or not kernel.supports_row(self.in_features):
            return QuantizedRows(*quantize_rows(rows))
        return QuantizedRows(*kernel.quantize(rows.contiguous()))


def convert_to_fp8(model: nn.Module, names: Iterable[str], trains: bool, device: torch.device | str = "cuda") -> None:
    """
    Replace the plain linear layers named in `names`, and those inside adapters of that name, in place.

    Args:
        names: last parts of paths, such as `o_proj`.
        trains: whether gradients pass through the layers.
        device: where the quantised weights are put.
    """
    names = set(names)
    layer_class = Fp8TrainLinear if trains else Fp8DecodeLinear

    def build(path: str, linear: nn.Module) -> nn.Module | None:
        own_name = path.removesuffix(".base_layer").rpartition(".")[2]
        return layer_class(linear, device) if type(linear) is nn.Linear and own_name in names else None

    replace_layers(model, build)
