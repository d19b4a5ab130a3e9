"""
python benchmarks/dequantize.py

Time INT8 and INT4 weights becoming bfloat16 on a GPU: by torch's operations, by Triton's kernel and by the CUDA kernel
that cpm_kernels compiles, in microseconds, at the weight shapes of a 6B model. The last line is one JSON object.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.kernels.int_weight_gemm import dequantize_with_triton
from utils.kernels.nvrtc_dequantize import dequantize_with_nvrtc
from utils.layers.quantization import BITS, dequantize

IMPLEMENTATIONS = {"torch": dequantize, "triton": dequantize_with_triton, "cpm_kernels": dequantize_with_nvrtc}
SHAPES = ((4608, 4096), (4096, 4096), (27392, 4096), (4096, 13696))  # (N, K): qkv, output, gate and up, down
WARMUP_CALLS = 3
TIMED_CALLS = 50


def microseconds(call) -> float:
    """GPU time of one call, the caches warm from the call before."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(WARMUP_CALLS):
        call()
    start.record()
    for _ in range(TIMED_CALLS):
        call()
    end.record()
    torch.cuda.synchronize()
    return round(1000 * start.elapsed_time(end) / TIMED_CALLS, 1)


def main() -> None:
    result = {"device": torch.cuda.get_device_name(), "unit": "us"}
    for name, bits in BITS.items():
        for N, K in SHAPES:
            weight = torch.randint(-128, 128, (N, K * bits // 8), dtype=torch.int8, device="cuda")
            scale = torch.rand(N, device="cuda").half()
            times = {
                key: microseconds(partial(implementation, weight, scale, bits, torch.bfloat16))
                for key, implementation in IMPLEMENTATIONS.items()
            }
            result[f"{name} {N}x{K}"] = times
            print(f"{name} {N}x{K}: {times}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
