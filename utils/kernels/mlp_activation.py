"""
What an MLP computes between its two GEMMs in training, and the gradient, as Triton kernels.

Called by utils/layers/fused_mlp.py through torch.ops.chatglm_family. In FP8 the result is quantised by row as it is
computed: a program holds a whole row, whose largest magnitude has to be known first. Liger's SwiGLU does not quantise,
and its patches know no `glm` and no ChatGLM-6B.

Shapes: T tokens, F intermediate size. Gated (GLM): inputs (T, 2 F), gate and up -> silu(gate) * up (T, F). Not gated
(ChatGLM-6B): inputs (T, F) -> gelu(inputs), the approximation by tanh (Hendrycks and Gimpel, arXiv:1606.08415).
A row's scale is its largest magnitude / 448, as in utils/layers/fp8.py: value = e4m3 * scale.
"""

import torch
import triton
import triton.language as tl

MAX_INTERMEDIATE_SIZE = 16384  # elements that one program can hold: ChatGLM-6B has 16384, GLM-4-32B-0414 23040
BACKWARD_BLOCK = 2048  # elements of a program that does not quantise and so needs no whole row
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448


@triton.jit
def _gelu_ratio(x):
    """gelu(x) / x = (1 + tanh(u)) / 2 = sigmoid(2 u) with 2 u = 1.596 (x + 0.044715 x^3), and its derivative."""
    ratio = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    return ratio, ratio * (1.0 - ratio) * 1.5957691216057308 * (1.0 + 3 * 0.044715 * x * x)


@triton.jit
def _activation_fp8_kernel(
    inputs_ptr,  # (T, 2 F) or (T, F)
    output_ptr,  # (T, F) e4m3
    scale_ptr,  # (T,) float32
    F,
    GATED: tl.constexpr,
    FP8_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, BLOCK)
    inside = f < F
    inputs = inputs_ptr + token * F * (1 + GATED) + f
    x = tl.load(inputs, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        output = x * tl.sigmoid(x) * tl.load(inputs + F, mask=inside, other=0.0).to(tl.float32)
    else:
        ratio, _ = _gelu_ratio(x)
        output = x * ratio
    largest = tl.maximum(tl.max(tl.abs(output)), 1e-12)
    tl.store(output_ptr + token * F + f, (output * (FP8_MAX / largest)).to(tl.float8e4nv), mask=inside)
    tl.store(scale_ptr + token, largest / FP8_MAX)


@triton.jit
def _gradient_kernel(
    gradient_ptr,  # (T, F)
    inputs_ptr,  # (T, 2 F) or (T, F)
    output_ptr,  # as the inputs; e4m3 where QUANTIZED
    scale_ptr,  # (T,) float32
    F,
    GATED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    FP8_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    start = token * F * (1 + GATED) + f
    gradient = tl.load(gradient_ptr + token * F + f, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(inputs_ptr + start, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        sigmoid = tl.sigmoid(x)
        up = tl.load(inputs_ptr + start + F, mask=inside, other=0.0).to(tl.float32)
        of_x = gradient * up * sigmoid * (1.0 + x * (1.0 - sigmoid))
        of_up = gradient * x * sigmoid
    else:
        ratio, slope = _gelu_ratio(x)
        of_x = gradient * (ratio + x * slope)
        of_up = of_x
    if QUANTIZED:
        largest = tl.maximum(tl.max(tl.maximum(tl.abs(of_x), tl.abs(of_up))), 1e-12)
        of_x *= FP8_MAX / largest
        of_up *= FP8_MAX / largest
        tl.store(scale_ptr + token, largest / FP8_MAX)
    tl.store(output_ptr + start, of_x.to(output_ptr.dtype.element_ty), mask=inside)
    if GATED:
        tl.store(output_ptr + start + F, of_up.to(output_ptr.dtype.element_ty), mask=inside)


def supports_intermediate_size(size: int) -> bool:
    """Whether a program can hold a row of F = `size` elements."""
    return size <= MAX_INTERMEDIATE_SIZE


def _whole_row(size: int) -> dict[str, int]:
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 4), 32)}


@torch.library.custom_op("chatglm_family::activation_fp8", mutates_args=())
def activation_fp8(inputs: torch.Tensor, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The activation in FP8.

    Args:
        inputs: (T, 2 F) where `gated`, else (T, F), in 16 bits and contiguous, F at most MAX_INTERMEDIATE_SIZE.
        gated: whether it is silu(gate) * up, else gelu.

    Returns:
        e4m3 (T, F) and its scales (T, 1) float32.
    """
    output, scale = _empty_activation(inputs, gated)
    T, F = output.shape
    options = {"GATED": gated, "FP8_MAX": FP8_MAX, **_whole_row(F)}
    _activation_fp8_kernel[(T,)](inputs, output, scale, F, **options)
    return output, scale


@activation_fp8.register_fake
def _empty_activation(inputs: torch.Tensor, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    T, size = inputs.shape
    output = inputs.new_empty(T, size // (1 + gated), dtype=torch.float8_e4m3fn)
    return output, inputs.new_empty(T, 1, dtype=torch.float32)


@torch.library.custom_op("chatglm_family::activation_gradient", mutates_args=())
def activation_gradient(gradient: torch.Tensor, inputs: torch.Tensor, gated: bool) -> torch.Tensor:
    """
    The gradient of the inputs in 16 bits.

    Args:
        gradient: (T, F), of the activation, in the dtype of `inputs` and contiguous.
        inputs: (T, 2 F) where `gated`, else (T, F), contiguous.
        gated: as in `activation_fp8`.

    Returns:
        The shape and dtype of `inputs`.
    """
    T, F = gradient.shape
    output = torch.empty_like(inputs)
    grid = (T, triton.cdiv(F, BACKWARD_BLOCK))
    options = {"GATED": gated, "QUANTIZED": False, "FP8_MAX": FP8_MAX, "BLOCK": BACKWARD_BLOCK, "num_warps": 4}
    _gradient_kernel[grid](gradient, inputs, output, output, F, **options)  # no scales
    return output


@activation_gradient.register_fake
def _(gradient, inputs, gated):
    return torch.empty_like(inputs)


@torch.library.custom_op("chatglm_family::activation_gradient_fp8", mutates_args=())
def activation_gradient_fp8(
    gradient: torch.Tensor, inputs: torch.Tensor, gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The gradient of the inputs in FP8; arguments as `activation_gradient`, F at most MAX_INTERMEDIATE_SIZE.

    Returns:
        e4m3 in the shape of `inputs` and its scales (T, 1) float32.
    """
    T, F = gradient.shape
    output, scale = _empty_gradient(gradient, inputs, gated)
    options = {"GATED": gated, "QUANTIZED": True, "FP8_MAX": FP8_MAX, **_whole_row(F)}
    _gradient_kernel[(T, 1)](gradient, inputs, output, scale, F, **options)
    return output, scale


@activation_gradient_fp8.register_fake
def _empty_gradient(gradient, inputs, gated):
    scale = inputs.new_empty(len(inputs), 1, dtype=torch.float32)
    return torch.empty_like(inputs, dtype=torch.float8_e4m3fn), scale
