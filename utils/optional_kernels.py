"""Kernels that need Triton, which not every machine has."""

import importlib
import importlib.util
from types import ModuleType

import torch

CAPABILITY = (8, 0)  # bfloat16 products
PRODUCT_CAPABILITY = (9, 0)  # on older GPUs it was not measured


def decode_kernels() -> ModuleType | None:
    """utils/decode_kernels.py, or None where it cannot run."""
    return _module("decode_kernels", CAPABILITY)


def few_rows_product() -> ModuleType | None:
    """utils/few_rows_product.py, or None where it cannot run or is not known to be worth it."""
    return _module("few_rows_product", PRODUCT_CAPABILITY)


def heads_kernels() -> ModuleType | None:
    """utils/heads_kernels.py, or None where it cannot run."""
    return _module("heads_kernels", CAPABILITY)


def activation_kernels() -> ModuleType | None:
    """utils/activation_kernels.py, or None where it cannot run."""
    return _module("activation_kernels", CAPABILITY)


def _module(name: str, capability: tuple[int, int]) -> ModuleType | None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < capability:
        return None
    return importlib.import_module(f"utils.{name}") if importlib.util.find_spec("triton") else None
