"""
ChatGLM-6B (version 1): input ids -> logits, with the parameter names of the released checkpoints.

transformers has no class for it (ChatGLM2-6B and later are its `GlmForCausalLM`). Source of each quirk below, which
moves the logits: `modeling_chatglm.py` of THUDM/chatglm-6b.

Shapes: B batch, T tokens, S tokens in the KV cache and these T, H heads, D head size, E hidden size, V vocabulary.
"""

import dataclasses

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from utils.models.configuration_chatglm import ChatGLMConfig

# sqrt(2 * 28) whatever `num_layers` says: the released blocks take it from a default that the model never overrides.
RESIDUAL_SCALE = (2 * 28) ** 0.5
# The field of a model's output that holds the KV cache: transformers 5.24 renamed it to `cache`.
CACHE_KEY = "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"


def derive_position_ids(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: ChatGLMConfig
) -> torch.Tensor:
    """
    The 2-D positions of whole sequences, as the released model derives them.

    Before `<sop>` (the prefix) the first coordinate counts tokens and the second is 0. From `<sop>` on, the first
    stays at `[gMASK]` (at `[MASK]` without one) and the second counts 1, 2, 3... Both are 0 on padding.

    Args:
        input_ids: (B, T) int64, each sequence with a `<sop>` and a mask token.
        attention_mask: (B, T), 0 on padding and else 1. None, or a mask of more dimensions, is no padding.

    Returns:
        (B, 2, T) int64.

    Raises:
        ValueError: a sequence has no `<sop>`, or neither `[gMASK]` nor `[MASK]`.
    """
    if attention_mask is None or attention_mask.ndim != 2:  # 4-D: a mask of attention, which says nothing of padding
        attention_mask = torch.ones_like(input_ids)
    real = attention_mask.to(input_ids.dtype)  # (B, T)
    index = (real.cumsum(-1) - 1).clamp(min=0)  # (B, T) number among the sequence's real tokens
    is_bos = (input_ids == config.bos_token_id) & real.bool()
    is_gmask = (input_ids == config.gmask_token_id) & real.bool()
    is_mask = (input_ids == config.mask_token_id) & real.bool()
    has_gmask = is_gmask.any(-1, keepdim=True)  # (B, 1)
    anchor = torch.where(has_gmask, is_gmask, is_mask).to(torch.int8)  # (B, T)
    if not bool((is_bos.any(-1) & (has_gmask.squeeze(-1) | is_mask.any(-1))).all()):
        raise ValueError(
            f"every sequence of input_ids needs a <sop> ({config.bos_token_id}) and a [gMASK] "
            f"({config.gmask_token_id}) or [MASK] ({config.mask_token_id}): positions and mask derive from them"
        )
    context_length = index.gather(-1, is_bos.to(torch.int8).argmax(-1, keepdim=True))  # (B, 1)
    mask_position = index.gather(-1, anchor.argmax(-1, keepdim=True))  # (B, 1)
    in_prefix = index < context_length
    positions = torch.where(in_prefix, index, mask_position)
    block_positions = torch.where(in_prefix, 0, index - context_length + 1)
    return torch.stack((positions * real, block_positions * real), dim=1)


def prefix_mask_function(position_ids: torch.Tensor):
    """A mask function that shows every query the prefix: second coordinate 0 in (B, 2, T)."""
    in_prefix = position_ids[:, 1] == 0  # (B, T)
    last = in_prefix.shape[1] - 1

    def mask_function(batch_idx, head_idx, q_idx, kv_idx):
        # A static cache is longer than the prompt.
        return in_prefix[batch_idx, kv_idx.clamp(max=last)] & (kv_idx <= last)

    return mask_function


def same_sequence_mask_function(inputs_embeds: torch.Tensor, cu_seq_lens: torch.Tensor | None):
    """A mask function that separates packed sequences with bounds `cu_seq_lens` (N + 1,)."""
    if cu_seq_lens is None:
        return None
    tokens = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
    sequence = torch.bucketize(tokens, cu_seq_lens[1:], right=True)  # (T,)

    def mask_function(batch_idx, head_idx, q_idx, kv_idx):
        return sequence[q_idx] == sequence[kv_idx]

    return mask_function


class ChatGLMRotaryEmbedding(nn.Module):
    """2-D rotary embedding: each coordinate turns one half of the head."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.dim = config.hidden_size // config.num_attention_heads // 2
        self._inv_freq: torch.Tensor | None = None

    def inv_freq(self, device: torch.device) -> torch.Tensor:
        """Frequencies (D/4,) float32, rounded to float16 as released; those in checkpoints are ignored."""
        if self._inv_freq is None or self._inv_freq.device != device:
            exponent = torch.arange(0, self.dim, 2, dtype=torch.float32, device="cpu") / self.dim
            self._inv_freq = (1.0 / 10000**exponent).half().float().to(device)
        return self._inv_freq

    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids (B, 2, T) -> cosine and sine, (B, 1, T, D) in the dtype of `hidden_states`."""
        angles = position_ids[..., None].float() * self.inv_freq(hidden_states.device)  # (B, 2, T, D/4)
        angles = torch.cat((angles, angles), dim=-1)  # (B, 2, T, D/2)
        angles = torch.cat((angles[:, 0], angles[:, 1]), dim=-1).unsqueeze(1)  # (B, 1, T, D)
        return angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)


