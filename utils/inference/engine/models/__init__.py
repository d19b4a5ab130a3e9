"""Which architecture a model is, for the engine: `serve(model)`."""

from transformers import PreTrainedModel

from utils.inference.engine.models.base import ServedModel
from utils.inference.engine.models.chatglm import ServedChatGLM
from utils.inference.engine.models.glm import ServedGlm
from utils.models.modeling_chatglm import ChatGLMForConditionalGeneration


def serve(model: PreTrainedModel) -> ServedModel:
    """Return the model as the engine computes with it."""
    return (ServedChatGLM if isinstance(model, ChatGLMForConditionalGeneration) else ServedGlm)(model)
