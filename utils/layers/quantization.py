"""
INT8 and INT4 weights in the form of the family's quantised checkpoints (`quantization_bit`).

In: full weights, or integers from a checkpoint. Out: linear layers and embeddings over frozen integers. Called by
utils/checkpoint/model.py. No library reads this form: a weight is int8 (out, in), or for 4 bits int8 (out, in / 2)
with two signed values a byte, the even one in the high nibble; each output row has one float16 scale and no zero
point. Source: `quantization.py` of THUDM/chatglm-6b-int4 and chatglm2-6b-int4. The released GPU kernels round integer
times scale to float16, the CPU kernels do not; everything here computes what the GPU kernels do, but for the GEMM of
few rows, which does not round there.

Three implementations dequantise: Triton's kernels on GPUs that Triton compiles for; else CUDA C compiled through
cpm_kernels, the package that the released code uses (its own binaries have none for Hopper); else torch operations,
also under torch.compile, which fuses them. The GEMM is an autograd function that dequantises again in the backward
pass: saved, the weights of all layers would be in memory at once. Quantised weights are not sharded: input values are
packed in pairs, and a row's scale covers all of its values.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import nn

from utils.common.console import print_line
from utils.common.errors import UsageError
from utils.kernels import load_int_weight_gemm
from utils.layers.replace import replace_layers, share_state

BITS = {"int8": 8, "int4": 4}  # values of --quantize
WEIGHT, SCALE = "weight", "weight_scale"  # names in released checkpoints
SIXTEEN_BITS = torch.float16, torch.bfloat16
IMPLEMENTATIONS = ("triton", "cpm_kernels", "torch")  # the first that runs is used
REQUESTED = os.environ.get("CHATGLM_KERNELS")  # one of them, to use no other


def stored_bits(quantize: str | None) -> str | None:
    """Return `quantize` if weights are loaded as integers; FP8 converts a loaded model (utils/layers/fp8.py)."""
    return quantize if quantize in BITS else None


@dataclass(frozen=True)
class Quantization:
    """How a model's weights are stored."""

    bits: int
    embeddings: bool = False  # whether the word embeddings and the head are quantised too

    @classmethod
    def of(cls, released: dict[str, Any]) -> "Quantization | None":
        """
        Return what a released `config.json` says, or None.

        Raises:
            ValueError: `quantization_bit` is neither 4 nor 8.
        """
        bits = released.get("quantization_bit")
        if not bits:
            return None
        if bits not in BITS.values():
            raise ValueError(f"quantization_bit is {bits}, not 4 or 8")
        return cls(bits, bool(released.get("quantization_embeddings")))


def bytes_per_row(in_features: int, bits: int) -> int:
    """
    Return how many bytes hold a row of `in_features` values.

    Raises:
        UsageError: an odd number of values does not pack into 4 bits.
    """
    if bits == 8:
        return in_features
    if in_features % 2:
        raise UsageError(f"int4 packs two values a byte, but a weight has {in_features} a row: use --quantize int8")
    return in_features // 2


