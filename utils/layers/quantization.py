"""
INT8 and INT4 weights in the form that the family's quantised checkpoints are released in (`quantization_bit`).

A weight is int8 (out, in), or for 4 bits int8 (out, in / 2) with two columns a byte, the even one in the high nibble;
both nibbles are signed. Each output row has one float16 scale and no zero point. Source: `quantization.py` of
THUDM/chatglm-6b-int4 and chatglm2-6b-int4.

The released code has two roundings: its GPU kernels round integer times scale to float16, its CPU kernels do not.
Everything here computes what the GPU kernels do.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import nn

from utils.common.errors import UsageError
from utils.common.processes import print_once

BITS = {"int8": 8, "int4": 4}  # what --quantize takes
WEIGHT, SCALE = "weight", "weight_scale"
SIXTEEN_BITS = torch.float16, torch.bfloat16
KERNELS = os.environ.get("CHATGLM_KERNELS")  # triton, cpm_kernels or torch; without it the first of them that runs
TRITON_CAPABILITY = (7, 5)  # the oldest GPUs that Triton compiles for
FEW_ROWS = 64  # up to here a product is bound by reading the weight, and the integers are read once


def stored_bits(quantize: str | None) -> str | None:
    """What of --quantize concerns how weights are read: the integers. FP8 is made of a model (utils/layers/fp8.py)."""
    return quantize if quantize in BITS else None


@dataclass(frozen=True)
class Quantization:
    """How a model's weights are stored."""

    bits: int
    embeddings: bool = False  # the word embeddings and the head too

    @classmethod
    def of(cls, released: dict[str, Any]) -> "Quantization | None":
        """
        What a released `config.json` says.

        Raises:
            ValueError: a number of bits other than 4 and 8.
        """
        bits = released.get("quantization_bit")
        if not bits:
            return None
        if bits not in BITS.values():
            raise ValueError(f"quantization_bit is {bits}, not 4 or 8")
        return cls(bits, bool(released.get("quantization_embeddings")))


def stored_columns(columns: int, bits: int) -> int:
    """
    Bytes of a row.

    Raises:
        UsageError: an odd number of columns does not pack into 4 bits.
    """
    if bits == 8:
        return columns
    if columns % 2:
        raise UsageError(f"int4 packs two columns a byte, and a weight has {columns}: use --quantize int8")
    return columns // 2


