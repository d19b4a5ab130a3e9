"""
What a decoder block computes between its GEMMs in inference, as Triton kernels: norms, rotation, activation.

Called by fused_blocks.py and its two architectures in utils/inference/engine/models and, for FP8, by
utils/layers/fp8.py. Each kernel takes part in programmatic dependent launch: it lets the next one start, a GEMM that
loads its weight meanwhile, and waits for the one before. torch's compiler makes more kernels of the same, needs half a
minute for them, and starts the next GEMM later.

Rounding is that of the stock layers: a residual sum, a normed value and its product with the weight are each rounded
to 16 bits.

Shapes: T tokens, E hidden size, H query heads, K key/value heads, D head size, F width of the rotary factors,
C = (H + 2 K) D.
"""

import torch
import triton
import triton.language as tl

from utils.kernels.triton_utils import early_launch, launch_next_and_wait

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
HEADS = 4  # of a program that rotates
MAX_ROW = 32768  # elements of a row that one program holds
ACTIVATION_BLOCK = 2048


@triton.jit
def _rms_norm(values, weight_ptr, e, inside, E, eps, dtype: tl.constexpr):
    values = values.to(tl.float32)
    normed = (values * tl.rsqrt(tl.sum(values * values) / E + eps)).to(dtype).to(tl.float32)
    return (normed * tl.load(weight_ptr + e, mask=inside, other=0.0).to(tl.float32)).to(dtype)


@triton.jit
def _store_quantized(output_ptr, scale_ptr, row, values, e, inside, E, FP8_MAX: tl.constexpr):
    values = values.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(values)), 1e-12)
    tl.store(output_ptr + row * E + e, (values * (FP8_MAX / largest)).to(tl.float8e4nv), mask=inside)
    tl.store(scale_ptr + row, largest / FP8_MAX)


@triton.jit
def _add_rms_norm_kernel(
    hidden_ptr,  # (T, E)
    delta_ptr,  # (T, E)
    delta_weight_ptr,  # (E,)
    weight_ptr,  # (E,)
    sum_ptr,  # (T, E)
    output_ptr,  # (T, E)
    scale_ptr,  # (T,) float32
    E,
    eps,
    HAS_DELTA: tl.constexpr,
    NORMS_DELTA: tl.constexpr,
    QUANTIZES: tl.constexpr,
    FP8_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        launch_next_and_wait()
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    inside = e < E
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    hidden = tl.load(hidden_ptr + row * E + e, mask=inside, other=0.0)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + row * E + e, mask=inside, other=0.0)
        if NORMS_DELTA:
            delta = _rms_norm(delta, delta_weight_ptr, e, inside, E, eps, dtype)
        hidden = (hidden.to(tl.float32) + delta.to(tl.float32)).to(dtype)
        tl.store(sum_ptr + row * E + e, hidden, mask=inside)
    normed = _rms_norm(hidden, weight_ptr, e, inside, E, eps, dtype)
    if QUANTIZES:
        _store_quantized(output_ptr, scale_ptr, row, normed, e, inside, E, FP8_MAX)
    else:
        tl.store(output_ptr + row * E + e, normed, mask=inside)


