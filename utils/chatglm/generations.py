"""The generations of the family: how each is recognised, and what differs between them beyond the model class."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from utils.chatglm.configuration_chatglm import ChatGLMConfig
from utils.chatglm.modeling_chatglm import ChatGLMBlock, ChatGLMForConditionalGeneration
from utils.chatglm.released_glm import glm_config
from utils.chatglm.tokenization_chatglm import ChatGLMTokenizer
from utils.chatglm.tokenization_chatglm2 import ROLE_TOKENS, ChatGLM2Tokenizer, ChatGLM3Tokenizer
from utils.chatglm.tokenization_glm4 import ChatGLM4Tokenizer, is_tiktoken_file

from torch import nn
from transformers import AutoTokenizer, GlmConfig, GlmForCausalLM, PreTrainedModel
from transformers.models.glm.modeling_glm import GlmDecoderLayer


@dataclass(frozen=True)
class TensorParallelPlan:
    """How a block's linear layers are split over ranks: by output rows, or by input columns."""

    block: type[nn.Module]
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    packed_columns: tuple[str, ...] = ()  # two matrices of equal size, one above the other


GLM_PLAN = TensorParallelPlan(
    block=GlmDecoderLayer,
    columns=("q_proj", "k_proj", "v_proj"),
    rows=("self_attn.o_proj", "mlp.down_proj"),
    packed_columns=("gate_up_proj",),
)


@dataclass(frozen=True)
class Generation:
    """One generation of the family."""

    name: str
    model_class: type[PreTrainedModel]
    tokenizer_class: Any  # AutoTokenizer for -hf checkpoints, whose tokenizer.json transformers reads itself
    vocab_file: str
    lora_target_modules: tuple[str, ...]
    linear_layers: tuple[str, ...]  # of a block; what is quantised
    tensor_parallel: TensorParallelPlan = field(repr=False)
    released_layout: bool = True  # of a GlmForCausalLM: keys and config are those of the release


CHATGLM = Generation(
    name="ChatGLM-6B",
    model_class=ChatGLMForConditionalGeneration,
    tokenizer_class=ChatGLMTokenizer,
    vocab_file="ice_text.model",
    lora_target_modules=("query_key_value",),
    linear_layers=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    tensor_parallel=TensorParallelPlan(
        block=ChatGLMBlock,
        columns=("query_key_value", "dense_h_to_4h"),
        rows=("attention.dense", "mlp.dense_4h_to_h"),
    ),
)
QKV = ("q_proj", "k_proj", "v_proj")
GLM = (QKV, (*QKV, "o_proj", "gate_up_proj", "down_proj"), GLM_PLAN)
CHATGLM2 = Generation("ChatGLM2-6B", GlmForCausalLM, ChatGLM2Tokenizer, "tokenizer.model", *GLM)
CHATGLM3 = Generation("ChatGLM3-6B", GlmForCausalLM, ChatGLM3Tokenizer, "tokenizer.model", *GLM)
GLM4 = Generation("GLM-4-9B", GlmForCausalLM, ChatGLM4Tokenizer, "tokenizer.model", *GLM)
GLM4_HF = Generation("GLM-4-9B-hf", GlmForCausalLM, AutoTokenizer, "tokenizer.json", *GLM, released_layout=False)
# What a merged checkpoint of theirs becomes: saved by transformers, with the tokenizer of the release beside it.
MERGED = {generation.name: replace(generation, released_layout=False) for generation in (CHATGLM2, CHATGLM3)}
MERGED_FROM = "chatglm_generation"  # the key of `config.json` that says which it was
SUPPORTED = (
    "ChatGLM-6B (-int4, -int8), ChatGLM2-6B (-32k, -int4), ChatGLM3-6B (-base, -32k, -128k), GLM-4-9B (-chat, -hf)"
)


def identify(directory: Path, config: dict[str, Any]) -> Generation | None:
    """
    The generation of a checkpoint directory with this `config.json`; None where it is none of them.

    ChatGLM2 and ChatGLM3 have one architecture and one SentencePiece model; what tells them apart is what their files
    say of themselves: the name they were released under, or the role tokens that only ChatGLM3 has.
    """
    if config.get("model_type") == "glm":
        return MERGED.get(config.get(MERGED_FROM), GLM4_HF)
    if config.get("model_type") != "chatglm":
        return None
    if "inner_hidden_size" in config:
        return CHATGLM
    if "ffn_hidden_size" not in config or "vision_config" in config:
        return None
    vocab_file = directory / "tokenizer.model"
    if vocab_file.is_file() and is_tiktoken_file(vocab_file):
        return GLM4
    tokenizer_config = {}
    if (directory / "tokenizer_config.json").is_file():
        tokenizer_config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    names = (config.get("_name_or_path"), tokenizer_config.get("name_or_path"), directory.resolve().name)
    for name in names:
        for generation, mark in ((CHATGLM2, "chatglm2"), (CHATGLM3, "chatglm3"), (GLM4, "glm-4")):
            if mark in str(name).lower():
                return generation
    code = directory / "tokenization_chatglm.py"  # read as text, never run
    said = json.dumps(tokenizer_config) + (code.read_text(encoding="utf-8") if code.is_file() else "")
    return CHATGLM3 if ROLE_TOKENS[1] in said else CHATGLM2


def model_config(generation: Generation, released: dict[str, Any]) -> ChatGLMConfig | GlmConfig:
    """
    The configuration of the generation's model class.

    Raises:
        ValueError: values under which the model is another one.
    """
    if generation is CHATGLM:
        return ChatGLMConfig.from_dict(released)
    if not generation.released_layout:
        return GlmConfig.from_dict(released)
    return glm_config(released, positions_interpolated=generation is CHATGLM2)