def quantize(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    (out, in) floating point -> int8 (out, in) or (out, in / 2), and its float16 scales (out,).

    The scale is max |w| of the row over 127 or 7, and a weight the nearest multiple of it, half to even, both in
    float16 as the released code has them.
    """
    weight = weight.half()
    stored_columns(weight.shape[1], bits)
    scale = (weight.abs().amax(dim=-1).float() / (2 ** (bits - 1) - 1)).half()  # (out,)
    divisor = torch.where(scale == 0, 1, scale)[:, None]
    integers = (weight / divisor).round().to(torch.int8)
    if bits == 4:
        integers = (integers[:, 0::2] << 4) | (integers[:, 1::2] & 15)
    return integers, scale


def dequantize(weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `quantize`: (out, in) in `dtype`, each product rounded to float16 on the way."""
    if bits == 4:
        weight = torch.stack((weight >> 4, (weight << 4) >> 4), dim=-1).flatten(-2)  # signed shifts
    return (weight.half() * scale[:, None]).to(dtype)


def _may_run(kernels: str) -> bool:
    """Whether a GPU is there, and the environment does not ask for others."""
    if KERNELS not in (None, "triton", "cpm_kernels", "torch"):
        raise UsageError(f"CHATGLM_KERNELS={KERNELS}: give triton, cpm_kernels or torch")
    return torch.cuda.is_available() and KERNELS in (None, kernels)


@cache
def _triton_kernels() -> ModuleType | None:
    """Triton's, where it is installed and knows the GPU."""
    if not _may_run("triton") or torch.cuda.get_device_capability() < TRITON_CAPABILITY:
        return None
    try:
        from utils.kernels import int_weight_gemm
    except ImportError:
        return None
    return int_weight_gemm


@cache
def _cpm_kernels() -> ModuleType | None:
    """The one that cpm_kernels compiles, where Triton's do not run and it computes what torch's operations do."""
    if _triton_kernels() or not _may_run("cpm_kernels"):
        return None
    try:
        from utils.kernels import nvrtc_dequantize

        weight = torch.arange(-128, 128, dtype=torch.int8, device="cuda")[None]
        case = weight, weight.new_full((1,), 0.1, dtype=torch.float16), 4, torch.float16
        if not torch.equal(nvrtc_dequantize.dequantize_with_nvrtc(*case), dequantize(*case)):
            raise RuntimeError("its kernel computes other values")
    except Exception as error:  # of a package that raises what ctypes, pkg_resources and three CUDA libraries do
        reason = str(error).partition("\n")[0]
        print_once(f"weights are dequantised by torch operations: cpm_kernels does not run here ({reason})")
        return None
    return nvrtc_dequantize


def _triton_fits(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype in SIXTEEN_BITS and _triton_kernels() is not None


def _weight_for(hidden_states: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The weight in the dtype of `hidden_states`; compiled code makes one kernel of the operations by itself."""
    one_pass = dequantize
    if hidden_states.is_cuda and not torch.compiler.is_compiling():
        if _triton_fits(hidden_states):
            one_pass = _triton_kernels().dequantize_with_triton
        elif _cpm_kernels():
            one_pass = _cpm_kernels().dequantize_with_nvrtc
    return one_pass(weight, scale, bits, hidden_states.dtype)


class _QuantizedLinearFunction(torch.autograd.Function):
    """A product whose backward pass dequantises again, so that no full weight is kept between the two."""

    @staticmethod
    def forward(ctx, hidden_states, weight, scale, bits):
        ctx.save_for_backward(weight, scale)
        ctx.bits = bits
        return nn.functional.linear(hidden_states, _weight_for(hidden_states, weight, scale, bits))

    @staticmethod
    def backward(ctx, grad_output):
        weight, scale = ctx.saved_tensors
        return grad_output @ _weight_for(grad_output, weight, scale, ctx.bits), None, None, None


class _ScaledRows(nn.Module):
    """What both quantised modules share: frozen integers, and scales that stay float16 whatever the model becomes."""

    def quantize_storage(self, bits: int, rows: int, columns: int) -> None:
        self.bits = bits
        integers = torch.empty(rows, stored_columns(columns, bits), dtype=torch.int8)
        self.weight = nn.Parameter(integers, requires_grad=False)
        self.register_buffer(SCALE, torch.empty(rows, dtype=torch.float16))

    def _apply(self, fn, recurse=True):
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self


class QuantizedLinear(_ScaledRows, nn.Linear):
    """`nn.Linear` over a quantised, frozen weight; the bias is in full precision."""

    def __init__(self, linear: nn.Linear, bits: int):
        nn.Linear.__init__(self, linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.bias = linear.bias
        self.quantize_storage(bits, linear.out_features, linear.in_features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
        few = hidden_states.numel() <= FEW_ROWS * self.in_features and not hidden_states.requires_grad
        if few and _triton_fits(hidden_states):
            rows = hidden_states.reshape(-1, self.in_features)
            output = _triton_kernels().int_weight_gemm(rows, self.weight, self.weight_scale, self.bits)
            output = output.view(*hidden_states.shape[:-1], self.out_features)
        else:
            output = _QuantizedLinearFunction.apply(hidden_states, self.weight, self.weight_scale, self.bits)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class QuantizedEmbedding(_ScaledRows, nn.Embedding):
    """`nn.Embedding` over quantised rows; its output has the dtype that the embedding had."""

    def __init__(self, embedding: nn.Embedding, bits: int):
        nn.Embedding.__init__(self, embedding.num_embeddings, embedding.embedding_dim, device="meta")
        self.register_buffer("output_like", torch.empty(0, dtype=embedding.weight.dtype), persistent=False)
        self.quantize_storage(bits, embedding.num_embeddings, embedding.embedding_dim)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        rows, scale = self.weight[input_ids].flatten(0, -2), self.weight_scale[input_ids].flatten()
        return dequantize(rows, scale, self.bits, self.output_like.dtype).view(*input_ids.shape, -1)


def quantize_modules(model: nn.Module, quantization: Quantization, names: Iterable[str]) -> None:
    """
    Replaces the linear layers whose last name is among `names`, and with `quantization.embeddings` the embeddings and
    the head, by quantised ones without values.
    """
    names = set(names)
    ends = {model.get_input_embeddings(), model.get_output_embeddings()} if quantization.embeddings else set()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Embedding) and child in ends:
                setattr(parent, name, QuantizedEmbedding(child, quantization.bits))
            elif isinstance(child, nn.Linear) and (name in names or child in ends):
                setattr(parent, name, QuantizedLinear(child, quantization.bits))


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, _ScaledRows) for module in model.modules())
