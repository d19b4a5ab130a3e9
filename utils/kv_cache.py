"""
Keys and values of the engine's rows: every row has a slot of fixed size, in which its tokens lie from the start.

Shapes: B rows that compute, T tokens, H query heads, K key/value heads, D head size, S columns that may be filled.
"""

from dataclasses import dataclass

from utils.optional_kernels import decode_kernels
from utils.varlen_attention import varlen_attention_forward

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

SLOTS = "slots"  # its name in transformers' attention interface


@dataclass
class LayerSlots:
    """One layer's slots, in the place of transformers' cache: keys and values (slots, K, columns, D)."""

    keys: torch.Tensor
    values: torch.Tensor
    columns: torch.Tensor  # (B,) int64: where the token of each of the first B slots goes

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, **kwargs):
        """One token a row, (B, K, 1, D), into the first B slots -> all slots."""
        rows = torch.arange(key.shape[0], device=key.device)
        self.keys[rows, :, self.columns] = key[:, :, 0]
        self.values[rows, :, self.columns] = value[:, :, 0]
        return self.keys, self.values


@dataclass
class PromptRecorder:
    """Takes the cache's place while prompts are read: keeps what each layer makes of them, (1, K, N, D)."""

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, **kwargs):
        self.keys, self.values = key, value
        return key, value


@torch.library.custom_op("chatglm_family::slot_attention", mutates_args=())
def slot_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """
    Attention of one token a row to its slot. An operator of its own, so that compiled layers do not depend on S.

    Args:
        query: (B, H, 1, D); of the slots (slots, K, columns, D) the first B rows and S columns are read.
        mask: (B, 1, 1, S), 0 or -inf, in the dtype of `query`; or (B,) int64, the last column of each slot that is
            filled, for the kernel, which reads no further.

    Returns:
        (B, 1, H, D).
    """
    if mask.ndim == 1:
        return decode_kernels().attend(query, keys, values, mask, scaling)
    B, H, _, D = query.shape
    S = mask.shape[-1]
    heads = keys.shape[1]
    grouped = query.reshape(B, heads, H // heads, D)  # the query heads of a key head as if they were its tokens
    shape = (B, heads, H // heads, S)
    output = scaled_dot_product_attention(
        grouped, keys[:B, :, :S], values[:B, :, :S], attn_mask=mask.expand(shape), scale=scaling
    )
    return output.reshape(B, 1, H, D).contiguous()


@slot_attention.register_fake
def _(query, keys, values, mask, scaling):
    B, H, _, D = query.shape
    return query.new_empty(B, 1, H, D)


def slot_attention_forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Prompts, more tokens than one, as `varlen` or with a mask as `sdpa`; single tokens by `slot_attention`."""
    if "cu_seq_lens_q" in kwargs:
        return varlen_attention_forward(module, query, key, value, None, scaling=scaling, **kwargs)
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return slot_attention(query, key, value, attention_mask, scaling), None


AttentionInterface.register(SLOTS, slot_attention_forward)
AttentionMaskInterface.register(SLOTS, lambda *args, **kwargs: None)
