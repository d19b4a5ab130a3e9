"""
The released layout of ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B -> transformers' own `GlmForCausalLM`.

The three are that architecture under other names (measured difference of the logits in float32: 0.0), so they need no
model of ours, only the table of keys and the configuration values below. `utils/checkpoint/model.py` converts weights
as it reads them, `utils/lora/formats.py` the names in adapters. `transformers` has its own conversion only as a
script, for whole directories.
"""

import re
from typing import Any

import torch
from transformers import GlmConfig

RELEASED_LAYER = r"transformer\.encoder\.layers\.(\d+)\."
# Released key -> keys of GlmForCausalLM. With three targets the outputs are split, see `split_sizes`.
KEY_MAP: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"transformer\.embedding\.word_embeddings\.weight", ("model.embed_tokens.weight",)),
    (RELEASED_LAYER + r"input_layernorm\.weight", (r"model.layers.\1.input_layernorm.weight",)),
    (
        RELEASED_LAYER + r"self_attention\.query_key_value\.(weight|weight_scale|bias)",
        tuple(rf"model.layers.\1.self_attn.{name}_proj.\2" for name in "qkv"),
    ),
    (RELEASED_LAYER + r"self_attention\.dense\.(weight|weight_scale)", (r"model.layers.\1.self_attn.o_proj.\2",)),
    (RELEASED_LAYER + r"post_attention_layernorm\.weight", (r"model.layers.\1.post_attention_layernorm.weight",)),
    (RELEASED_LAYER + r"mlp\.dense_h_to_4h\.(weight|weight_scale)", (r"model.layers.\1.mlp.gate_up_proj.\2",)),
    (RELEASED_LAYER + r"mlp\.dense_4h_to_h\.(weight|weight_scale)", (r"model.layers.\1.mlp.down_proj.\2",)),
    (r"transformer\.encoder\.final_layernorm\.weight", ("model.norm.weight",)),
    (r"transformer\.output_layer\.weight", ("lm_head.weight",)),
    # The released forward uses only its dtype and device.
    (r"transformer\.rotary_pos_emb\.inv_freq", ()),
)
# The released code has branches for other values; no release uses them, and they are another architecture.
REQUIRED = {
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "post_layer_norm": True,
    "rmsnorm": True,
    "multi_query_attention": True,
}


def glm_config(released: dict[str, Any], positions_interpolated: bool) -> GlmConfig:
    """
    The `GlmConfig` of a released `config.json`.

    Args:
        positions_interpolated: what `rope_ratio` does. In ChatGLM2-6B-32k it divides the positions; in ChatGLM3-6B and
            GLM-4-9B it multiplies the base of the rotary frequencies.

    Raises:
        ValueError: a value that makes it another architecture (see REQUIRED).
    """
    for name, value in REQUIRED.items():
        if released.get(name, value) != value:
            raise ValueError(f"{name} is {released[name]}, and must be {value}")
    ratio = released.get("rope_ratio") or 1
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    if positions_interpolated and ratio != 1:
        rope |= {"rope_type": "linear", "factor": float(ratio)}
    else:
        rope["rope_theta"] *= ratio
    eos_token_id = released.get("eos_token_id", 2)
    pad_token_id = released.get("pad_token_id")
    if pad_token_id is None:  # early ChatGLM2-6B; its tokenizer pads with </s>
        pad_token_id = eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id
    return GlmConfig(
        vocab_size=released["padded_vocab_size"],
        hidden_size=released["hidden_size"],
        intermediate_size=released["ffn_hidden_size"],
        num_hidden_layers=released["num_layers"],
        num_attention_heads=released["num_attention_heads"],
        num_key_value_heads=released["multi_query_group_num"],
        head_dim=released["kv_channels"],
        rms_norm_eps=released["layernorm_epsilon"],
        max_position_embeddings=released["seq_length"],
        rope_parameters=rope,
        attention_bias=True,
        attention_dropout=released.get("attention_dropout", 0.0),
        tie_word_embeddings=False,
        use_cache=True,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        bos_token_id=None,
    )


def split_sizes(config: GlmConfig) -> list[int]:
    """The outputs of Q, K and V in a released `query_key_value`, [Q; K; V]."""
    group = config.num_key_value_heads * config.head_dim
    return [config.num_attention_heads * config.head_dim, group, group]


def target_keys(key: str) -> tuple[str, ...]:
    """
    The keys of `GlmForCausalLM` for a released key; none if it is not needed.

    Raises:
        KeyError: the key is not in the table.
    """
    for pattern, targets in KEY_MAP:
        match = re.fullmatch(pattern, key)
        if match:
            return tuple(match.expand(target) for target in targets)
    raise KeyError(key)


def released_modules(layers: int) -> list[str]:
    """The released names of linear layers and embedding for `layers` blocks."""
    modules = []
    for pattern, targets in KEY_MAP:
        name = re.sub(r"\\\.(weight|\(weight.*\))$", "", pattern)
        if targets and name != pattern and "norm" not in name:
            numbers = range(layers) if r"(\d+)" in name else ("",)
            modules += [name.replace(r"(\d+)", str(number)).replace("\\", "") for number in numbers]
    return modules


def to_glm(key: str, tensor: torch.Tensor, config: GlmConfig) -> dict[str, torch.Tensor]:
    """
    A released weight under its names in `GlmForCausalLM`, as views of it.

    Raises:
        KeyError: the key is not in the table.
        RuntimeError: the shape does not fit `config`.
    """
    targets = target_keys(key)
    tensors = tensor.split(split_sizes(config)) if len(targets) > 1 else [tensor] * len(targets)
    return dict(zip(targets, tensors, strict=True))


def to_released_layout(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a whole `GlmForCausalLM` under their released names: the inverse of `to_glm`."""
    layers = {key.split(".")[2] for key in weights if key.startswith("model.layers.")}
    released = {}
    for pattern, targets in KEY_MAP:
        for layer in layers if r"(\d+)" in pattern else ("",):
            for kind in ("weight", "bias"):
                keys = [target.replace(r"\1", layer).replace(r"\2", kind) for target in targets]
                if keys and all(key in weights for key in keys):
                    name = re.sub(r"\(weight.*\)", kind, pattern).replace(r"(\d+)", layer).replace("\\", "")
                    released[name] = torch.cat([weights[key] for key in keys]) if len(keys) > 1 else weights[keys[0]]
    return released
