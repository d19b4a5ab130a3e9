"""
The model classes of the family, each with its configuration, key map and tensor-parallel plan.

Importing this module registers ChatGLM-6B's classes with transformers' Auto classes.

`architecture_of(generation)` gives the entry that a row of `utils/models/family.py` names. It is here and not there
because model classes import torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.glm.modeling_glm import GlmAttention, GlmMLP
from transformers.models.glm4.modeling_glm4 import Glm4Attention, Glm4MLP

from utils.models.configuration_chatglm import ChatGLMConfig
from utils.models.convert_checkpoint import glm_config, to_glm
from utils.models.family import Generation
from utils.models.modeling_chatglm import ChatGLMForConditionalGeneration
from utils.models.tokenization_chatglm import ChatGLMTokenizer

# Stock layers that compute the same: the two architectures differ in the norms of a block.
GLM_ATTENTIONS = (GlmAttention, Glm4Attention)  # rotary embedding on interleaved pairs, fewer key/value heads
GLM_MLPS = (GlmMLP, Glm4MLP)  # gate and up in one matrix

AutoConfig.register("chatglm", ChatGLMConfig)
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
    # The released config maps AutoModel to the class with the head, and its users rely on it.
    auto_class.register(ChatGLMConfig, ChatGLMForConditionalGeneration)
AutoTokenizer.register(ChatGLMConfig, slow_tokenizer_class=ChatGLMTokenizer)


@dataclass(frozen=True)
class TensorParallelPlan:
    """How the linear layers of a decoder block are split over ranks, by the ends of their names."""

    column_parallel: tuple[str, ...]  # each rank has some of the outputs
    row_parallel: tuple[str, ...]  # each rank has some of the inputs, and the outputs are summed
    packed_column_parallel: tuple[str, ...] = ()  # two matrices of equal size in one, each split by its outputs


@dataclass(frozen=True)
class Architecture:
    """A model class, and how a checkpoint's files become one of it."""

    model_class: type[PreTrainedModel]
    make_config: Callable[[dict[str, Any]], PretrainedConfig]  # of a config.json; ValueError: it is another model's
    tensor_parallel: TensorParallelPlan
    # A weight's key in the files -> its weights under the names of `model_class`; None: the names are the same.
    convert: Callable[[str, torch.Tensor, PretrainedConfig], dict[str, torch.Tensor]] | None = None
    has_prefix: bool = False  # the prompt sees itself in both directions, and positions are 2-D


def chatglm_config(released: dict[str, Any]) -> ChatGLMConfig:
    """The configuration of ChatGLM-6B; early releases leave out the ids of two special tokens."""
    bos = released.get("bos_token_id")
    if bos is None:
        return ChatGLMConfig.from_dict(released)
    return ChatGLMConfig.from_dict({"mask_token_id": bos - 4, "gmask_token_id": bos - 3} | released)


CHATGLM_PLAN = TensorParallelPlan(
    column_parallel=("query_key_value", "dense_h_to_4h"),
    row_parallel=("attention.dense", "mlp.dense_4h_to_h"),
)
GLM_PLAN = TensorParallelPlan(
    column_parallel=("q_proj", "k_proj", "v_proj"),
    row_parallel=("self_attn.o_proj", "mlp.down_proj"),
    packed_column_parallel=("gate_up_proj",),
)
ARCHITECTURES = {
    "chatglm": Architecture(ChatGLMForConditionalGeneration, chatglm_config, CHATGLM_PLAN, has_prefix=True),
    "released_chatglm2": Architecture(
        GlmForCausalLM, partial(glm_config, positions_interpolated=True), GLM_PLAN, to_glm
    ),
    "released_glm": Architecture(GlmForCausalLM, partial(glm_config, positions_interpolated=False), GLM_PLAN, to_glm),
    "glm": Architecture(GlmForCausalLM, GlmConfig.from_dict, GLM_PLAN),
    "glm4": Architecture(Glm4ForCausalLM, Glm4Config.from_dict, GLM_PLAN),
}


def architecture_of(generation: Generation) -> Architecture:
    """The model class, configuration and key map of a generation."""
    return ARCHITECTURES[generation.architecture]
