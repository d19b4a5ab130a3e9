"""The kernels at the end of a greedy decode step, beside torch's operations."""

import copy

import pytest
import torch
from kernel_checks import DEVICE, DTYPE

from utils.inference.engine.kv_cache import DecodeState, DecodeStateShape
from utils.kernels.next_token import argmax


@pytest.mark.parametrize("V", [100, 20_000])
def test_argmax_takes_the_first_of_equals(V):
    logits = torch.randn(5, V, device=DEVICE).to(DTYPE)
    logits[1] = -torch.inf
    logits[1, 70] = -5
    logits[2, [60, V - 1]] = 9
    logits[3] = 0
    assert argmax(logits).tolist() == [row.float().argmax().item() for row in logits[:2]] + [60, 0] + [
        logits[4].float().argmax().item()
    ]


@pytest.mark.parametrize("coordinates", [1, 2])
@pytest.mark.parametrize("stop_ids", [[], [7], [7, 2, 11]])
def test_advance(coordinates, stop_ids):
    """Steps of five of six slots: running ones, one at its last token, one that has ended, stop tokens."""
    shape = DecodeStateShape(6, 2, coordinates, decode_steps=3, seen_tokens=0)
    state = DecodeState(shape, stop_ids, DEVICE)
    state.tokens_left[:6] = torch.tensor([4, 1, 0, 9, 9, 9], device=DEVICE)
    state.cache_length[:6] = torch.arange(6, device=DEVICE) * 10
    state.position[:6] = torch.arange(6 * coordinates, device=DEVICE).view(6, coordinates)
    by_kernel = copy.deepcopy(state)
    for chosen in ([1, 2, 3, 7, 11], [7, 5, 5, 5, 2], [1, 1, 1, 1, 1], [2, 2, 2, 2, 2]):
        tokens = torch.tensor(chosen, device=DEVICE)
        state.advance(tokens)
        by_kernel.advance_by_kernel(tokens)
        for name, expected in vars(state).items():
            if isinstance(expected, torch.Tensor):
                assert torch.equal(getattr(by_kernel, name), expected), name
