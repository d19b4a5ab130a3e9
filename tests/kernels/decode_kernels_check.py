"""The kernels of a step of decoding beside torch in float32: on a GPU, or by Triton's interpreter without one."""

import copy
import os
import sys
from pathlib import Path

import torch

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import GlmConfig
from transformers.models.glm.modeling_glm import GlmMLP

from utils.kernels import decode_attention, skinny_gemm
from utils.layers import skinny_linear
from utils.layers.fp8 import quantize_rows

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
EXACT, FP8 = 4e-3, 8e-3  # Hopper adds FP8 products up in some 14 bits (DeepSeek-V3, arXiv:2412.19437, 3.3.2)
DTYPE = torch.bfloat16 if ON_GPU else torch.float16  # numpy, by which the interpreter computes, has no bfloat16
if not ON_GPU:
    decode_attention.supports_pdl = skinny_gemm.supports_pdl = lambda device: False
    skinny_gemm.pipeline_smem = lambda device: skinny_gemm.MAX_PIPELINE_SMEM


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def check(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    distance = ((found.float() - expected).norm() / expected.norm()).item()
    assert distance < tolerance, distance
    assert not decode_attention.arrival_counters(DEVICE).any()


def gated(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def check_products(M: int, N: int, K: int) -> None:
    x, weight, bias = random(M, K), random(N, K), random(N)
    expected = x.float() @ weight.float().T
    check(skinny_gemm.skinny_gemm(x, weight, bias), expected + bias.float(), EXACT)
    check(skinny_gemm.skinny_gemm(x, weight, None, gated=True), gated(expected), EXACT)
    if not ON_GPU:
        return
    (x, x_scale), (weight, weight_scale) = quantize_rows(x), quantize_rows(weight)
    quantized = x, x_scale, weight, weight_scale.t().contiguous()
    expected = (x.float() * x_scale) @ (weight.float() * weight_scale).T
    check(skinny_gemm.fp8_skinny_gemm(*quantized), expected, FP8)
    check(skinny_gemm.fp8_skinny_gemm(*quantized, gated=True), gated(expected), FP8)


def check_modules() -> None:
    """An MLP of plain layers, for a token of each of few rows and for more tokens, which stay with torch."""
    config = GlmConfig(hidden_size=512, intermediate_size=2048, hidden_act="silu")
    converted = GlmMLP(config).to(DEVICE, DTYPE)
    exact = copy.deepcopy(converted).float()
    skinny_linear.convert_layers([converted])
    assert type(converted) is skinny_linear.FewRowsMLP
    assert {type(layer) for layer in (converted.gate_up_proj, converted.down_proj)} == {skinny_linear.FewRowsLinear}
    for shape in ((3, 1, 512), (1, 3, 512), (skinny_gemm.MAX_ROWS + 1, 1, 512)):
        hidden_states = random(*shape)
        check(converted(hidden_states), exact(hidden_states.float()), 4 * EXACT)


def check_attention(B: int, H: int, K: int, D: int, S: int) -> None:
    query, keys, values = random(B, H, 1, D), random(B + 1, K, S, D), random(B + 1, K, S, D)
    last = torch.randint(0, S - 1, (B,), device=DEVICE)
    last[0] = 0
    found = decode_attention.decode_attention(query, keys, values, last, D**-0.5)
    visible = (torch.arange(S, device=DEVICE) <= last[:, None])[:, None, None]
    keys, values = (tensor[:B].float().repeat_interleave(H // K, 1) for tensor in (keys, values))
    scores = (query.float() @ keys.transpose(2, 3) * D**-0.5).masked_fill(~visible, -torch.inf)
    check(found, (scores.softmax(-1) @ values).transpose(1, 2), EXACT)


torch.manual_seed(0)
with torch.no_grad():
    # of each kind that the tiling tells apart, rows and columns that fill no tile, and split along K
    large = ((64, 27392, 4096), (3, 4608, 4096), (64, 4096, 13696), (17, 4000, 16384), (40, 512, 4096))
    for M, N, K in large if ON_GPU else ((5, 100, 256), (33, 130, 384), (17, 70, 8192)):
        check_products(M, N, K)
    check_modules()
    # in one part, in several, of one head for all and of one for each
    for shape in ((3, 8, 2, 32, 256), (2, 32, 2, 128, 512), (5, 4, 4, 64, 128), (520, 4, 1, 16, 64)):
        check_attention(*shape)
print("equal")
