"""
The ChatGLM family without remote code. The classes of ChatGLM-6B are registered with transformers' Auto classes by
whoever asks for a model; a tokenizer alone is had without importing torch.
"""

from importlib import import_module

_OWNERS = {
    "ChatGLMConfig": "configuration_chatglm",
    "ChatGLMForConditionalGeneration": "modeling_chatglm",
    "ChatGLMModel": "modeling_chatglm",
    "ChatGLMTokenizer": "tokenization_chatglm",
}
__all__ = list(_OWNERS)


def __getattr__(name: str):
    if name not in _OWNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(f"{__name__}.architectures")  # registers them
    return getattr(import_module(f"{__name__}.{_OWNERS[name]}"), name)
