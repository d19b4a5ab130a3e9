"""
python benchmarks/integer_weights.py

Time INT8 and INT4 weights on a GPU, in microseconds, at the weight shapes of a 6B model. First what they cost to
become bfloat16: by torch's operations, by Triton's kernel and by the CUDA kernel that cpm_kernels compiles. Then GEMMs
of few rows: over the integers, in bfloat16 by cuBLAS and by our skinny GEMM, and torch's own kernels for such weights
(in 4 bits these have a scale for each 128 values). Inputs of GEMMs take turns, so that none is in the cache. The last
line is one JSON object.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.tune_kernels import microseconds, turns
from utils.kernels import load_skinny_gemm
from utils.kernels.int_weight_gemm import dequantize_with_triton, int_weight_gemm
from utils.kernels.nvrtc_dequantize import dequantize_with_nvrtc
from utils.layers.quantization import BITS, dequantize

IMPLEMENTATIONS = {"torch": dequantize, "triton": dequantize_with_triton, "cpm_kernels": dequantize_with_nvrtc}
SHAPES = ((4608, 4096), (4096, 4096), (27392, 4096), (4096, 13696))  # (N, K): qkv, output, gate and up, down
GROUP = 128  # values of a row with one scale, in torch's 4 bits
INNER_K_TILES = 8  # of its packing
ROWS = (1, 8, 16, 32, 64)
DEVICE = torch.device("cuda")


def time_dequantizing(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> dict[str, float]:
    """Time each implementation for weight (N, C) int8."""
    return {
        name: round(microseconds(lambda _, call=implementation: call(weight, scale, bits, torch.bfloat16), DEVICE), 1)
        for name, implementation in IMPLEMENTATIONS.items()
    }


def gemms(N: int, K: int, bits: int) -> dict[str, Callable[[torch.Tensor, int], torch.Tensor]]:
    """Return the GEMMs by name, each called with x (M, K) and the number of its turn."""
    integers = torch.randint(-128, 128, (turns(N * K * bits // 8), N, K * bits // 8), dtype=torch.int8, device=DEVICE)
    full = torch.randn(turns(2 * N * K), N, K, dtype=torch.bfloat16, device=DEVICE)
    scale = torch.rand(N, device=DEVICE).half()

    def ours(x, turn):
        return int_weight_gemm(x, integers[turn % len(integers)], scale, None, bits)

    if bits == 4:
        packed: list[torch.Tensor] = []
        scales = torch.rand(K // GROUP, N, 2, device=DEVICE).bfloat16()  # and zero points

        def torchs(x, turn):
            if not packed:
                for each in integers:
                    packed.append(torch._convert_weight_to_int4pack(each.view(torch.uint8), INNER_K_TILES))
            return torch._weight_int4pack_mm(x, packed[turn % len(packed)], GROUP, scales)

    else:

        def torchs(x, turn):
            return torch._weight_int8pack_mm(x, integers[turn % len(integers)], scale.bfloat16())

    return {
        "integers": ours,
        "torch's integers": torchs,
        "bf16, cuBLAS": lambda x, turn: torch.nn.functional.linear(x, full[turn % len(full)]),
        "bf16, ours": lambda x, turn: load_skinny_gemm().skinny_gemm(x, full[turn % len(full)], None),
    }


def time_gemm(call: Callable[[int], torch.Tensor]) -> float | str:
    """Return the time, or the error of a kernel of torch's that does not run here."""
    try:
        return round(microseconds(call, DEVICE), 1)
    except RuntimeError as error:
        return str(error).partition("\n")[0][:80]


def main() -> None:
    result = {"device": torch.cuda.get_device_name(), "unit": "us"}
    for name, bits in BITS.items():
        for N, K in SHAPES:
            weight = torch.randint(-128, 128, (N, K * bits // 8), dtype=torch.int8, device=DEVICE)
            times = {"dequantize": time_dequantizing(weight, torch.rand(N, device=DEVICE).half(), bits)}
            calls = gemms(N, K, bits)
            for rows in ROWS:
                x = torch.randn(rows, K, dtype=torch.bfloat16, device=DEVICE)
                times[f"{rows} rows"] = {key: time_gemm(partial(call, x)) for key, call in calls.items()}
            result[f"{name} {N}x{K}"] = times
            print(f"{name} {N}x{K}: {json.dumps(times)}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
