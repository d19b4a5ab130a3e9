"""The operators of utils/kernels by torch, for tests of the layers that call them (tests/kernels: the kernels)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from utils.layers.fp8 import quantize_rows
from utils.layers.fused_qkv import apply_rotary_interleaved
from utils.models.modeling_chatglm import rotate_half_2d


def activate(inputs: torch.Tensor, gated: bool) -> torch.Tensor:
    """(T, 2 F) or (T, F) -> (T, F)."""
    if not gated:
        return nn.functional.gelu(inputs, approximate="tanh")
    gate, up = inputs.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def activation_gradient(gradient: torch.Tensor, inputs: torch.Tensor, gated: bool) -> torch.Tensor:
    """The gradient of `activate`, float32."""
    gradient, inputs = gradient.float(), inputs.float()
    if not gated:
        return torch.ops.aten.gelu_backward(gradient, inputs, approximate="tanh")
    gate, up = inputs.chunk(2, dim=-1)
    share = gate.sigmoid()
    return torch.cat([gradient * up * share * (1 + gate * (1 - share)), gradient * gate * share], dim=-1)


def rotate(query, key, cos, sin, interleaved):
    """(T, H, D) and (T, K, D), rotated."""
    if interleaved:
        query, key = (heads.transpose(0, 1)[None] for heads in (query, key))  # (1, H, T, D)
        return (heads[0].transpose(0, 1) for heads in apply_rotary_interleaved(query, key, cos[None], sin[None]))
    return (heads * cos[:, None] + rotate_half_2d(heads) * sin[:, None] for heads in (query, key))


def qkv_rope_lora(qkv, lora_hidden, B, cos, sin, head_counts, interleaved):
    H, K = head_counts
    heads = (qkv + lora_hidden @ B.t()).unflatten(1, (H + 2 * K, -1))
    query, key, value = heads.split((H, K, K), dim=1) if interleaved else heads.unflatten(1, (H, 3)).unbind(2)
    return *(heads.contiguous() for heads in rotate(query, key, cos, sin, interleaved)), value.clone()


def qkv_rope_lora_backward(query, key, value, cos, sin, interleaved):
    heads = (*rotate(query, key, cos, -sin, interleaved), value)
    return (torch.cat(heads, dim=1) if interleaved else torch.stack(heads, dim=2)).flatten(1)


def skinny_gemm(x, weight, bias, gated=False):
    output = nn.functional.linear(x, weight, bias)
    return activate(output, gated=True) if gated else output


OPERATORS: dict[str, Callable] = {
    "activation_fp8(Tensor inputs, bool gated) -> (Tensor, Tensor)": lambda inputs, gated: quantize_rows(
        activate(inputs.float(), gated)
    ),
    "activation_gradient(Tensor gradient, Tensor inputs, bool gated) -> Tensor": lambda gradient, inputs, gated: (
        activation_gradient(gradient, inputs, gated).to(gradient.dtype)
    ),
    "activation_gradient_fp8(Tensor gradient, Tensor inputs, bool gated) -> (Tensor, Tensor)": (
        lambda gradient, inputs, gated: quantize_rows(activation_gradient(gradient, inputs, gated))
    ),
    "qkv_rope_lora(Tensor heads, Tensor hidden, Tensor B, Tensor cos, Tensor sin, int[] counts, bool interleaved)"
    " -> (Tensor, Tensor, Tensor)": qkv_rope_lora,
    "qkv_rope_lora_backward(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, bool interleaved)"
    " -> Tensor": qkv_rope_lora_backward,
    "skinny_gemm(Tensor x, Tensor weight, Tensor? bias, bool gated=False) -> Tensor": skinny_gemm,
}


@contextmanager
def reference_ops() -> Iterator[None]:
    """Define the operators by torch; those that a kernel's module defined already, on the CPU alone."""
    with (
        torch.library._scoped_library("chatglm_family", "FRAGMENT") as definitions,
        torch.library._scoped_library("chatglm_family", "IMPL") as overrides,
    ):
        for schema, function in OPERATORS.items():
            name = schema.partition("(")[0]
            if hasattr(torch.ops.chatglm_family, name):
                overrides.impl(name, function, "CPU")
            else:
                definitions.define(schema)
                definitions.impl(name, function, "CompositeExplicitAutograd")
        yield
