"""The kernels between the GEMMs of a block, beside transformers' layers and torch in float32."""

import pytest
import torch
from kernel_checks import DEVICE, DTYPE, FP8_ROUNDING, ROUNDING, activate, assert_close, random
from transformers.models.glm.modeling_glm import GlmRMSNorm, apply_rotary_pos_emb

from utils.kernels.inference_block import activate as activate_by_kernel
from utils.kernels.inference_block import (
    activate_and_quantize,
    add_rms_norm,
    quantize,
    rotate,
    scaled_sum_layer_norm,
)
from utils.models import ChatGLMConfig
from utils.models.modeling_chatglm import ChatGLMRotaryEmbedding, rotate_half_2d

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


@pytest.mark.parametrize("E", [256, 200])
@pytest.mark.parametrize("has_delta", [False, True])
@pytest.mark.parametrize("quantizes", [False, True])
def test_scaled_sum_layer_norm(E, has_delta, quantizes):
    hidden, delta, weight, bias = random(3, 1, E) + 4, random(3, 1, E), random(E), random(E)
    normed, quantized = scaled_sum_layer_norm(hidden, delta if has_delta else None, 7.5, weight, bias, EPS, quantizes)
    added = hidden * 7.5 + delta if has_delta else hidden
    expected = torch.nn.functional.layer_norm(added.float(), (E,), weight.float(), bias.float(), EPS)
    assert_close(normed, expected, ROUNDING)
    assert (quantized is not None) is quantizes
    if quantizes:
        values, scale = quantized
        assert values.dtype == torch.float8_e4m3fn and scale.shape == (3, 1)
        assert_close(values.float() * scale[..., None], expected, FP8_ROUNDING)


@pytest.mark.parametrize("gated", [True, False])
def test_activation(gated):
    inputs = random(3, 1, (1 + gated) * 2100)
    expected = activate(inputs.float(), gated)
    assert_close(activate_by_kernel(inputs, gated), expected, ROUNDING)
    quantized, scale = activate_and_quantize(inputs, gated)
    assert scale.shape == (3, 1) and quantized.shape == expected.shape
    assert_close(quantized.float() * scale[:, None], expected, FP8_ROUNDING)


class Pages:
    """Five tokens' places in an empty cache of 9 pages, and what `rotate` is told about them."""

    def __init__(self, K, D, by_table):
        self.caches = tuple(torch.zeros(9, K, 16, D, device=DEVICE, dtype=DTYPE) for _ in range(2))
        self.page = torch.tensor([3, 1, 8, 5, 2], device=DEVICE)
        self.offset = torch.tensor([0, 15, 7, 4, 1], device=DEVICE)
        self.places = self.page, self.offset
        if by_table:
            number = self.offset + 16 * torch.tensor([0, 2, 1, 1, 0], device=DEVICE)
            table = torch.full((5, 3), 6, dtype=torch.int32, device=DEVICE)
            table[torch.arange(5, device=DEVICE), number // 16] = self.page.int()
            self.places = table, number

    def take(self) -> list[torch.Tensor]:
        """Return the keys and values of the tokens, (1, K, 5, D), and check that nothing else was written."""
        taken = [cache[self.page, :, self.offset].transpose(0, 1)[None] for cache in self.caches]
        for cache in self.caches:
            cache[self.page, :, self.offset] = 0
            assert not cache.any()
        return taken


@pytest.mark.parametrize("by_table", [False, True])
@pytest.mark.parametrize("rotary_size", [32, 64])
def test_rotate_writes_keys_and_values_into_pages(by_table, rotary_size):
    T, H, K, D = 5, 6, 2, 64
    qkv, pages = random(T, (H + 2 * K) * D), Pages(K, D, by_table)
    angles = torch.rand(50, rotary_size // 2, device=DEVICE).repeat(1, 2) * 6
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
    positions = torch.tensor([0, 49, 7, 20, 33], device=DEVICE)
    query = rotate(qkv, (cos, sin), positions[:, None], pages.caches, *pages.places)
    heads = qkv.view(T, H + 2 * K, D).transpose(0, 1)[None].float()  # (1, heads, T, D)
    expected_query, expected_key = apply_rotary_pos_emb(
        heads[:, :H], heads[:, H : H + K], cos[positions][None].float(), sin[positions][None].float()
    )
    keys, values = pages.take()
    assert_close(query.transpose(0, 1)[None], expected_query, ROUNDING)
    assert_close(keys, expected_key, ROUNDING)
    assert torch.equal(values, heads[:, H + K :].to(DTYPE))


@pytest.mark.parametrize("by_table", [False, True])
def test_rotate_in_two_coordinates(by_table):
    """As ChatGLM-6B does; the positions of a prefill are one row a coordinate."""
    T, H, D = 5, 3, 64
    qkv, pages = random(T, 3 * H * D), Pages(H, D, by_table)
    rotary = ChatGLMRotaryEmbedding(ChatGLMConfig(hidden_size=H * D, num_attention_heads=H))
    positions = torch.tensor([[0, 49, 7, 20, 33], [3, 0, 12, 0, 1]], device=DEVICE)
    angles = torch.arange(50, device=DEVICE)[:, None].float() * rotary.inv_freq(DEVICE)
    query = rotate(qkv, (angles.cos().to(DTYPE), angles.sin().to(DTYPE)), positions.t(), pages.caches, *pages.places)
    cos, sin = rotary(torch.zeros(1, device=DEVICE, dtype=DTYPE), positions[None])
    heads = qkv.view(T, H, 3 * D).transpose(0, 1)[None].float().chunk(3, dim=-1)  # (1, H, T, D) each
    keys, values = pages.take()
    for actual, states in ((query.transpose(0, 1)[None], heads[0]), (keys, heads[1])):
        assert_close(actual, states * cos.float() + rotate_half_2d(states) * sin.float(), ROUNDING)
    assert torch.equal(values, heads[2].to(DTYPE))
