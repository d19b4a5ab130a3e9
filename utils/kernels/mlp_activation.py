"""
Triton kernels for what is between the two products of an MLP in training, and its gradient. Where it is quantised a
program holds a whole row, whose largest magnitude must be known first, so that it is read and computed once.

Shapes: gated, inputs (T, 2 F), gate and up -> silu(gate) * up (T, F); else inputs (T, F) -> gelu(inputs), the
approximation by tanh (Hendrycks and Gimpel, arXiv:1606.08415).
"""

import torch
import triton
import triton.language as tl

MAX_INTERMEDIATE_SIZE = 16384  # columns of F that a program can hold
BACKWARD_BLOCK = 2048  # columns of a program that needs no whole row
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


@triton.jit
def _gelu_share(x):
    """gelu(x) / x, and its derivative."""
    share = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))  # (1 + tanh(u)) / 2 = sigmoid(2 u)
    return share, share * (1.0 - share) * 1.5957691216057308 * (1.0 + 3 * 0.044715 * x * x)


@triton.jit
def _activation_kernel(
    inputs_ptr,
    output_ptr,  # (T, F) e4m3
    scale_ptr,  # (T,) float32
    F,
    GATED: tl.constexpr,
    FP8_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < F
    inputs = inputs_ptr + row * F * (1 + GATED) + column
    x = tl.load(inputs, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        output = x * tl.sigmoid(x) * tl.load(inputs + F, mask=inside, other=0.0).to(tl.float32)
    else:
        share, _ = _gelu_share(x)
        output = x * share
    largest = tl.maximum(tl.max(tl.abs(output)), 1e-12)
    tl.store(output_ptr + row * F + column, (output * (FP8_MAX / largest)).to(tl.float8e4nv), mask=inside)
    tl.store(scale_ptr + row, largest / FP8_MAX)


@triton.jit
def _gradient_kernel(
    gradient_ptr,  # (T, F)
    inputs_ptr,
    output_ptr,  # as the inputs, e4m3 where it is quantised
    scale_ptr,  # (T,) float32
    F,
    GATED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    FP8_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    start = row * F * (1 + GATED) + column
    gradient = tl.load(gradient_ptr + row * F + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(inputs_ptr + start, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        share = tl.sigmoid(x)
        up = tl.load(inputs_ptr + start + F, mask=inside, other=0.0).to(tl.float32)
        of_x = gradient * up * share * (1.0 + x * (1.0 - share))
        of_up = gradient * x * share
    else:
        share, slope = _gelu_share(x)
        of_x = gradient * (share + x * slope)
        of_up = of_x
    if QUANTIZED:
        largest = tl.maximum(tl.max(tl.maximum(tl.abs(of_x), tl.abs(of_up))), 1e-12)
        of_x *= FP8_MAX / largest
        of_up *= FP8_MAX / largest
        tl.store(scale_ptr + row, largest / FP8_MAX)
    tl.store(output_ptr + start, of_x.to(output_ptr.dtype.element_ty), mask=inside)
    if GATED:
        tl.store(output_ptr + start + F, of_up.to(output_ptr.dtype.element_ty), mask=inside)


def supports_intermediate_size(columns: int) -> bool:
    """Whether a program can hold a row of F = `columns`."""
    return columns <= MAX_INTERMEDIATE_SIZE


def _whole_row(columns: int) -> dict[str, int]:
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 4), 32)}


@torch.library.custom_op("chatglm_family::activation_fp8", mutates_args=())
def activation_fp8(inputs: torch.Tensor, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs in 16 bits, F at most MAX_INTERMEDIATE_SIZE -> e4m3 (T, F) and its scales (T, 1) float32."""
    output, scale = _empty_activation(inputs, gated)
    rows, columns = output.shape
    options = {"GATED": gated, "FP8_MAX": FP8_MAX, **_whole_row(columns)}
    _activation_kernel[(rows,)](inputs, output, scale, columns, **options)
    return output, scale


@activation_fp8.register_fake
def _empty_activation(inputs: torch.Tensor, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = inputs.shape
    output = inputs.new_empty(rows, columns // (1 + gated), dtype=torch.float8_e4m3fn)
    return output, inputs.new_empty(rows, 1, dtype=torch.float32)


@torch.library.custom_op("chatglm_family::activation_gradient", mutates_args=())
def activation_gradient(gradient: torch.Tensor, inputs: torch.Tensor, gated: bool) -> torch.Tensor:
    """The gradient of the output (T, F), and the inputs -> the gradient of the inputs, in their dtype."""
    rows, columns = gradient.shape
    output = torch.empty_like(inputs)
    grid = (rows, triton.cdiv(columns, BACKWARD_BLOCK))
    options = {"GATED": gated, "QUANTIZED": False, "FP8_MAX": FP8_MAX, "BLOCK": BACKWARD_BLOCK, "num_warps": 4}
    _gradient_kernel[grid](gradient, inputs, output, output, columns, **options)
    return output


@activation_gradient.register_fake
def _(gradient, inputs, gated):
    return torch.empty_like(inputs)


@torch.library.custom_op("chatglm_family::activation_gradient_fp8", mutates_args=())
def activation_gradient_fp8(
    gradient: torch.Tensor, inputs: torch.Tensor, gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `activation_gradient`, but e4m3 and its scales (T, 1) float32."""
    rows, columns = gradient.shape
    output, scale = _empty_gradient(gradient, inputs, gated)
    options = {"GATED": gated, "QUANTIZED": True, "FP8_MAX": FP8_MAX, **_whole_row(columns)}
    _gradient_kernel[(rows, 1)](gradient, inputs, output, scale, columns, **options)
    return output, scale


@activation_gradient_fp8.register_fake
def _empty_gradient(gradient, inputs, gated):
    scale = inputs.new_empty(len(inputs), 1, dtype=torch.float32)
    return torch.empty_like(inputs, dtype=torch.float8_e4m3fn), scale
