"""LoRA adapters. `load_adapter` puts one on a model; the modules attach, save, merge, and mix several in a batch."""

from utils.lora.adapter import load_adapter

__all__ = ["load_adapter"]
