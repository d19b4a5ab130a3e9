"""Kernels that need Triton, which not every machine has."""

import importlib
import importlib.util
from types import ModuleType

import torch

CAPABILITY = (8, 0)  # bfloat16 products


def decode_kernels() -> ModuleType | None:
    """utils/decode_kernels.py, or None where it cannot run."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < CAPABILITY:
        return None
    return importlib.import_module("utils.decode_kernels") if importlib.util.find_spec("triton") else None