def rotate_half_2d(x: torch.Tensor) -> torch.Tensor:
    """Rotate by 90 degrees the pairs, D/4 apart, in each half of (..., D)."""
    x1, x2, x3, x4 = x.chunk(4, dim=-1)
    return torch.cat((-x2, x1, -x4, x3), dim=-1)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention with an additive mask and softmax in float32, in plain operations."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights  # (B, T, H, D), (B, H, T, S)


class ChatGLMAttention(nn.Module):
    """Multi-head attention with query, key and value in one linear layer."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        # The released code divides the query by (layer + 1) and multiplies the scores by it again, in float32.
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def project_qkv(self, hidden_states: torch.Tensor, position_embeddings) -> tuple[torch.Tensor, ...]:
        """Query and key rotated, and value, each (B, H, T, D)."""
        B, T, _ = hidden_states.shape
        # The outputs of query_key_value go head by head: [q0 k0 v0 q1 k1 v1 ...]. Under tensor parallelism H is the
        # number of this rank's heads.
        qkv = self.query_key_value(hidden_states).view(B, T, -1, 3 * self.head_dim).transpose(1, 2)  # (B, H, T, 3D)
        query, key, value = qkv.chunk(3, dim=-1)  # (B, H, T, D) each
        cos, sin = position_embeddings
        query = query * cos + rotate_half_2d(query) * sin
        key = key * cos + rotate_half_2d(key) * sin
        return query, key, value

    def forward(self, hidden_states, position_embeddings, attention_mask=None, cache: Cache | None = None, **kwargs):
        query, key, value = self.project_qkv(hidden_states, position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)  # (B, H, S, D) each
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )  # (B, T, H, D)
        return self.dense(output.flatten(-2)), weights  # (B, T, E)


class ChatGLMMLP(nn.Module):
    """Two linear layers and a tanh-approximated GELU; no gate, whatever the released name (GLU)."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh"))


class ChatGLMBlock(GradientCheckpointingLayer):
    """A decoder block whose residual is the scaled output of each LayerNorm."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, cache=None, **kwargs) -> torch.Tensor:
        hidden_states = self.input_layernorm(hidden_states)  # (B, T, E)
        attention_output, _ = self.attention(hidden_states, position_embeddings, attention_mask, cache, **kwargs)
        hidden_states = self.post_attention_layernorm(hidden_states * RESIDUAL_SCALE + attention_output)
        return hidden_states * RESIDUAL_SCALE + self.mlp(hidden_states)


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What transformers asks of every model class."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": ChatGLMBlock, "attentions": ChatGLMAttention}
    # Released checkpoints have the rotary frequencies, which the released code ignores too.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]


class ChatGLMModel(ChatGLMPreTrainedModel):
    """ChatGLM-6B without its head: input ids (B, T) -> hidden states (B, T, E)."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ChatGLMBlock(config, layer_idx) for layer_idx in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.rotary_emb = ChatGLMRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module):
        self.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        cache = cache if cache is not None else past_key_values
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past_length = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            if input_ids is None or past_length:
                raise ValueError("position_ids (B, 2, T) must be given with inputs_embeds or a filled cache")
            position_ids = derive_position_ids(input_ids, attention_mask, self.config)
        attention_mask = create_causal_mask(
            self.config,
            inputs_embeds,
            attention_mask,
            cache,
            None,
            or_mask_function=None if past_length else prefix_mask_function(position_ids),
            and_mask_function=same_sequence_mask_function(inputs_embeds, kwargs.get("cu_seq_lens_q")),
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds  # (B, T, E), as after every layer
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings, attention_mask, cache=cache, **kwargs)
        hidden_states = self.final_layernorm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_KEY: cache})


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    """
    ChatGLM-6B with its language-model head, tied to the word embeddings.

    `forward` takes `input_ids` (B, T) int64, `attention_mask` (B, T), 0 on padding on either side, `labels` (B, T),
    -100 where there is no loss, and `position_ids` (B, 2, T), derived if not given; the prefix mask follows from them.
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True):
        # If a checkpoint holds both and they differ, the released code keeps the embedding, transformers keeps both.
        if missing_keys is not None and "transformer.word_embeddings.weight" not in missing_keys:
            missing_keys.update(target for target in self.all_tied_weights_keys if target == "lm_head.weight")
        super().tie_weights(missing_keys=missing_keys, recompute_mapping=recompute_mapping)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache if cache is not None else past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])  # (B, T, V)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_KEY: outputs.get(CACHE_KEY)},
        )

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        # Positions depend on where <sop> is, so the whole sequence decides them, not the last token alone.
        kwargs.pop("position_ids", None)
        position_ids = derive_position_ids(input_ids, attention_mask, self.config)
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        inputs["position_ids"] = position_ids[..., -inputs["input_ids"].shape[1] :]  # (B, 2, T)
        return inputs

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        """Leave the mask to `forward`, which knows the prefix."""
        return attention_mask
