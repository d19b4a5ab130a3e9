"""Rotary embedding by exchange: what torch's compiler makes of slices and concatenations are masked loads."""

import torch
from torch import nn


def rotate_neighbours(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What `apply_rotary_pos_emb` of transformers' GLM computes, to the bit: elements 2 i and 2 i + 1 of a head turn by
    the i-th angle, those beyond the angles stay.

    Args:
        query: (B, H, T, D), key (B, K, T, D).
        cos, sin: (B, T, R) with R at most D; the second half of R repeats the first and is not read.
    """
    D, R = query.shape[-1], cos.shape[-1]
    cos, sin = (values[:, None, :, : R // 2] for values in (cos, sin))
    kept = nn.functional.pad(cos.repeat_interleave(2, dim=-1), (0, D - R), value=1.0)  # (B, 1, T, D)
    exchanged = nn.functional.pad(torch.stack((-sin, sin), dim=-1).flatten(-2), (0, D - R))

    def rotate(heads: torch.Tensor) -> torch.Tensor:
        return heads * kept + heads.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * exchanged

    return rotate(query), rotate(key)
