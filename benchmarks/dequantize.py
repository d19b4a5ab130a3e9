"""
python benchmarks/dequantize.py

INT8 and INT4 weights brought back to bfloat16 on a GPU: torch's operations, Triton's kernel and the one that
cpm_kernels compiles, at the shapes of a 6B model, in microseconds. The last line is one JSON object.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.kernels import int_weight_gemm, nvrtc_dequantize
from utils.layers import quantization

KERNELS = {"torch": quantization, "triton": int_weight_gemm, "cpm_kernels": nvrtc_dequantize}
SHAPES = ((4608, 4096), (4096, 4096), (27392, 4096), (4096, 13696))
ROUNDS = 50


def microseconds(call) -> float:
    """The GPU's time for one call, with what the caches hold from the one before."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        call()
    start.record()
    for _ in range(ROUNDS):
        call()
    end.record()
    torch.cuda.synchronize()
    return round(1000 * start.elapsed_time(end) / ROUNDS, 1)


def main() -> None:
    result = {"device": torch.cuda.get_device_name(), "unit": "us"}
    for name, bits in quantization.BITS.items():
        for rows, columns in SHAPES:
            weight = torch.randint(-128, 128, (rows, columns * bits // 8), dtype=torch.int8, device="cuda")
            case = weight, torch.rand(rows, device="cuda").half(), bits, torch.bfloat16
            times = {key: microseconds(partial(kernels.dequantize, *case)) for key, kernels in KERNELS.items()}
            result[f"{name} {rows}x{columns}"] = times
            print(f"{name} {rows}x{columns}: {times}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
