"""
The engine's attention: what `prepare_for_decoding` sets as a model's attention implementation.

Layers call it through transformers' attention interface, and their keyword arguments tell which one they need: packed
prompts (prefill), one query token per slot (decode step), or neither, which is transformers' own `sdpa`. So a prepared
model still computes plain forward passes and `generate` as before.

Why not flashinfer: its decode attention needs a paged cache, a `plan()` on the host before every step and packages for
one CUDA version. Here a slot is contiguous, and the kernel reads its filled length on the device.

Shapes: B sequences, T tokens, H query heads, K key/value heads, D head size, S tokens of a slot.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from utils.kernels import load_decode_attention
from utils.layers.varlen_attention import varlen_attention_forward

SLOT_ATTENTION = "slots"  # its name in transformers' attention interface


def has_decode_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention runs on our decode kernel, and prefill on torch's varlen kernel, without masks."""
    return device.type == "cuda" and dtype.itemsize == 2 and load_decode_attention() is not None


@torch.library.custom_op("chatglm_family::decode_attention", mutates_args=())
def decode_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor, scaling: float
) -> torch.Tensor:
    """
    Attention of one query token per sequence over its cache slot, by our kernel, which reads only filled tokens.

    Args:
        query: (B, H, 1, D).
        keys, values: (slots, K, S, D); the first B slots are read.
        lengths: (B,) int64, index of the last filled token in each slot.

    Returns:
        (B, 1, H, D).
    """
    return load_decode_attention().decode_attention(query, keys, values, lengths, scaling)


@torch.library.custom_op("chatglm_family::masked_decode_attention", mutates_args=())
def masked_decode_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """
    The same by torch's scaled_dot_product_attention. An operator, so that compiled layers do not depend on S.

    Args:
        query: (B, H, 1, D).
        keys, values: (slots, K, max_seq_len, D); the first S tokens of the first B slots are read.
        mask: (B, 1, 1, S), 0 or -inf, in the dtype of `query`.

    Returns:
        (B, 1, H, D).
    """
    B, H, _, D = query.shape
    K, S = keys.shape[1], mask.shape[-1]
    grouped = query.reshape(B, K, H // K, D)  # a key head's query heads, as if they were its tokens
    output = scaled_dot_product_attention(
        grouped, keys[:B, :, :S], values[:B, :, :S], attn_mask=mask.expand(B, K, H // K, S), scale=scaling
    )
    return output.reshape(B, 1, H, D).contiguous()


@decode_attention.register_fake
@masked_decode_attention.register_fake
def _(query, keys, values, lengths_or_mask, scaling):
    B, H, _, D = query.shape
    return query.new_empty(B, 1, H, D)


def slot_attention_forward(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cache_lengths: torch.Tensor | None = None,
    slot_mask: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Dispatch on what the layer was called with, see the top of this file. The signature is transformers'.

    Args:
        cache_lengths: of a decode step with kernels, see `decode_attention`.
        slot_mask: of a decode step without, see `masked_decode_attention`.
        kwargs: with "cu_seq_lens_q" for packed prompts, see `varlen_attention_forward`.

    Returns:
        (B, T, H, D), and no weights.
    """
    if cache_lengths is not None:
        return decode_attention(query, key, value, cache_lengths, scaling), None
    if slot_mask is not None:
        return masked_decode_attention(query, key, value, slot_mask, scaling), None
    if "cu_seq_lens_q" in kwargs:
        return varlen_attention_forward(module, query, key, value, None, scaling=scaling, **kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(SLOT_ATTENTION, slot_attention_forward)
AttentionMaskInterface.register(SLOT_ATTENTION, sdpa_mask)
