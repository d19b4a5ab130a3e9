"""Runs the training script in float16 without a GPU, to test DeepSpeed's loss scaling."""

import os
import runpy
import sys
from argparse import Namespace

import utils.training.run_config  # before DeepSpeed, because it sets DeepSpeed's device

# isort: split
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator


def resolve_precision(values: Namespace) -> tuple[torch.dtype, str]:
    os.environ["ACCELERATE_MIXED_PRECISION"] = "fp16"
    values.fp16 = True
    return torch.float16, "float16 without a GPU"


utils.training.run_config.resolve_precision = resolve_precision
CPU_Accelerator.is_fp16_supported = lambda self: True
CPU_Accelerator.supported_dtypes = lambda self: [torch.float32, torch.float16]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
