"""The kernels between the GEMMs of a block, beside transformers' layers and torch in float32."""

import pytest
import torch
from kernel_checks import DEVICE, DTYPE, FP8_ROUNDING, ROUNDING, activate, assert_close, random
from transformers.models.glm.modeling_glm import GlmRMSNorm, apply_rotary_pos_emb

from utils.kernels.inference_block import add_rms_norm, quantize, rotate, swiglu, swiglu_quantized

EPS = 1e-5


def stock_norm(weight: torch.Tensor) -> GlmRMSNorm:
    norm = GlmRMSNorm(len(weight), EPS).to(DEVICE, DTYPE)
    norm.weight.data = weight
    return norm


@pytest.mark.parametrize("E", [256, 200])
@pytest.mark.parametrize("kind", ["no delta", "delta", "normed delta"])
@pytest.mark.parametrize("quantizes", [False, True])
def test_add_rms_norm(E, kind, quantizes):
    hidden, delta, weight, delta_weight = random(3, 1, E), random(3, 1, E), random(E), random(E)
    expected = hidden
    if kind != "no delta":
        expected = hidden + (stock_norm(delta_weight)(delta) if kind == "normed delta" else delta)
    added, normed, scale = add_rms_norm(
        hidden,
        None if kind == "no delta" else delta,
        weight,
        EPS,
        delta_weight if kind == "normed delta" else None,
        quantizes,
    )
    assert_close(added, expected.float(), ROUNDING)
    if quantizes:
        assert normed.dtype == torch.float8_e4m3fn
        normed = normed.float() * scale[..., None]
    assert_close(normed, stock_norm(weight)(expected).float(), FP8_ROUNDING if quantizes else ROUNDING)


def test_quantize():
    values = random(5, 200)
    values[2] = 0
    quantized, scale = quantize(values)
    assert scale.shape == (5, 1)
    assert_close(quantized.float() * scale, values.float(), FP8_ROUNDING)
    assert not quantized[2].float().any()


def test_swiglu():
    inputs = random(3, 1, 2 * 2100)
    expected = activate(inputs.float(), gated=True)
    assert_close(swiglu(inputs), expected, ROUNDING)
    quantized, scale = swiglu_quantized(inputs)
    assert scale.shape == (3, 1) and quantized.shape == expected.shape
    assert_close(quantized.float() * scale[:, None], expected, FP8_ROUNDING)


@pytest.mark.parametrize("by_table", [False, True])
@pytest.mark.parametrize("rotary_size", [32, 64])
def test_rotate_writes_keys_and_values_into_pages(by_table, rotary_size):
    T, H, K, D, page_size, pages = 5, 6, 2, 64, 16, 9
    qkv = random(T, (H + 2 * K) * D)
    angles = torch.rand(50, rotary_size // 2, device=DEVICE).repeat(1, 2) * 6
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
    positions = torch.tensor([0, 49, 7, 20, 33], device=DEVICE)
    keys, values = (torch.zeros(pages, K, page_size, D, device=DEVICE, dtype=DTYPE) for _ in range(2))
    page, offset = torch.tensor([3, 1, 8, 5, 2], device=DEVICE), torch.tensor([0, 15, 7, 4, 1], device=DEVICE)
    if by_table:
        number = offset + page_size * torch.tensor([0, 2, 1, 1, 0], device=DEVICE)
        table = torch.full((T, 3), 6, dtype=torch.int32, device=DEVICE)
        table[torch.arange(T, device=DEVICE), number // page_size] = page.int()
        query = rotate(qkv, (cos, sin), positions, (keys, values), table, number)
    else:
        query = rotate(qkv, (cos, sin), positions, (keys, values), page, offset)
    heads = qkv.view(T, H + 2 * K, D).transpose(0, 1)[None].float()  # (1, heads, T, D)
    expected_query, expected_key = apply_rotary_pos_emb(
        heads[:, :H], heads[:, H : H + K], cos[positions][None].float(), sin[positions][None].float()
    )
    assert_close(query.transpose(0, 1)[None], expected_query, ROUNDING)
    assert_close(keys[page, :, offset].transpose(0, 1)[None], expected_key, ROUNDING)
    assert torch.equal(values[page, :, offset].transpose(0, 1)[None], heads[:, H + K :].to(DTYPE))
    for cache in (keys, values):
        cache[page, :, offset] = 0
        assert not cache.any()  # nothing else was written
