"""The ChatGLM family without remote code. Importing it registers ChatGLM-6B with transformers' Auto classes."""

from utils.chatglm.configuration_chatglm import ChatGLMConfig
from utils.chatglm.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel
from utils.chatglm.tokenization_chatglm import ChatGLMTokenizer

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

AutoConfig.register("chatglm", ChatGLMConfig)
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
    # The released config maps AutoModel to the class with the head, and its users rely on it.
    auto_class.register(ChatGLMConfig, ChatGLMForConditionalGeneration)
AutoTokenizer.register(ChatGLMConfig, slow_tokenizer_class=ChatGLMTokenizer)

__all__ = ["ChatGLMConfig", "ChatGLMForConditionalGeneration", "ChatGLMModel", "ChatGLMTokenizer"]
