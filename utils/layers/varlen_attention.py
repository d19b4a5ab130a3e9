"""Attention over rows laid end to end, each seeing itself alone, without a mask: torch's varlen kernel."""

import inspect

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

VARLEN = "varlen"  # its name in transformers' attention interface
CAUSAL, BOTH_WAYS = (-1, 0), (-1, -1)  # windows
# From torch 2.13 on fewer heads of keys than of queries must be announced.
ANNOUNCES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


class _Gather(torch.autograd.Function):
    """
    (N, H, D) -> (M, H, D), what is at `index` (M,) int64, and zeros where that is below 0. No position may be taken
    twice: `inverse` (N,) says by which element of the index each is, -1 where by none, so that the gradient is
    gathered too. torch's own adds it up, row by row.
    """

    @staticmethod
    def forward(ctx, values, index, inverse):
        ctx.save_for_backward(index, inverse)
        return _gather(values, index)

    @staticmethod
    def backward(ctx, gradient):
        index, inverse = ctx.saved_tensors
        return _gather(gradient, inverse), None, None


def _gather(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return torch.where(index[:, None, None] >= 0, values.index_select(0, index.clamp(min=0)), 0)


def varlen_attention_forward(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    prefix_tokens: torch.Tensor | None = None,
    cu_prefix: torch.Tensor | None = None,
    causal: bool = True,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Args:
        query: (1, H, T, D), key and value (1, K, T, D) with H a multiple of K; float16 or bfloat16 on a GPU.
        cu_seq_lens_q: (rows + 1,) int32, where each row begins, and T; rows may be empty.
        max_length_q: no row is longer.
        prefix_tokens: for ChatGLM-6B (P,) int64, the tokens that see all of their row's prefix.
        cu_prefix: (rows + 1,) int32, where among them each row's begin, and P.
        causal: whether the other tokens see what is before them alone, not all of their row.

    Returns:
        (1, T, H, D), and no weights.
    """
    query, key, value = (heads.squeeze(0).transpose(0, 1).contiguous() for heads in (query, key, value))  # (T, H, D)
    options = {"enable_gqa": True} if ANNOUNCES_GQA and query.shape[1] != key.shape[1] else {}

    def attend(heads: tuple[torch.Tensor, ...], starts: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
        lengths = (starts, starts, max_length_q, max_length_q)
        return varlen_attn(*heads, *lengths, scale=scaling, window_size=window, **options)

    heads = (query, key, value)
    output = attend(heads, cu_seq_lens_q, CAUSAL if causal else BOTH_WAYS)
    if prefix_tokens is not None:  # theirs is a second pass, over the prefixes alone and in both directions
        order = torch.arange(len(prefix_tokens), device=prefix_tokens.device)
        places = prefix_tokens.new_full((len(query),), -1).index_copy(0, prefix_tokens, order)
        prefixes = tuple(_Gather.apply(states, prefix_tokens, places) for states in heads)
        prefixes = attend(prefixes, cu_prefix, BOTH_WAYS)
        output = torch.where(places[:, None, None] >= 0, _Gather.apply(prefixes, places, prefix_tokens), output)
    return output.unsqueeze(0), None


AttentionInterface.register(VARLEN, varlen_attention_forward)  # and no mask: transformers then makes none
