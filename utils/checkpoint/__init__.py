"""
Opens a checkpoint, which is a directory or a hub id: `load_tokenizer`, `load_model`.

A tokenizer is loaded without importing torch, so `load_model` is imported when someone asks for it.
"""

from utils.checkpoint.tokenizer import load_tokenizer

__all__ = ["load_model", "load_tokenizer"]


def __getattr__(name: str):
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from utils.checkpoint.model import load_model

    return load_model
