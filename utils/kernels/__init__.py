"""Kernels that need Triton, which not every machine has."""

import importlib
import importlib.util
from types import ModuleType

import torch

CAPABILITY = (8, 0)  # bfloat16 products
PRODUCT_CAPABILITY = (9, 0)  # on older GPUs it was not measured


def load_decode_attention() -> ModuleType | None:
    """utils/kernels/decode_attention.py, or None where it cannot run."""
    return _module("decode_attention", CAPABILITY)


def load_skinny_gemm() -> ModuleType | None:
    """utils/kernels/skinny_gemm.py, or None where it cannot run or is not known to be worth it."""
    return _module("skinny_gemm", PRODUCT_CAPABILITY)


def load_qkv_rope_lora() -> ModuleType | None:
    """utils/kernels/qkv_rope_lora.py, or None where it cannot run."""
    return _module("qkv_rope_lora", CAPABILITY)


def load_mlp_activation() -> ModuleType | None:
    """utils/kernels/mlp_activation.py, or None where it cannot run."""
    return _module("mlp_activation", CAPABILITY)


def _module(name: str, capability: tuple[int, int]) -> ModuleType | None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < capability:
        return None
    return importlib.import_module(f"{__name__}.{name}") if importlib.util.find_spec("triton") else None
