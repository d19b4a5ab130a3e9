"""
Attention with query, key and value in one GEMM.

In: a model of either class, for inference or with LoRA adapters for training. Out: the same model, its attention
layers replaced. Called by the inference engine (`fuse_qkv`) and utils/training/optimize.py (`fuse_lora_qkv`, then
`use_qkv_kernel`).

Why: with 2 key/value heads two of the three stock GEMMs are tiny. In training one kernel adds the LoRA branch, applies
the rotary embedding and writes query, key and value. Liger has no rotary kernel for GLM's interleaved pairs, and PEFT
computes three branches of three projections.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb, eager_attention_forward

from utils.kernels import load_qkv_rope_lora
from utils.layers.lora_linear import LoraLinear, add_lora
from utils.layers.mixed_lora import add_adapters_of, base_layer_of
from utils.layers.quantization import QuantizedLinear
from utils.layers.replace import replace_layers, share_state, subclass_with
from utils.models.architectures import GLM_ATTENTIONS
from utils.models.family import QKV
from utils.models.modeling_chatglm import ChatGLMAttention

QKV_PROJ = "qkv_proj"  # name of the fused layer; FP8 is applied by name
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # query (B, H, T, D), key and value (B, K, T, D)


class FusedQKVAttention:
    """
    Methods of one of GLM_ATTENTIONS whose base weights of q, k and v are one layer, `qkv_proj`.

    Its submodules are `q_proj`, `k_proj` and `v_proj` where they hold adapters, under the names that PEFT saves, then
    `o_proj` and `qkv_proj`. It stays of the stock class for transformers, which records attention weights by class.
    `project` is one of the functions below.
    """

    head_counts: list[int]  # H, K and K
    project: Callable[..., Heads]

    @classmethod
    def from_stock(cls, stock: nn.Module, qkv_proj: nn.Module, project: Callable[..., Heads]) -> nn.Module:
        """
        Build the layer that stands in for `stock`, whose q, k and v layers it keeps.

        Args:
            qkv_proj: (..., in) -> (..., (H + 2 K) D), the base's query, key and value heads in this order.
            project: called with the layer, hidden states (B, T, E) and cos and sin; returns rotated heads.
        """
        attention = share_state(stock, subclass_with(cls, type(stock)))
        attention.head_counts = [base_layer_of(getattr(stock, name)).out_features // stock.head_dim for name in QKV]
        attention.qkv_proj = qkv_proj
        attention.project = project
        return attention

    def project_qkv(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> Heads:
        """Return query (B, H, T, D) and key (B, K, T, D) rotated, and value (B, K, T, D)."""
        return self.project(self, hidden_states, position_embeddings)

    def split_heads(self, qkv: torch.Tensor) -> Heads:
        """(B, T, (H + 2 K) D) -> query, key and value."""
        heads = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + 2 K, T, D)
        return heads.split(self.head_counts, dim=1)

    def lora_ab(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A (3 R, in) and the scaled B ((H + 2 K) D, 3 R), block by block, of all three adapters."""
        pairs = [getattr(self, name).lora_ab() for name in QKV]
        return torch.cat([A for A, _ in pairs]), torch.block_diag(*[B for _, B in pairs])

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, cache=None, **kwargs
    ):
        """As the stock class: hidden states (B, T, E) -> output (B, T, E) and the attention weights or None."""
        query, key, value = self.project_qkv(hidden_states, position_embeddings)
        cache = cache if cache is not None else past_key_values
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )  # (B, T, H, D)
        return self.o_proj(output.flatten(-2)), weights


def project_frozen(
    attention: FusedQKVAttention, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
) -> Heads:
    """Return the heads of a frozen attention, for inference."""
    query, key, value = attention.split_heads(attention.qkv_proj(hidden_states))
    return *apply_rotary_pos_emb(query, key, *position_embeddings), value


def project_lora(
    attention: FusedQKVAttention, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
) -> Heads:
    """Return the heads of base + LoRA branch by torch operations."""
    qkv = add_lora(attention.qkv_proj(hidden_states), hidden_states, *attention.lora_ab())
    query, key, value = attention.split_heads(qkv)
    return *apply_rotary_interleaved(query, key, *position_embeddings), value


def project_lora_with_kernel(
    attention: FusedQKVAttention, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
) -> Heads:
    """Return the heads of base + LoRA branch, all behind the base's GEMM in one kernel."""
    A, B = attention.lora_ab()
    lora_hidden = nn.functional.linear(hidden_states, A.to(hidden_states.dtype))  # (B, T, 3 R)
    qkv = attention.qkv_proj(hidden_states)
    H, K, _ = attention.head_counts
    return apply_qkv_rope_lora(qkv, lora_hidden, B, position_embeddings, HeadLayout(H, K, interleaved=True))


