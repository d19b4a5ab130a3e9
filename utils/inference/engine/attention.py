"""
The engine's attention: what `prepare_for_decoding` sets as a model's attention implementation.

Layers call it through transformers' attention interface, and their keyword arguments tell which one they need: packed
prompts (prefill), one query token per sequence (decode step), or neither, which is transformers' own `sdpa`. So a
prepared model still computes plain forward passes and `generate` as before.

Why not flashinfer: its decode attention needs a `plan()` on the host before every step, and packages for one CUDA
version. Our kernel reads each sequence's pages and filled length on the device.

Shapes: B sequences, T tokens, H query heads, K key/value heads, D head size, P pages of a sequence, S tokens.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from utils.inference.engine.kv_cache import PromptPages
from utils.inference.engine.prefill import PromptBounds, PromptTiles
from utils.kernels import load_decode_attention, load_prefill_attention

PAGED_ATTENTION = "pages"  # its name in transformers' attention interface


def has_decode_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention runs on our kernels, without masks."""
    return device.type == "cuda" and dtype.itemsize == 2 and load_decode_attention() is not None


@torch.library.custom_op("chatglm_family::decode_attention", mutates_args=())
def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """
    Attention of one query token per sequence over its pages, by our kernel, which reads only filled tokens.

    Args:
        query: (B, H, 1, D).
        keys, values: (pages, K, 64, D).
        page_table: (B, P) int32.
        lengths: (B,) int64, number of the last filled token of each sequence, from 0.

    Returns:
        (B, 1, H, D).
    """
    return load_decode_attention().decode_attention(query, keys, values, page_table, lengths, scaling)


@torch.library.custom_op("chatglm_family::masked_decode_attention", mutates_args=())
def masked_decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """
    The same by torch's scaled_dot_product_attention. An operator, so that compiled layers do not depend on S.

    Args:
        query: (B, H, 1, D).
        keys, values: (pages, K, 64, D).
        page_table: (B, P) int32; the pages of the first S tokens are read.
        mask: (B, 1, 1, S), 0 or -inf, in the dtype of `query`; S is a multiple of 64.

    Returns:
        (B, 1, H, D).
    """
    B, H, _, D = query.shape
    K, S = keys.shape[1], mask.shape[-1]
    pages = page_table[:, : S // keys.shape[2]]
    keys, values = (cache[pages].transpose(1, 2).flatten(2, 3) for cache in (keys, values))  # (B, K, S, D)
    grouped = query.reshape(B, K, H // K, D)  # a key head's query heads, as if they were its tokens
    output = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask.expand(B, K, H // K, S), scale=scaling)
    return output.reshape(B, 1, H, D).contiguous()


@decode_attention.register_fake
@masked_decode_attention.register_fake
def _(query, keys, values, page_table, lengths_or_mask, scaling):
    B, H, _, D = query.shape
    return query.new_empty(B, 1, H, D)


@torch.library.custom_op("chatglm_family::prefill_attention", mutates_args=())
def prefill_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tiles: torch.Tensor,
    pages: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """
    Attention of packed tokens over the pages of their sequences, by our kernel.

    Args:
        query: (N, H, D).
        keys, values: (pages, K, 64, D).
        tiles, pages: see `PromptTiles`.

    Returns:
        (N, H, D).
    """
    return load_prefill_attention().prefill_attention(query, keys, values, tiles, pages, scaling)


@prefill_attention.register_fake
def _(query, keys, values, tiles, pages, scaling):
    return query.new_empty(query.shape)


@torch.library.custom_op("chatglm_family::packed_attention", mutates_args=())
def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    key_starts: torch.Tensor,
    prefixes: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """
    The same by torch's scaled_dot_product_attention, one sequence after another.

    Args:
        query: (1, H, T, D).
        key, value: (1, K, S, D). The queries of a sequence are its last tokens.
        starts: (B + 1,) int32 on the CPU, where each sequence's queries begin, and the last one's end.
        key_starts: (B + 1,) the same of its keys.
        prefixes: (B,) int64 on the CPU, the number of a sequence's first tokens that all of it attends to.

    Returns:
        (1, T, H, D), zeros for tokens of no sequence.
    """
    output = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    group = query.shape[1] // key.shape[1]
    bounds = zip(starts.tolist(), starts.tolist()[1:], key_starts.tolist(), key_starts.tolist()[1:], strict=False)
    for (start, stop, first, last), prefix in zip(bounds, prefixes.tolist(), strict=True):
        if start == stop:
            continue
        tokens = torch.arange(last - first, device=query.device)
        visible = (tokens <= tokens[start - stop :, None]) | (tokens < prefix)
        keys, values = (heads[:, :, first:last].repeat_interleave(group, 1) for heads in (key, value))
        attended = scaled_dot_product_attention(
            query[:, :, start:stop], keys, values, attn_mask=visible, scale=scaling
        )
        output[:, start:stop] = attended.transpose(1, 2)
    return output


@packed_attention.register_fake
def _(query, key, value, starts, key_starts, prefixes, scaling):
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])


def paged_attention_forward(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    page_table: torch.Tensor | None = None,
    cache_lengths: torch.Tensor | None = None,
    cache_mask: torch.Tensor | None = None,
    prompt_pages: PromptPages | None = None,
    prompts: PromptTiles | PromptBounds | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Dispatch on what the layer was called with, see the top of this file. The signature is transformers'.

    Args:
        page_table: of a decode step.
        cache_lengths: of a decode step with kernels, see `decode_attention`.
        cache_mask: of a decode step without, see `masked_decode_attention`.
        prompt_pages: where packed prompts lie.
        prompts: their tiles for the kernel, or their bounds.

    Returns:
        (B, T, H, D), and no weights.
    """
    if cache_lengths is not None:
        return decode_attention(query, key, value, page_table, cache_lengths, scaling), None
    if cache_mask is not None:
        return masked_decode_attention(query, key, value, page_table, cache_mask, scaling), None
    if prompts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    key, value = prompt_pages.exchange(key, value)
    if isinstance(prompts, PromptTiles):
        query, cache = query[0].transpose(0, 1), prompt_pages.cache  # (N, H, D)
        return prefill_attention(query, cache.keys, cache.values, prompts.tiles, prompts.pages, scaling)[None], None
    bounds = prompts.starts, prompts.key_starts, prompts.prefixes
    return packed_attention(query, key, value, *bounds, scaling), None


AttentionInterface.register(PAGED_ATTENTION, paged_attention_forward)
AttentionMaskInterface.register(PAGED_ATTENTION, sdpa_mask)
