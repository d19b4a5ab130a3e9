"""Layers whose loaders find the kernels: MLPs, attention with adapters and skinny linear layers, beside stock ones."""

import copy

import pytest
import torch
from kernel_checks import (
    DEVICE,
    DTYPE,
    FP8_ROUNDING,
    ON_GPU,
    ROUNDING,
    assert_close,
    fp8_on_a_gpu,
    random,
)
from torch import nn
from transformers import Glm4Config, Glm4ForCausalLM, GlmConfig, GlmForCausalLM
from transformers.models.glm.modeling_glm import GlmAttention, GlmMLP, GlmRotaryEmbedding
from transformers.models.glm4.modeling_glm4 import Glm4Attention, Glm4MLP, Glm4RotaryEmbedding

from utils.kernels import skinny_gemm
from utils.layers.fp8 import convert_to_fp8
from utils.layers.fused_mlp import FusedChatGLMMLP, FusedGlmMLP, fuse_mlps
from utils.layers.fused_qkv import FusedChatGLMAttention, fuse_lora_qkv, project_lora_with_kernel, use_qkv_kernel
from utils.layers.mixed_lora import AdapterChoice, LoraFactors, MixedLoraLinear
from utils.layers.quantization import QuantizedLinear, quantize_linear
from utils.layers.skinny_linear import SkinnyLinear, SkinnyMLP, use_skinny_layers
from utils.layers.varlen_attention import varlen_attention_forward
from utils.lora.adapter import LoraSettings, attach_adapter
from utils.models import ChatGLMConfig, ChatGLMForConditionalGeneration
from utils.models.modeling_chatglm import ChatGLMAttention, ChatGLMMLP, ChatGLMRotaryEmbedding

MLP_LAYERS = ("gate_up_proj", "down_proj", "dense_h_to_4h", "dense_4h_to_h")
MLPS = {
    "GLM": lambda: GlmMLP(GlmConfig(hidden_size=512, intermediate_size=1200, hidden_act="silu")),
    "GLM-4-0414": lambda: Glm4MLP(Glm4Config(hidden_size=512, intermediate_size=1200, hidden_act="silu")),
    "ChatGLM-6B": lambda: ChatGLMMLP(ChatGLMConfig(hidden_size=512, inner_hidden_size=2048)),
}
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: torch's varlen attention has no kernel for a CPU")


@pytest.mark.parametrize("is_fp8", [False, pytest.param(True, marks=fp8_on_a_gpu)])
@pytest.mark.parametrize("family", MLPS)
def test_fused_mlp(family, is_fp8):
    block = nn.ModuleDict({"mlp": MLPS[family]().to(DEVICE, DTYPE).requires_grad_(False)})
    exact = copy.deepcopy(block["mlp"]).float()
    if is_fp8:
        convert_to_fp8(block, MLP_LAYERS, trains=True)
    fuse_mlps(block)
    fused = block["mlp"]
    assert isinstance(fused, FusedChatGLMMLP if family == "ChatGLM-6B" else FusedGlmMLP)
    hidden_states = random(2, 40, 512).requires_grad_()
    exact_states = hidden_states.detach().float().requires_grad_()
    gradient = torch.randn_like(hidden_states)
    output, expected = fused(hidden_states), exact(exact_states)
    output.backward(gradient)
    expected.backward(gradient.float())
    tolerance = 3 * FP8_ROUNDING if is_fp8 else 2 * ROUNDING
    assert_close(output.detach(), expected.detach(), tolerance)
    assert_close(hidden_states.grad, exact_states.grad, tolerance)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_skinny_mlp(bits):
    """For one token of each of few sequences, and for more tokens, which stay with torch."""
    config = GlmConfig(hidden_size=512, intermediate_size=2048, hidden_act="silu")
    block = nn.ModuleDict({"mlp": GlmMLP(config).to(DEVICE, DTYPE).requires_grad_(False)})
    if bits < 16:
        quantize_linear(block, bits, MLP_LAYERS)
    exact = copy.deepcopy(block["mlp"]).float()
    use_skinny_layers(block)
    converted = block["mlp"]
    assert isinstance(converted, SkinnyMLP)
    layer_class = SkinnyLinear if bits == 16 else QuantizedLinear
    assert {type(layer) for layer in (converted.gate_up_proj, converted.down_proj)} == {layer_class}
    for shape in ((3, 1, 512), (1, 3, 512), (skinny_gemm.MAX_ROWS + 1, 1, 512)):
        hidden_states = random(*shape)
        assert_close(converted(hidden_states), exact(hidden_states.float()), 4 * ROUNDING)


@pytest.mark.parametrize("is_fp8", [False, pytest.param(True, marks=fp8_on_a_gpu)])
def test_several_adapters(is_fp8):
    """Of 16 bits on a skinny layer with a bias, compiled once; the rows' adapters change between two calls."""
    block = nn.ModuleDict({"qkv_proj": nn.Linear(1024, 1024).to(DEVICE, DTYPE).requires_grad_(False)})
    exact, choice = copy.deepcopy(block["qkv_proj"]).float(), AdapterChoice()
    pairs = [(random(rank, 1024) / 32, random(1024, rank)) for rank in (8, 3)]
    block["qkv_proj"] = MixedLoraLinear(block["qkv_proj"], LoraFactors.of_pairs(pairs), choice)
    if is_fp8:
        convert_to_fp8(block, ["qkv_proj"], trains=False)
    use_skinny_layers(block)
    layer = block["qkv_proj"]
    assert layer.has_kernel and layer.base_layer.is_skinny
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    choice.rows = torch.zeros(5, 1, dtype=torch.int64, device=DEVICE)
    hidden_states = random(5, 1, 1024)
    for numbers in ([0, 1, 2, 1, 0], [2, 2, 0, 0, 1]):
        choice.rows.copy_(torch.tensor(numbers)[:, None])
        with torch._dynamo.config.patch(error_on_recompile=numbers[0] == 2):
            output = compiled(hidden_states)
        expected = exact(hidden_states.float())
        for row, number in enumerate(numbers):
            if number:
                A, B = (factor.float() for factor in pairs[number - 1])
                expected[row] += hidden_states[row].float() @ A.T @ B.T
        assert_close(output, expected, 2 * FP8_ROUNDING if is_fp8 else 2 * ROUNDING)


