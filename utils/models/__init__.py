"""
What the ChatGLM family is, without remote code: generations, tokenizers, chat templates, models, conversions.

The classes exported here are ChatGLM-6B's own; asking for one registers all with transformers' Auto classes. They are
imported when asked for, because models import torch, which tokenising does without.
"""

from importlib import import_module

_MODULE_OF = {
    "ChatGLMConfig": "configuration_chatglm",
    "ChatGLMForConditionalGeneration": "modeling_chatglm",
    "ChatGLMModel": "modeling_chatglm",
    "ChatGLMTokenizer": "tokenization_chatglm",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(f"{__name__}.architectures")  # registers the classes
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
