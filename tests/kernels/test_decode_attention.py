"""Attention of one query token per sequence over its KV cache, beside torch in float32."""

import pytest
import torch
from kernel_checks import DEVICE, ROUNDING, assert_close, random

from utils.kernels.decode_attention import decode_attention
from utils.kernels.triton_utils import arrival_counters


@pytest.mark.parametrize(
    "B, H, K, D, S",
    [
        pytest.param(520, 4, 1, 16, 64, id="no split"),
        pytest.param(5, 4, 4, 64, 128, id="2 splits, a key head per query head"),
        pytest.param(3, 8, 2, 32, 256, id="4 splits"),
        pytest.param(2, 24, 1, 32, 256, id="4 splits, 24 query heads per key head"),  # GLM-4-32B-0414
        pytest.param(2, 32, 2, 128, 512, id="8 splits, 16 query heads per key head"),
    ],
)
def test_attention_equals_softmax_over_the_filled_tokens(B, H, K, D, S):
    query, keys, values = random(B, H, 1, D), random(B + 1, K, S, D), random(B + 1, K, S, D)
    last = torch.randint(0, S - 1, (B,), device=DEVICE)
    last[0], last[-1] = 0, S - 1
    output = decode_attention(query, keys, values, last, D**-0.5)
    visible = (torch.arange(S, device=DEVICE) <= last[:, None])[:, None, None]  # (B, 1, 1, S)
    keys, values = (cache[:B].float().repeat_interleave(H // K, 1) for cache in (keys, values))
    scores = (query.float() @ keys.transpose(2, 3) * D**-0.5).masked_fill(~visible, -torch.inf)
    assert_close(output, (scores.softmax(-1) @ values).transpose(1, 2), ROUNDING)
    assert not arrival_counters(DEVICE).any()


def test_tokens_behind_the_last_one_are_not_read():
    query, keys, values = random(2, 4, 1, 32), random(2, 2, 256, 32), random(2, 2, 256, 32)
    last = torch.tensor([64, 99], device=DEVICE)
    expected = decode_attention(query, keys, values, last, 0.2)
    for slot, end in enumerate(last + 1):
        keys[slot, :, end:], values[slot, :, end:] = torch.nan, torch.nan
    assert torch.equal(decode_attention(query, keys, values, last, 0.2), expected)