def quantize(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    (out, in) floating point -> int8 (out, in) or (out, in / 2), and its float16 scales (out,).

    The scale is max |w| of the row over 127 or 7. A weight becomes the nearest multiple of it, half to even. Both are
    computed in float16, as in the released code.
    """
    weight = weight.half()
    bytes_per_row(weight.shape[1], bits)
    scale = (weight.abs().amax(dim=-1).float() / (2 ** (bits - 1) - 1)).half()  # (out,)
    divisor = torch.where(scale == 0, 1, scale)[:, None]
    integers = (weight / divisor).round().to(torch.int8)
    if bits == 4:
        integers = (integers[:, 0::2] << 4) | (integers[:, 1::2] & 15)
    return integers, scale


def dequantize(weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Invert `quantize`: (out, in) in `dtype`, with integer times scale rounded to float16 before."""
    if bits == 4:
        weight = torch.stack((weight >> 4, (weight << 4) >> 4), dim=-1).flatten(-2)  # signed shifts
    return (weight.half() * scale[:, None]).to(dtype)


def _is_allowed(implementation: str) -> bool:
    """
    Whether CHATGLM_KERNELS does not request another implementation.

    Raises:
        UsageError: CHATGLM_KERNELS names none.
    """
    if REQUESTED not in (None, *IMPLEMENTATIONS):
        raise UsageError(f"CHATGLM_KERNELS={REQUESTED}: give triton, cpm_kernels or torch")
    return REQUESTED in (None, implementation)


@cache
def load_triton_kernels() -> ModuleType | None:
    """Return utils/kernels/int_weight_gemm.py, or None where it cannot run."""
    return load_int_weight_gemm() if _is_allowed("triton") else None


@cache
def load_nvrtc_kernel() -> ModuleType | None:
    """
    Return utils/kernels/nvrtc_dequantize.py, or None.

    It is used where Triton's kernels do not run, and only if it computes here what torch's operations do: cpm_kernels
    finds the CUDA libraries by itself, and may find others than torch's.
    """
    if load_triton_kernels() or not _is_allowed("cpm_kernels") or not torch.cuda.is_available():
        return None
    try:
        from utils.kernels import nvrtc_dequantize

        weight = torch.arange(-128, 128, dtype=torch.int8, device="cuda")[None]
        scale = weight.new_full((1,), 0.1, dtype=torch.float16)
        actual = nvrtc_dequantize.dequantize_with_nvrtc(weight, scale, 4, torch.float16)
        if not torch.equal(actual, dequantize(weight, scale, 4, torch.float16)):
            raise RuntimeError("its kernel computes other values")
    # No package or pkg_resources; no such library, or not for this machine; a symbol that a library lacks; a call that
    # CUDA or NVRTC refuses.
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        print_line(f"weights are dequantised by torch operations: cpm_kernels does not run here ({reason})")
        return None
    return nvrtc_dequantize


def _triton_supports(tensor: torch.Tensor) -> bool:
    is_where_triton_runs = tensor.is_cuda or not torch.cuda.is_available()  # by its interpreter
    return is_where_triton_runs and tensor.dtype in SIXTEEN_BITS and load_triton_kernels() is not None


def _dequantize_for(hidden_states: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the weight in the dtype of `hidden_states`; torch.compile fuses the operations by itself."""
    implementation = dequantize
    if not torch.compiler.is_compiling():
        if _triton_supports(hidden_states):
            implementation = load_triton_kernels().dequantize_with_triton
        elif hidden_states.is_cuda and load_nvrtc_kernel():
            implementation = load_nvrtc_kernel().dequantize_with_nvrtc
    return implementation(weight, scale, bits, hidden_states.dtype)


class _QuantizedMatmul(torch.autograd.Function):
    """A GEMM whose backward pass dequantises again, so that no full weight is kept between the two."""

    @staticmethod
    def forward(ctx, hidden_states, weight, scale, bits):
        ctx.save_for_backward(weight, scale)
        ctx.bits = bits
        return nn.functional.linear(hidden_states, _dequantize_for(hidden_states, weight, scale, bits))

    @staticmethod
    def backward(ctx, grad_output):
        weight, scale = ctx.saved_tensors
        return grad_output @ _dequantize_for(grad_output, weight, scale, ctx.bits), None, None, None


class _QuantizedRows(nn.Module):
    """
    Base of both quantised modules: a frozen int8 `weight` and a float16 `weight_scale` for each row.

    The scale stays float16 whatever dtype the model is cast to: bfloat16 would lose three of its bits.
    """

    def allocate_integers(self, bits: int, rows: int, values_per_row: int) -> None:
        """Register weight and scale without values."""
        self.bits = bits
        integers = torch.empty(rows, bytes_per_row(values_per_row, bits), dtype=torch.int8)
        self.weight = nn.Parameter(integers, requires_grad=False)
        self.register_buffer(SCALE, torch.empty(rows, dtype=torch.float16))

    def _apply(self, fn, recurse=True):
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self


class QuantizedLinear(_QuantizedRows, nn.Linear):
    """`nn.Linear` over a quantised, frozen weight; the bias keeps its dtype."""

    def __init__(self, linear: nn.Linear, bits: int):
        nn.Linear.__init__(self, linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.bias = linear.bias
        self.allocate_integers(bits, linear.out_features, linear.in_features)

    @classmethod
    def concatenate(cls, layers: Sequence["QuantizedLinear"]) -> "QuantizedLinear":
        """Return a layer whose output is the outputs of `layers`, which share an input and `bits`, concatenated."""
        fused = share_state(layers[0], cls)
        fused.out_features = sum(layer.out_features for layer in layers)
        for tensors in (fused._parameters, fused._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    values = torch.cat([getattr(layer, name).detach() for layer in layers])
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(values, requires_grad=False) if is_parameter else values
        return fused

    @property
    def is_skinny(self) -> bool:
        """Whether `skinny_matmul` may be called on hidden states in 16 bits."""
        return _triton_supports(self.weight_scale)

    @property
    def max_skinny_rows(self) -> int:
        """Tokens up to which `skinny_matmul` may be called."""
        return load_triton_kernels().MAX_ROWS

    def skinny_matmul(self, hidden_states: torch.Tensor, gated: bool = False) -> torch.Tensor:
        """(..., in) of at most `max_skinny_rows` tokens -> (..., out), or (..., out / 2) gated by silu."""
        output = torch.ops.chatglm_family.int_weight_gemm(
            hidden_states.reshape(-1, self.in_features),
            self.weight,
            self.weight_scale,
            None if self.bias is None else self.bias.to(hidden_states.dtype),
            self.bits,
            gated,
        )
        return output.view(*hidden_states.shape[:-1], -1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
        can_multiply_integers = _triton_supports(hidden_states) and not hidden_states.requires_grad
        if can_multiply_integers and hidden_states.shape[:-1].numel() <= self.max_skinny_rows:
            return self.skinny_matmul(hidden_states)
        output = _QuantizedMatmul.apply(hidden_states, self.weight, self.weight_scale, self.bits)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class QuantizedEmbedding(_QuantizedRows, nn.Embedding):
    """`nn.Embedding` over quantised rows; its output has the dtype that the full embedding had."""

    def __init__(self, embedding: nn.Embedding, bits: int):
        nn.Embedding.__init__(self, embedding.num_embeddings, embedding.embedding_dim, device="meta")
        self.register_buffer("output_like", torch.empty(0, dtype=embedding.weight.dtype), persistent=False)
        self.allocate_integers(bits, embedding.num_embeddings, embedding.embedding_dim)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(...) int64 -> (..., embedding)."""
        rows, scale = self.weight[input_ids].flatten(0, -2), self.weight_scale[input_ids].flatten()
        return dequantize(rows, scale, self.bits, self.output_like.dtype).view(*input_ids.shape, -1)


def quantize_modules(model: nn.Module, quantization: Quantization, names: Iterable[str]) -> None:
    """
    Replace linear layers by quantised ones without values, in place.

    Args:
        quantization: with `embeddings`, the word embeddings and the head are replaced too.
        names: last parts of the layers' paths, such as `dense`.
    """
    names = set(names)
    ends = {model.get_input_embeddings(), model.get_output_embeddings()} if quantization.embeddings else set()

    def build(path: str, layer: nn.Module) -> nn.Module | None:
        if isinstance(layer, nn.Embedding) and layer in ends:
            return QuantizedEmbedding(layer, quantization.bits)
        if isinstance(layer, nn.Linear) and (path.rpartition(".")[2] in names or layer in ends):
            return QuantizedLinear(layer, quantization.bits)
        return None

    replace_layers(model, build)


def quantize_linear(model: nn.Module, bits: int, names: Iterable[str]) -> None:
    """Replace plain linear layers whose paths end in `names` by quantised ones with their weights, in place."""
    names = set(names)

    def build(path: str, linear: nn.Module) -> nn.Module | None:
        if type(linear) is not nn.Linear or path.rpartition(".")[2] not in names:
            return None
        quantized = QuantizedLinear(linear, bits)
        quantized.weight.data, quantized.weight_scale = quantize(linear.weight.detach(), bits)
        return quantized

    replace_layers(model, build)


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight of `model` is stored as integers."""
    return any(isinstance(module, _QuantizedRows) for module in model.modules())