def concatenate_linear(layers: Sequence[nn.Linear]) -> nn.Linear:
    """Return a frozen layer whose output is the outputs of `layers`, which share an input, concatenated."""
    has_bias = layers[0].bias is not None
    fused = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), has_bias, device="meta")
    for name, _ in list(fused.named_parameters()):
        values = torch.cat([getattr(layer, name).detach() for layer in layers])
        setattr(fused, name, nn.Parameter(values, requires_grad=False))
    return fused


class ShardedLinear(nn.Module):
    """
    One GEMM of several linear layers whose weights ZeRO-3 shards and gathers.

    The weights stay in their layers and are concatenated at each call, and again in the backward pass: a kept copy
    would stay on every card. For compiled layers only, elsewhere the GEMM would run twice too.
    """

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__()
        self.layers = tuple(layers)  # a tuple does not register them: they stay where they are

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., sum of the layers' outputs)."""
        return checkpoint(self._concatenate_and_multiply, hidden_states, use_reentrant=False)

    def _concatenate_and_multiply(self, hidden_states: torch.Tensor) -> torch.Tensor:
        bias = None if self.layers[0].bias is None else torch.cat([layer.bias for layer in self.layers])
        return nn.functional.linear(hidden_states, torch.cat([layer.weight for layer in self.layers]), bias)


class MovedToFusedQKV(nn.Module):
    """Placeholder for a base projection whose weight moved into `qkv_proj`; calling it is a bug."""

    def forward(self, *args, **kwargs):
        """Raise RuntimeError."""
        raise RuntimeError("this projection's weight is in qkv_proj: call the attention instead")


def fuse_qkv(model: nn.Module) -> None:
    """
    Fuse the plain or quantised q, k and v of every one of GLM_ATTENTIONS, in place; other attentions stay.

    Several adapters beside them (`MixedLoraLinear`) stay beside the fused layer.
    """

    def build(_: str, attention: nn.Module) -> nn.Module | None:
        if type(attention) not in GLM_ATTENTIONS:
            return None
        layers = [getattr(attention, name) for name in QKV]
        bases = [base_layer_of(layer) for layer in layers]
        kinds = {type(base) for base in bases}
        if kinds == {nn.Linear}:
            qkv_proj = concatenate_linear(bases)
        elif kinds == {QuantizedLinear}:
            qkv_proj = QuantizedLinear.concatenate(bases)
        else:
            return None
        qkv_proj = add_adapters_of(layers, qkv_proj)
        fused = FusedQKVAttention.from_stock(attention, qkv_proj, project_frozen)
        for name in QKV:
            delattr(fused, name)
        return fused

    replace_layers(model, build)


def fuse_lora_qkv(model: nn.Module, sharded: bool = False) -> None:
    """
    Fuse q, k and v of every one of GLM_ATTENTIONS where all three are an adapter over a plain layer, in place.

    Args:
        sharded: whether ZeRO-3 shards the weights, which then stay where they are.
    """

    def build(_: str, attention: nn.Module) -> nn.Module | None:
        if type(attention) not in GLM_ATTENTIONS:
            return None
        layers = [getattr(attention, name) for name in QKV]
        if not all(_is_plain_lora(layer) and type(layer.base_layer) is nn.Linear for layer in layers):
            return None
        if any(layer.has_dropout() for layer in layers):  # three masks, where the fused branch has one input
            return None
        bases = [layer.base_layer for layer in layers]
        fused = FusedQKVAttention.from_stock(
            attention, ShardedLinear(bases) if sharded else concatenate_linear(bases), project_lora
        )
        if not sharded:
            for layer in layers:
                layer.base_layer = MovedToFusedQKV()
        return fused

    replace_layers(model, build)


