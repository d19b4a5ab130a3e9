"""Attention over rows laid end to end, each seeing itself alone, without a mask: torch's varlen kernel."""

import inspect

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

VARLEN = "varlen"  # its name in transformers' attention interface
CAUSAL = (-1, 0)
# From torch 2.13 on fewer heads of keys than of queries must be announced.
ANNOUNCES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def varlen_attention_forward(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    cu_segments: torch.Tensor | None = None,
    in_prefix: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Args:
        query: (1, H, T, D), key and value (1, K, T, D) with H a multiple of K; float16 or bfloat16 on a GPU.
        cu_seq_lens_q: (rows + 1,) int32, where each row begins, and T; rows may be empty.
        max_length_q: no row is longer.
        cu_segments: for ChatGLM-6B (2 rows + 1,) int32, where each row's prefix and its answer begin, and T.
        in_prefix: for ChatGLM-6B (T,) bool, the tokens that see all of their row's prefix.

    Returns:
        (1, T, H, D), and no weights.
    """
    query, key, value = (heads.squeeze(0).transpose(0, 1).contiguous() for heads in (query, key, value))  # (T, H, D)
    options = {"enable_gqa": True} if ANNOUNCES_GQA and query.shape[1] != key.shape[1] else {}

    def attend(starts: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
        lengths = (starts, starts, max_length_q, max_length_q)
        return varlen_attn(query, key, value, *lengths, scale=scaling, window_size=window, **options)

    output = attend(cu_seq_lens_q, CAUSAL)
    if in_prefix is not None:
        # Prefix tokens take theirs from a second pass, over segments and in both directions. What that makes of the
        # answers is thrown away: less work than it costs to leave it out.
        output = torch.where(in_prefix[:, None, None], attend(cu_segments, (-1, -1)), output)
    return output.unsqueeze(0), None


AttentionInterface.register(VARLEN, varlen_attention_forward)
AttentionMaskInterface.register(VARLEN, lambda *args, **kwargs: None)
