"""
Loaders of the kernels: each returns a module of this room, or None where its kernels cannot run.

`utils.layers` and `utils.inference.engine` call them, and keep torch's operations on None. A kernel runs where Triton
is installed and the GPU is new enough, or, on a machine without a GPU, by Triton's interpreter where the environment
has TRITON_INTERPRET=1, which is slow and for tests. utils/layers/quantization.py imports nvrtc_dequantize.py itself,
which runs without Triton.
"""

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType

import torch

TURING = (7, 5)  # the oldest GPUs that Triton compiles for
AMPERE = (8, 0)  # the first compute capability with bfloat16 GEMMs
HOPPER = (9, 0)


def load_decode_attention() -> ModuleType | None:
    """Return utils/kernels/decode_attention.py, or None where it cannot run."""
    return _load("decode_attention", AMPERE)


def load_prefill_attention() -> ModuleType | None:
    """Return utils/kernels/prefill_attention.py, or None where it cannot run."""
    return _load("prefill_attention", AMPERE)


def load_inference_block() -> ModuleType | None:
    """Return utils/kernels/inference_block.py, or None where it cannot run."""
    return _load("inference_block", AMPERE)


def load_next_token() -> ModuleType | None:
    """Return utils/kernels/next_token.py, or None where it cannot run."""
    return _load("next_token", AMPERE)


def load_skinny_gemm() -> ModuleType | None:
    """Return utils/kernels/skinny_gemm.py, or None where it cannot run."""
    return _load("skinny_gemm", AMPERE)


@cache
def load_hopper_gemm() -> ModuleType | None:
    """Return utils/kernels/hopper_gemm.py, or None where it cannot run: its instructions are Hopper's alone."""
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER
    if not is_hopper or not _is_installed("cuda.bindings"):
        return None
    module = importlib.import_module(f"{__name__}.hopper_gemm")
    return module if module.can_compile() else None


def load_int_weight_gemm() -> ModuleType | None:
    """Return utils/kernels/int_weight_gemm.py, or None where it cannot run."""
    return _load("int_weight_gemm", TURING)


def load_qkv_rope_lora() -> ModuleType | None:
    """Return utils/kernels/qkv_rope_lora.py, or None where it cannot run."""
    return _load("qkv_rope_lora", AMPERE)


def load_grouped_lora() -> ModuleType | None:
    """Return utils/kernels/grouped_lora.py, or None where it cannot run."""
    return _load("grouped_lora", AMPERE)


def load_mlp_activation() -> ModuleType | None:
    """Return utils/kernels/mlp_activation.py, or None where it cannot run."""
    return _load("mlp_activation", AMPERE)


def _load(name: str, capability: tuple[int, int]) -> ModuleType | None:
    if torch.cuda.is_available():
        can_run = torch.cuda.get_device_capability() >= capability
    else:
        can_run = os.environ.get("TRITON_INTERPRET") == "1"
    if not can_run or not _is_installed("triton"):
        return None
    return importlib.import_module(f"{__name__}.{name}")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing
        return False