@triton.jit
def _scaled_sum_layer_norm_kernel(
    hidden_ptr,  # (T, E)
    delta_ptr,  # (T, E)
    weight_ptr,  # (E,)
    bias_ptr,  # (E,)
    output_ptr,  # (T, E)
    quantized_ptr,  # (T, E) e4m3
    scale_ptr,  # (T,) float32
    E,
    eps,
    factor,
    HAS_DELTA: tl.constexpr,
    QUANTIZES: tl.constexpr,
    FP8_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        launch_next_and_wait()
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    inside = e < E
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    hidden = tl.load(hidden_ptr + row * E + e, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + row * E + e, mask=inside, other=0.0).to(tl.float32)
        hidden = ((hidden * factor).to(dtype).to(tl.float32) + delta).to(dtype).to(tl.float32)
    centred = tl.where(inside, hidden - tl.sum(hidden) / E, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / E + eps)
    weight = tl.load(weight_ptr + e, mask=inside, other=0.0).to(tl.float32)
    normed = (normed * weight + tl.load(bias_ptr + e, mask=inside, other=0.0).to(tl.float32)).to(dtype)
    tl.store(output_ptr + row * E + e, normed, mask=inside)
    if QUANTIZES:
        _store_quantized(quantized_ptr, scale_ptr, row, normed, e, inside, E, FP8_MAX)


@triton.jit
def _quantize_kernel(
    values_ptr,  # (T, E)
    output_ptr,  # (T, E) e4m3
    scale_ptr,  # (T,) float32
    E,
    FP8_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        launch_next_and_wait()
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    values = tl.load(values_ptr + row * E + e, mask=e < E, other=0.0)
    _store_quantized(output_ptr, scale_ptr, row, values, e, e < E, E, FP8_MAX)


@triton.jit
def _activated(inputs_ptr, row, e, inside, E, GATED: tl.constexpr):
    """silu(gate) * up, or gelu by tanh: (1 + tanh(u)) / 2 = sigmoid(2 u), 2 u = 1.596 (x + 0.044715 x^3)."""
    inputs = inputs_ptr + row * E * (1 + GATED) + e
    x = tl.load(inputs, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        return x * tl.sigmoid(x) * tl.load(inputs + E, mask=inside, other=0.0).to(tl.float32)
    return x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))


@triton.jit
def _activate_kernel(
    inputs_ptr,  # (T, 2 E), gate and up, or (T, E)
    output_ptr,  # (T, E)
    E,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        launch_next_and_wait()
    row = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    activated = _activated(inputs_ptr, row, e, e < E, E, GATED)
    tl.store(output_ptr + row * E + e, activated.to(output_ptr.dtype.element_ty), mask=e < E)


@triton.jit
def _activate_and_quantize_kernel(
    inputs_ptr,  # (T, 2 E), gate and up, or (T, E)
    output_ptr,  # (T, E) e4m3
    scale_ptr,  # (T,) float32
    E,
    GATED: tl.constexpr,
    FP8_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        launch_next_and_wait()
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    activated = _activated(inputs_ptr, row, e, e < E, E, GATED).to(inputs_ptr.dtype.element_ty)
    _store_quantized(output_ptr, scale_ptr, row, activated, e, e < E, E, FP8_MAX)


@triton.jit
def _rotate_kernel(
    qkv_ptr,  # (T, C)
    cos_ptr,  # (positions, WIDTH)
    sin_ptr,  # (positions, WIDTH)
    position_ptr,  # (T, coordinates) int64
    token_stride,  # of positions
    coordinate_stride,
    page_ptr,  # (T,) int64, or the page table (T, P) int32 where BY_TABLE
    index_ptr,  # (T,) int64, place in the page, or the number of the token in its sequence where BY_TABLE
    query_ptr,  # (T, H, D)
    keys_ptr,  # (pages, K, PAGE, D)
    values_ptr,  # (pages, K, PAGE, D)
    P,
    H,
    K,
    WIDTH: tl.constexpr,
    TWO_COORDINATES: tl.constexpr,  # ChatGLM-6B's layout and pairs, else GLM's
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BY_TABLE: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        launch_next_and_wait()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]  # query heads, key heads, value heads
    d = tl.arange(0, D)[None, :]
    inside = (head < H + 2 * K) & (d < D)
    if TWO_COORDINATES:  # query, key and value of each head lie together
        source = head % H * 3 + head // H
        pair: tl.constexpr = D // 4
        coordinate, angle, rotates = d // (D // 2), d % (D // 4), head < H + K
    else:
        source = head
        pair: tl.constexpr = 1
        coordinate, angle, rotates = d * 0, d // 2, (head < H + K) & (d < WIDTH)
    start = qkv_ptr + token * (H + 2 * K) * D + source * D
    states = tl.load(start + d, mask=inside, other=0.0).to(tl.float32)
    partners = tl.load(start + (d ^ pair), mask=inside, other=0.0).to(tl.float32)
    position = tl.load(position_ptr + token * token_stride + coordinate * coordinate_stride)
    factor = position * WIDTH + angle + head * 0
    cos = tl.load(cos_ptr + factor, mask=rotates, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + factor, mask=rotates, other=0.0).to(tl.float32)
    rotated = states * cos + tl.where((d & pair) == 0, -partners, partners) * sin
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    tl.store(query_ptr + (token * H + head) * D + d, rotated.to(dtype), mask=inside & (head < H))
    index = tl.load(index_ptr + token)
    if BY_TABLE:
        page = tl.load(page_ptr + token * P + index // PAGE).to(tl.int64)
        index = index % PAGE
    else:
        page = tl.load(page_ptr + token)
    is_key, is_value = (head >= H) & (head < H + K), inside & (head >= H + K)
    place = (page * K + tl.where(is_key, head - H, head - H - K)) * PAGE * D + index * D + d
    tl.store(keys_ptr + place, rotated.to(dtype), mask=is_key & (d < D))
    tl.store(values_ptr + place, rotated.to(dtype), mask=is_value)


def _whole_row(size: int) -> dict[str, int]:
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 4), 16)}


def supports_row(size: int) -> bool:
    """Whether a program can hold a row of `size` elements."""
    return size <= MAX_ROW


def add_rms_norm(
    hidden: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    delta_weight: torch.Tensor | None = None,
    quantizes: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    Return hidden + delta, its RMS norm (arXiv:1910.07467), and the scale (T, 1) float32 of each row of the norm.

    Args:
        hidden: (..., E) in 16 bits, contiguous.
        delta: as `hidden`; None adds nothing, and `hidden` itself is returned.
        weight: (E,) of the norm.
        delta_weight: (E,) of a norm of `delta` before the sum, as GLM-4-0414 has it.
        quantizes: whether the norm is in e4m3; else it has no scale.
    """
    E = hidden.shape[-1]
    T = hidden.numel() // E
    added = hidden if delta is None else torch.empty_like(hidden)
    output = torch.empty_like(hidden, dtype=torch.float8_e4m3fn if quantizes else hidden.dtype)
    scale = hidden.new_empty(T, 1, dtype=torch.float32) if quantizes else None
    _add_rms_norm_kernel[(T,)](
        hidden,
        hidden if delta is None else delta,
        weight if delta_weight is None else delta_weight,
        weight,
        added,
        output,
        output if scale is None else scale,
        E,
        eps,
        HAS_DELTA=delta is not None,
        NORMS_DELTA=delta_weight is not None,
        QUANTIZES=quantizes,
        FP8_MAX=FP8_MAX,
        **_whole_row(E),
        **early_launch(hidden.device),
    )
    return added, output, scale


def scaled_sum_layer_norm(
    hidden: torch.Tensor,
    delta: torch.Tensor | None,
    factor: float,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    quantizes: bool = False,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """
    Return the layer norm (arXiv:1607.06450) of hidden * factor + delta, or of `hidden`.

    Args:
        hidden: (..., E) in 16 bits, contiguous.
        delta: as `hidden`, or None.
        weight: (E,) of the norm, as `bias`.
        quantizes: whether the norm is also returned in e4m3, with the scale (T, 1) float32 of each row.
    """
    E = hidden.shape[-1]
    T = hidden.numel() // E
    output, quantized = torch.empty_like(hidden), None
    if quantizes:
        e4m3, scale = torch.empty_like(hidden, dtype=torch.float8_e4m3fn), hidden.new_empty(T, 1, dtype=torch.float32)
        quantized = e4m3, scale
    _scaled_sum_layer_norm_kernel[(T,)](
        hidden,
        hidden if delta is None else delta,
        weight,
        bias,
        output,
        *(quantized or (output, output)),
        E,
        eps,
        factor,
        HAS_DELTA=delta is not None,
        QUANTIZES=quantizes,
        FP8_MAX=FP8_MAX,
        **_whole_row(E),
        **early_launch(hidden.device),
    )
    return output, quantized


def quantize(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, E) in 16 bits, contiguous -> e4m3 and scales (T, 1) float32: each row's largest magnitude becomes 448."""
    T, E = values.shape
    output, scale = torch.empty_like(values, dtype=torch.float8_e4m3fn), values.new_empty(T, 1, dtype=torch.float32)
    _quantize_kernel[(T,)](values, output, scale, E, FP8_MAX=FP8_MAX, **_whole_row(E), **early_launch(values.device))
    return output, scale


def activate(inputs: torch.Tensor, gated: bool) -> torch.Tensor:
    """
    Return what an MLP computes between its GEMMs, (..., E), of inputs in 16 bits, contiguous.

    Gated, silu(gate) * up of gate and up (..., 2 E) (arXiv:2002.05202); else gelu by tanh (arXiv:1606.08415).
    """
    size = inputs.shape[-1] // (1 + gated)
    output = inputs.new_empty(*inputs.shape[:-1], size)
    _activate_kernel[(output.numel() // size, triton.cdiv(size, ACTIVATION_BLOCK))](
        inputs, output, size, GATED=gated, BLOCK=ACTIVATION_BLOCK, num_warps=8, **early_launch(inputs.device)
    )
    return output


def activate_and_quantize(inputs: torch.Tensor, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `activate` and then `quantize` in one pass: e4m3 (..., E) and scales (T, 1) float32."""
    size = inputs.shape[-1] // (1 + gated)
    output = inputs.new_empty(*inputs.shape[:-1], size, dtype=torch.float8_e4m3fn)
    T = output.numel() // size
    scale = inputs.new_empty(T, 1, dtype=torch.float32)
    _activate_and_quantize_kernel[(T,)](
        inputs, output, scale, size, GATED=gated, FP8_MAX=FP8_MAX, **_whole_row(size), **early_launch(inputs.device)
    )
    return output, scale


def rotate(
    qkv: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor],
    position_ids: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    pages: torch.Tensor,
    index: torch.Tensor,
) -> torch.Tensor:
    """
    Rotate query and key, and write key and value into the KV cache; return the query.

    With one coordinate, as GLM applies RoPE (arXiv:2104.09864), neighbouring elements of a head turn together, the
    first F of it; qkv has query heads, key heads, value heads. With two, as ChatGLM-6B does, each turns one half of a
    head, whose elements i and i + D / 4 go together; qkv has query, key and value of one head after another.

    Args:
        qkv: (T, C) in 16 bits, contiguous.
        factors: cos and sin of every position, (positions, F), of which GLM uses the first half; for ChatGLM-6B F is
            D / 4.
        position_ids: (T, 1) or (T, 2) int64, with any strides.
        caches: keys and values (pages, K, page size, D).
        pages: (T,) int64, the page of each token; or (T, P) int32, the page table of its sequence.
        index: (T,) int64, its place in the page; or, with a page table, its number in its sequence.

    Returns:
        (T, H, D).
    """
    keys, values = caches
    T, K, D = len(qkv), keys.shape[1], keys.shape[3]
    H = qkv.shape[1] // D - 2 * K
    query = qkv.new_empty(T, H, D)
    _rotate_kernel[(T, triton.cdiv(H + 2 * K, HEADS))](
        qkv,
        *factors,
        position_ids,
        *position_ids.stride(),
        pages,
        index,
        query,
        keys,
        values,
        pages.shape[-1],
        H,
        K,
        WIDTH=factors[0].shape[1],
        TWO_COORDINATES=position_ids.shape[1] == 2,
        D=D,
        PAGE=keys.shape[2],
        BY_TABLE=pages.ndim == 2,
        HEADS=HEADS,
        num_warps=4,
        **early_launch(qkv.device),
    )
    return query
