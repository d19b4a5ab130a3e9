"""
ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B in their released layout -> transformers' own `GlmForCausalLM`.

The three are that architecture under other names: measured difference of the logits in float32, 0.0. So there is no
model of ours here, only a table of keys and one of configuration values.
"""

import re
from typing import Any

import torch
from transformers import GlmConfig

LAYER = r"transformer\.encoder\.layers\.(\d+)\."
# Released key -> keys of GlmForCausalLM. More than one target: the rows are split, see `split_sizes`.
KEY_MAP: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"transformer\.embedding\.word_embeddings\.weight", ("model.embed_tokens.weight",)),
    (LAYER + r"input_layernorm\.weight", (r"model.layers.\1.input_layernorm.weight",)),
    (
        LAYER + r"self_attention\.query_key_value\.(weight|weight_scale|bias)",
        tuple(rf"model.layers.\1.self_attn.{name}_proj.\2" for name in "qkv"),
    ),
    (LAYER + r"self_attention\.dense\.(weight|weight_scale)", (r"model.layers.\1.self_attn.o_proj.\2",)),
    (LAYER + r"post_attention_layernorm\.weight", (r"model.layers.\1.post_attention_layernorm.weight",)),
    (LAYER + r"mlp\.dense_h_to_4h\.(weight|weight_scale)", (r"model.layers.\1.mlp.gate_up_proj.\2",)),
    (LAYER + r"mlp\.dense_4h_to_h\.(weight|weight_scale)", (r"model.layers.\1.mlp.down_proj.\2",)),
    (r"transformer\.encoder\.final_layernorm\.weight", ("model.norm.weight",)),
    (r"transformer\.output_layer\.weight", ("lm_head.weight",)),
    # Never used in the released forward beyond its dtype and device.
    (r"transformer\.rotary_pos_emb\.inv_freq", ()),
)
# What the released code computes only under these values; anything else is another model.
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

    `rope_ratio` multiplies the base of the rotary frequencies in ChatGLM3 and GLM-4; in ChatGLM2-6B-32k it divides
    the positions (`positions_interpolated`).

    Raises:
        ValueError: a value under which the released model is not this architecture.
    """
    for name, value in REQUIRED.items():
        if released.get(name, value) != value:
            raise ValueError(f"{name} is {released[name]}, and only {value} is this architecture")
    ratio = released.get("rope_ratio") or 1
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    if positions_interpolated and ratio != 1:
        rope |= {"rope_type": "linear", "factor": float(ratio)}
    else:
        rope["rope_theta"] *= ratio
    eos_token_id = released.get("eos_token_id", 2)
    pad_token_id = released.get("pad_token_id")
    if pad_token_id is None:  # older ChatGLM2 configs; its tokenizer pads with </s>
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
    """Rows of the query, key and value in a released `query_key_value`: [Q; K; V]."""
    group = config.num_key_value_heads * config.head_dim
    return [config.num_attention_heads * config.head_dim, group, group]


def target_keys(key: str) -> tuple[str, ...]:
    """
    Where a released key goes; nowhere for one that is not needed.

    Raises:
        KeyError: the key is not in the table.
    """
    for pattern, targets in KEY_MAP:
        match = re.fullmatch(pattern, key)
        if match:
            return tuple(match.expand(target) for target in targets)
    raise KeyError(key)


def released_modules(layers: int) -> list[str]:
    """The released names of the linear layers and the embedding of a model with so many layers."""
    modules = []
    for pattern, targets in KEY_MAP:
        name = re.sub(r"\\\.(weight|\(weight.*\))$", "", pattern)
        if targets and name != pattern and "norm" not in name:
            numbers = range(layers) if r"(\d+)" in name else ("",)
            modules += [name.replace(r"(\d+)", str(number)).replace("\\", "") for number in numbers]
    return modules


def convert(key: str, tensor: torch.Tensor, config: GlmConfig) -> dict[str, torch.Tensor]:
    """
    A released weight under the names of `GlmForCausalLM`, as views of it.

    Raises:
        KeyError: the key is not in the table.
    """
    targets = target_keys(key)
    parts = tensor.split(split_sizes(config)) if len(targets) > 1 else [tensor] * len(targets)
    return dict(zip(targets, parts, strict=True))


def release(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `convert` for the weights of a whole `GlmForCausalLM`: each under its released name."""
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