ADAPTER_DTYPE, ADAPTER_TOLERANCE = (torch.bfloat16, 2 * ROUNDING) if ON_GPU else (torch.float32, 1e-5)


def chatglm(hidden_size: int, head_count: int):
    config = ChatGLMConfig(
        hidden_size=hidden_size, num_attention_heads=head_count, vocab_size=64, num_layers=1, inner_hidden_size=64,
        bos_token_id=1, eos_token_id=2, mask_token_id=3, gmask_token_id=4, pad_token_id=0,
    )  # fmt: skip
    return ChatGLMForConditionalGeneration(config), ["query_key_value"], ChatGLMRotaryEmbedding(config)


GLM_CLASSES = (GlmConfig, GlmForCausalLM, GlmRotaryEmbedding)
GLM4_CLASSES = (Glm4Config, Glm4ForCausalLM, Glm4RotaryEmbedding)


def glm(key_heads: int, rotated_share: float, classes=GLM_CLASSES):
    config_class, model_class, rotary_class = classes
    config = config_class(
        hidden_size=192, num_attention_heads=4, num_key_value_heads=key_heads, head_dim=64, num_hidden_layers=1,
        intermediate_size=64, vocab_size=64, attention_bias=True, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotated_share},
    )  # fmt: skip
    return model_class(config), ["q_proj", "k_proj", "v_proj"], rotary_class(config).to(DEVICE)


@pytest.mark.parametrize(
    "build, sizes",
    [
        (chatglm, (256, 4)),
        (chatglm, (96, 3)),
        (glm, (2, 0.5)),
        (glm, (4, 1.0)),
        (glm, (1, 0.25)),
        (glm, (2, 0.5, GLM4_CLASSES)),
    ],
    ids=[
        "ChatGLM-6B, 4 heads",
        "ChatGLM-6B, 3 heads",
        "GLM, half rotated",
        "GLM, all rotated",
        "GLM, a quarter rotated",
        "GLM-4-0414",
    ],
)
def test_attention_with_adapters(build, sizes):
    """Query, key and value of 2 x 70 tokens, the gradients of the inputs and of the adapters."""
    model, targets, rotary = build(*sizes)
    model = attach_adapter(model.to(ADAPTER_DTYPE), LoraSettings(4, 8, 0.0, targets), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    fuse_lora_qkv(model.to(DEVICE))
    fused_model = copy.deepcopy(model)
    use_qkv_kernel(fused_model)
    plain, fused = (
        next(
            module for module in each.modules() if isinstance(module, GlmAttention | Glm4Attention | ChatGLMAttention)
        )
        for each in (model, fused_model)
    )
    if build is glm:
        assert fused.project is project_lora_with_kernel is not plain.project
    else:
        assert type(fused) is FusedChatGLMAttention and type(plain) is ChatGLMAttention
    positions = torch.randint(0, 500, (2, 2, 70) if build is chatglm else (2, 70), device=DEVICE)
    factors = rotary(torch.zeros(1, device=DEVICE, dtype=ADAPTER_DTYPE), positions)
    hidden_states = torch.randn(2, 70, model.config.hidden_size, device=DEVICE, dtype=ADAPTER_DTYPE)
    results = []
    for module in (plain, fused):
        inputs = hidden_states.clone().requires_grad_()
        outputs = torch.cat([heads.flatten(0, 1) for heads in module.project_qkv(inputs, factors)])
        outputs.backward(torch.sin(torch.arange(outputs.numel(), device=DEVICE)).view(outputs.shape).to(outputs))
        trained = [parameter.grad for _, parameter in sorted(module.named_parameters()) if parameter.requires_grad]
        assert trained and all(gradient is not None and gradient.norm() > 0 for gradient in trained)
        results.append((outputs.detach(), inputs.grad, *trained))
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected, ADAPTER_TOLERANCE)


@needs_gpu
def test_varlen_attention_with_cached_keys():
    """A sequence's queries are its last tokens: a chunk behind 60 cached tokens, a whole prompt, one token of 30."""
    queries, keys, size = (40, 7, 1), (100, 7, 30), 64
    query, key, value = random(1, 8, 48, size), random(1, 2, 137, size), random(1, 2, 137, size)
    bounds = [torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int() for lengths in (queries, keys)]
    output, _ = varlen_attention_forward(
        None, query, key, value, None, size**-0.5,
        cu_seq_lens_q=bounds[0], cu_seq_lens_k=bounds[1], max_length_q=48, max_length_k=120,
    )  # fmt: skip
    expected = torch.zeros(1, 48, 8, size, device=DEVICE)
    for start, stop, first, last in zip(bounds[0], bounds[0][1:], bounds[1], bounds[1][1:], strict=False):
        heads = [each[:, :, first:last].float().repeat_interleave(4, 1) for each in (key, value)]
        visible = torch.ones(stop - start, last - first, dtype=torch.bool, device=DEVICE).tril(
            last - first - stop + start
        )
        attended = nn.functional.scaled_dot_product_attention(
            query[:, :, start:stop].float(), *heads, attn_mask=visible
        )
        expected[:, start:stop] = attended.transpose(1, 2)
    assert_close(output, expected, ROUNDING)