class FusedChatGLMAttention(ChatGLMAttention):
    """`ChatGLMAttention` whose adapter and rotary embedding run in one kernel behind the base's GEMM."""

    @classmethod
    def from_stock(cls, stock: ChatGLMAttention) -> "FusedChatGLMAttention":
        """Build the layer that stands in for `stock`; its `query_key_value` is a plain `LoraLinear`."""
        return share_state(stock, cls)

    def project_qkv(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> Heads:
        """Return query and key rotated, and value, each (B, H, T, D)."""
        layer = self.query_key_value
        A, B = layer.lora_ab()
        lora_hidden = nn.functional.linear(layer.lora_input(hidden_states), A.to(hidden_states.dtype))  # (B, T, R)
        qkv = layer.base_layer(hidden_states)  # (B, T, 3 H D)
        heads = qkv.shape[-1] // (3 * self.head_dim)
        return apply_qkv_rope_lora(qkv, lora_hidden, B, position_embeddings, HeadLayout(heads, heads, False))


def use_qkv_kernel(model: nn.Module, kernel: ModuleType | None = None) -> None:
    """
    Let every attention with plain adapters on query, key and value compute its heads by the kernel, in place.

    Args:
        model: in 16 bits on a GPU, its GLM attention fused by `fuse_lora_qkv`.
        kernel: utils/kernels/qkv_rope_lora.py (default: where it runs, else nothing changes).
    """
    kernel = load_qkv_rope_lora() if kernel is None else kernel
    if kernel is None:
        return

    def supports(attention: nn.Module, layers: Sequence[nn.Module]) -> bool:
        if not all(_is_plain_lora(layer) for layer in layers):
            return False
        rank = sum(layer.r[layer.active_adapters[0]] for layer in layers)
        return kernel.supports_head_dim(attention.head_dim, rank)

    def build(_: str, attention: nn.Module) -> nn.Module | None:
        if type(attention) is ChatGLMAttention and supports(attention, [attention.query_key_value]):
            return FusedChatGLMAttention.from_stock(attention)
        return None

    replace_layers(model, build)
    for attention in model.modules():
        is_lora = isinstance(attention, FusedQKVAttention) and attention.project is project_lora
        if is_lora and supports(attention, [getattr(attention, name) for name in QKV]):
            attention.project = project_lora_with_kernel


def _is_plain_lora(layer: nn.Module) -> bool:
    return isinstance(layer, LoraLinear) and layer.is_plain()


class _QKVRopeLora(torch.autograd.Function):
    """The operators of utils/kernels/qkv_rope_lora.py, with the shapes given there."""

    @staticmethod
    def forward(ctx, qkv, lora_hidden, B, cos, sin, head_counts, interleaved):
        ctx.save_for_backward(lora_hidden, B, cos, sin)
        ctx.interleaved = interleaved
        return torch.ops.chatglm_family.qkv_rope_lora(qkv, lora_hidden, B, cos, sin, head_counts, interleaved)

    @staticmethod
    def backward(ctx, query_gradient, key_gradient, value_gradient):
        lora_hidden, B, cos, sin = ctx.saved_tensors
        gradient = torch.ops.chatglm_family.qkv_rope_lora_backward(
            query_gradient.contiguous(),
            key_gradient.contiguous(),
            value_gradient.contiguous(),
            cos,
            sin,
            ctx.interleaved,
        )  # (T, C)
        return gradient, gradient @ B, gradient.t() @ lora_hidden, None, None, None, None


class HeadLayout(NamedTuple):
    """How a GEMM's output is divided into heads."""

    query_heads: int
    key_heads: int
    interleaved: bool  # GLM: all queries, all keys, all values; else ChatGLM-6B: query, key, value of each head


def apply_qkv_rope_lora(
    qkv: torch.Tensor,
    lora_hidden: torch.Tensor,
    B: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    layout: HeadLayout,
) -> Heads:
    """
    Return rotated query and key, and value, of qkv + lora_hidden B^T.

    Args:
        qkv: (batch, T, C), the base's output.
        lora_hidden: (batch, T, R), the input times A^T.
        B: (C, R), with the scaling in it.
        position_embeddings: cos and sin as the model's rotary embedding returns them.
        layout: also says which elements of a head turn together, 2 i and 2 i + 1 where it is interleaved.
    """
    cos, sin = position_embeddings
    if len(cos) < len(qkv):  # GLM computes one row of factors for a padded batch; the kernel loads one for each token
        cos, sin = (factor.expand(len(qkv), *factor.shape[1:]) for factor in (cos, sin))
    size = cos.shape[-1]
    query, key, value = _QKVRopeLora.apply(
        qkv.flatten(0, 1),
        lora_hidden.flatten(0, 1),
        B.to(qkv.dtype).contiguous(),
        cos.reshape(-1, size).contiguous(),
        sin.reshape(-1, size).contiguous(),
        [layout.query_heads, layout.key_heads],
        layout.interleaved,
    )  # (batch T, H, D), (batch T, K, D) twice
    query, key, value = (heads.unflatten(0, (len(qkv), -1)).transpose(1, 2) for heads in (query, key, value))
    return query, key, value


def apply_rotary_interleaved(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return what transformers' `apply_rotary_pos_emb` of GLM computes, to the bit.

    Elements 2 i and 2 i + 1 of a head turn by the i-th angle; elements beyond the angles stay. The pairs are exchanged
    by a flip, because torch's compiler makes masked loads of transformers' slices and concatenations.

    Args:
        query: (B, H, T, D).
        key: (B, K, T, D).
        cos: (B, T, R) with R at most D, like `sin`; the second half of R repeats the first and is not used.
    """
    D, R = query.shape[-1], cos.shape[-1]
    cos, sin = (values[:, None, :, : R // 2] for values in (cos, sin))
    cos = nn.functional.pad(cos.repeat_interleave(2, dim=-1), (0, D - R), value=1.0)  # (B, 1, T, D)
    signed_sin = nn.functional.pad(torch.stack((-sin, sin), dim=-1).flatten(-2), (0, D - R))

    def rotate(heads: torch.Tensor) -> torch.Tensor:
        exchanged = heads.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return heads * cos + exchanged * signed_sin

    return rotate(query), rotate(key)
