"""The two model classes of the family, how they are split over ranks, and their configurations."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GlmConfig,
    GlmForCausalLM,
    PreTrainedModel,
)
from transformers.models.glm.modeling_glm import GlmDecoderLayer

from utils.models.configuration_chatglm import ChatGLMConfig
from utils.models.convert_checkpoint import glm_config
from utils.models.family import CHATGLM2, Generation
from utils.models.modeling_chatglm import ChatGLMBlock, ChatGLMForConditionalGeneration
from utils.models.tokenization_chatglm import ChatGLMTokenizer

AutoConfig.register("chatglm", ChatGLMConfig)
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
    # The released config maps AutoModel to the class with the head, and its users rely on it.
    auto_class.register(ChatGLMConfig, ChatGLMForConditionalGeneration)
AutoTokenizer.register(ChatGLMConfig, slow_tokenizer_class=ChatGLMTokenizer)


@dataclass(frozen=True)
class TensorParallelPlan:
    """How a block's linear layers are split over ranks: by output rows, or by input columns."""

    block: type[nn.Module]
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    packed_columns: tuple[str, ...] = ()  # two matrices of equal size, one above the other


@dataclass(frozen=True)
class Architecture:
    model_class: type[PreTrainedModel]
    tensor_parallel: TensorParallelPlan


CHATGLM_ARCHITECTURE = Architecture(
    ChatGLMForConditionalGeneration,
    TensorParallelPlan(
        block=ChatGLMBlock,
        columns=("query_key_value", "dense_h_to_4h"),
        rows=("attention.dense", "mlp.dense_4h_to_h"),
    ),
)
GLM_ARCHITECTURE = Architecture(
    GlmForCausalLM,
    TensorParallelPlan(
        block=GlmDecoderLayer,
        columns=("q_proj", "k_proj", "v_proj"),
        rows=("self_attn.o_proj", "mlp.down_proj"),
        packed_columns=("gate_up_proj",),
    ),
)


def model_config(generation: Generation, released: dict[str, Any]) -> ChatGLMConfig | GlmConfig:
    """
    The configuration of the generation's model class.

    Raises:
        ValueError: values under which the model is another one.
    """
    if not generation.is_glm:
        bos = released.get("bos_token_id")
        derived = (
            {} if bos is None else {"mask_token_id": bos - 4, "gmask_token_id": bos - 3}
        )  # early releases name none
        return ChatGLMConfig.from_dict(derived | released)
    if not generation.released_layout:
        return GlmConfig.from_dict(released)
    return glm_config(released, positions_interpolated=generation is CHATGLM2)
