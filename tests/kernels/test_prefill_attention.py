"""Attention of packed tokens over the pages of their sequences, beside torch in float32."""

import pytest
import torch
from kernel_checks import DEVICE, ROUNDING, assert_close, random

from utils.kernels.prefill_attention import TILE_TOKENS, prefill_attention

PAGE = 64
# Of each sequence: the first token that is computed, the one behind the last, and the prefix that all of it sees.
CHUNKS = {
    "whole prompts": [(0, 1, 0), (0, 64, 0), (0, 65, 0), (0, 130, 0)],
    "cached beginnings and chunks": [(64, 67, 0), (70, 200, 0), (128, 129, 0), (0, 20, 0)],
    "prefixes seen in both directions": [(0, 30, 30), (0, 100, 70), (0, 80, 0), (0, 129, 129)],
}


def tiles_of(chunks) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles of chunks, with two empty ones among them, and pages in a random order; page 0 belongs to none."""
    free = iter((torch.randperm(20) + 1).tolist())
    tiles, pages, packed = [], [0], 0
    for first, stop, prefix in chunks:
        for start in range(first, stop, TILE_TOKENS):
            count = min(TILE_TOKENS, stop - start)
            tiles.append((packed, count, start, len(pages), prefix))
            packed += count
        tiles.append((0, 0, 0, 0, 0))
        pages.extend(next(free) for _ in range(-(-stop // PAGE)))
    return (torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (tiles, pages))


@pytest.mark.parametrize("kind", CHUNKS)
@pytest.mark.parametrize("H, K, D", [(4, 4, 32), (8, 2, 64), (3, 1, 32)], ids=["a key head each", "4 for one", "3"])
def test_each_token_sees_its_sequence_up_to_itself_and_the_prefix(kind, H, K, D):
    chunks = CHUNKS[kind]
    tiles, pages = tiles_of(chunks)
    keys, values = (torch.full((21, K, PAGE, D), torch.nan, device=DEVICE, dtype=random(1).dtype) for _ in range(2))
    query, expected, first_page = random(sum(stop - first for first, stop, _ in chunks), H, D), [], 1
    for first, stop, prefix in chunks:
        own_pages = pages[first_page : first_page + -(-stop // PAGE)].long()
        first_page += len(own_pages)
        filled = [random(K, stop, D), random(K, stop, D)]
        for cache, heads in zip((keys, values), filled, strict=True):
            token = torch.arange(stop, device=DEVICE)
            cache[own_pages[token // PAGE], :, token % PAGE] = heads.transpose(0, 1)
        key, value = (heads.float().repeat_interleave(H // K, 0) for heads in filled)  # (H, stop, D)
        places = torch.arange(stop, device=DEVICE)
        visible = (places <= torch.arange(first, stop, device=DEVICE)[:, None]) | (places < prefix)
        own = query[sum(map(len, expected)) :][: stop - first].float().transpose(0, 1)
        scores = (own @ key.transpose(1, 2) * D**-0.5).masked_fill(~visible, -torch.inf)
        expected.append((scores.softmax(-1) @ value).transpose(0, 1))
    output = prefill_attention(query, keys, values, tiles, pages, D**-0.5)
    assert_close(output, torch.cat(expected), ROUNDING)
