"""LoRA adapters: attach, save, load, merge. `load_adapter` puts one on a model."""

from utils.lora.adapter import load_adapter

__all__ = ["load_adapter"]
