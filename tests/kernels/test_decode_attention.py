"""Attention of one query token per sequence over its pages of the KV cache, beside torch in float32."""

import pytest
import torch
from kernel_checks import DEVICE, ROUNDING, assert_close, random

from utils.kernels.decode_attention import decode_attention
from utils.kernels.triton_utils import arrival_counters

PAGE = 64


def paged(keys, values):
    """(B, K, S, D) -> the same in pages (B S / 64 + 1, K, 64, D) in a random order, page 0 unused, and their table."""
    B, K, S, D = keys.shape
    table = torch.randperm(B * S // PAGE, device=DEVICE).view(B, -1) + 1
    pages = []
    for tensor in (keys, values):
        cache = torch.full((B * S // PAGE + 1, K, PAGE, D), torch.nan, device=DEVICE, dtype=tensor.dtype)
        cache[table] = tensor.unflatten(2, (-1, PAGE)).transpose(1, 2)
        pages.append(cache)
    return *pages, table.int()


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
    query, keys, values = random(B, H, 1, D), random(B, K, S, D), random(B, K, S, D)
    last = torch.randint(0, S - 1, (B,), device=DEVICE)
    last[0], last[-1] = 0, S - 1
    output = decode_attention(query, *paged(keys, values), last, D**-0.5)
    visible = (torch.arange(S, device=DEVICE) <= last[:, None])[:, None, None]  # (B, 1, 1, S)
    keys, values = (cache.float().repeat_interleave(H // K, 1) for cache in (keys, values))
    scores = (query.float() @ keys.transpose(2, 3) * D**-0.5).masked_fill(~visible, -torch.inf)
    assert_close(output, (scores.softmax(-1) @ values).transpose(1, 2), ROUNDING)
    assert not arrival_counters(DEVICE).any()


def test_tokens_behind_the_last_one_are_not_read():
    query, keys, values = random(2, 4, 1, 32), random(2, 2, 256, 32), random(2, 2, 256, 32)
    last = torch.tensor([64, 99], device=DEVICE)
    keys, values, table = paged(keys, values)
    expected = decode_attention(query, keys, values, table, last, 0.2)
    for row, end in enumerate((last + 1).tolist()):
        for tensor in (keys, values):
            tensor[table[row, end // PAGE], :, end % PAGE :] = torch.nan
        table[row, end // PAGE + 1 :] = 0  # where all is NaN
    assert torch.equal(decode_attention(query, keys, values, table, last, 0.2), expected)


def test_sequences_share_pages():
    query, keys, values = random(1, 8, 1, 32).expand(3, -1, -1, -1), random(3, 2, 256, 32), random(3, 2, 256, 32)
    keys, values, table = paged(keys, values)
    table[1], table[2, :2] = table[0], table[0, :2]
    last = torch.tensor([200, 200, 127], device=DEVICE)
    output = decode_attention(query, keys, values, table, last, 0.2)
    assert output[0].equal(output[1])
    assert output[2].equal(decode_attention(query[:1], keys, values, table[:1], last[2:], 0.2)[0])
