"""
A checkpoint, which is a directory or a hub id, as a tokenizer and a model: `load_tokenizer`, `load_model`.

`load_model` is imported when it is asked for, because it imports torch, which tokenising does without.
"""

from utils.checkpoint.tokenizer import load_tokenizer

__all__ = ["load_model", "load_tokenizer"]


def __getattr__(name: str):
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from utils.checkpoint.model import load_model

    return load_model
