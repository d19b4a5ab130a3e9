"""
Attention within each of several packed sequences, without a mask: torch's varlen kernel.

In: one packed row of query, key and value, and where each sequence begins. Out: the attention's output. Registered in
transformers' attention interface as `VARLEN`, which utils/training/optimize.py selects; transformers then builds no
mask. utils/inference/engine calls the function for prefill. transformers' own flash attention needs a package that
has no wheel for each torch, and knows no prefix that is seen in both directions, as ChatGLM-6B has.
"""

import inspect

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

VARLEN = "varlen"
CAUSAL, BIDIRECTIONAL = (-1, 0), (-1, -1)  # window sizes to the left and right, -1 is no bound
# Since torch 2.13 the kernel wants to be told of fewer key heads than query heads.
HAS_GQA_FLAG = "enable_gqa" in inspect.signature(varlen_attn).parameters

Bounds = tuple[torch.Tensor, torch.Tensor, int, int]  # where sequences begin, in queries and keys; the longest ones


class _Gather(torch.autograd.Function):
    """
    (N, H, D) -> (M, H, D): the rows at `index` (M,) int64, and zeros where it is negative.

    No row may be taken twice. `inverse` (N,) is the inverse of `index`, -1 where a row is not taken, so that the
    gradient is a gather too; torch's own adds it up row by row.
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
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_k: int | None = None,
    prefix_tokens: torch.Tensor | None = None,
    cu_prefix: torch.Tensor | None = None,
    causal: bool = True,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Return the output (1, T, H, D) of attention over packed sequences, and None for the weights.

    The parameters' names are those of transformers' attention interface and of the collator.

    Args:
        query: (1, H, T, D) float16 or bfloat16 on a GPU; key and value (1, K, S, D) with H a multiple of K.
        cu_seq_lens_q: (sequences + 1,) int32, where each sequence begins, and T; sequences may be empty.
        max_length_q: the length of the longest sequence, or more.
        cu_seq_lens_k, max_length_k: the same of its keys, which may be more: then the queries are its last tokens,
            as in FlashAttention. None is those of the queries.
        prefix_tokens: for ChatGLM-6B (P,) int64, the tokens that see all of their sequence's prefix.
        cu_prefix: (sequences + 1,) int32, where among them each sequence's begin, and P.
        causal: whether the other tokens see only what is before them, else all of their sequence.
    """
    query, key, value = (heads.squeeze(0).transpose(0, 1).contiguous() for heads in (query, key, value))  # (T, H, D)
    options = {"enable_gqa": True} if HAS_GQA_FLAG and query.shape[1] != key.shape[1] else {}

    def attend(query, key, value, bounds: Bounds, window: tuple[int, int]) -> torch.Tensor:
        return varlen_attn(query, key, value, *bounds, scale=scaling, window_size=window, **options)

    starts = cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
    longest = max_length_q, max_length_q if max_length_k is None else max_length_k
    output = attend(query, key, value, (*starts, *longest), CAUSAL if causal else BIDIRECTIONAL)
    if prefix_tokens is not None:  # a second pass, over the prefixes alone and in both directions
        order = torch.arange(len(prefix_tokens), device=prefix_tokens.device)
        places = prefix_tokens.new_full((len(query),), -1).index_copy(0, prefix_tokens, order)  # (T,)
        prefix_query, prefix_key, prefix_value = (
            _Gather.apply(heads, prefix_tokens, places) for heads in (query, key, value)
        )  # (P, H, D)
        bounds = cu_prefix, cu_prefix, max_length_q, max_length_q
        prefix_output = attend(prefix_query, prefix_key, prefix_value, bounds, BIDIRECTIONAL)
        prefix_output = _Gather.apply(prefix_output, places, prefix_tokens)  # (T, H, D)
        output = torch.where(places[:, None, None] >= 0, prefix_output, output)
    return output.unsqueeze(0), None


AttentionInterface.register(VARLEN, varlen_attention_forward)  # without a mask function: transformers builds no mask
