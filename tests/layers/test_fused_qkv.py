"""Query, key and value from one GEMM: the layers around the kernel (tests/kernels checks the kernel itself)."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from reference_ops import reference_ops
from torch import nn
from transformers import Glm4Config, Glm4ForCausalLM, GlmConfig, GlmForCausalLM
from transformers.models.glm.modeling_glm import GlmAttention, GlmRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.glm4.modeling_glm4 import Glm4Attention, Glm4RotaryEmbedding

from utils.layers.fused_qkv import (
    FusedChatGLMAttention,
    FusedQKVAttention,
    MovedToFusedQKV,
    ShardedLinear,
    apply_rotary_interleaved,
    fuse_lora_qkv,
    fuse_qkv,
    project_frozen,
    project_lora,
    project_lora_with_kernel,
    use_qkv_kernel,
)
from utils.layers.quantization import Quantization, quantize_modules
from utils.lora.adapter import LoraSettings, attach_adapter
from utils.models import ChatGLMConfig, ChatGLMForConditionalGeneration
from utils.models.modeling_chatglm import CACHE_KEY, ChatGLMAttention, ChatGLMRotaryEmbedding

QKV = ["q_proj", "k_proj", "v_proj"]
STOCK = (GlmAttention, Glm4Attention, ChatGLMAttention)
OF_THE_LAYER = ("config", "layer_idx", "head_dim", "num_key_value_groups", "scaling", "attention_dropout", "is_causal")


class Kernel(SimpleNamespace):
    """Stands for utils/kernels/qkv_rope_lora.py; says of every size whether it fits, and keeps what it was asked."""

    def __init__(self, fits):
        super().__init__(asked=[], fits=fits)

    def supports_head_dim(self, *sizes):
        self.asked.append(sizes)
        return self.fits


def test_interleaved_pairs_are_rotated_as_by_transformers():
    """To the bit, in bfloat16, whether all of a head turns or half of it."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 16).bfloat16(), torch.randn(2, 2, 5, 16).bfloat16()
    for size in (8, 16):
        angles = torch.randn(2, 5, size // 2).repeat(1, 1, 2)
        factors = angles.cos().bfloat16(), angles.sin().bfloat16()
        for actual, expected in zip(
            apply_rotary_interleaved(query, key, *factors), apply_rotary_pos_emb(query, key, *factors), strict=True
        ):
            assert torch.equal(actual, expected)


def chatglm():
    config = ChatGLMConfig(
        hidden_size=64, num_attention_heads=4, vocab_size=64, num_layers=1, inner_hidden_size=64,
        bos_token_id=1, eos_token_id=2, mask_token_id=3, gmask_token_id=4, pad_token_id=0,
    )  # fmt: skip
    return ChatGLMForConditionalGeneration(config)


GLM_SIZES = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 1,
    "intermediate_size": 64, "vocab_size": 64, "pad_token_id": 0,
}  # fmt: skip


def glm():
    return GlmForCausalLM(GlmConfig(**GLM_SIZES, attention_bias=True))


def glm4(attention_bias=True):
    return Glm4ForCausalLM(Glm4Config(**GLM_SIZES, attention_bias=attention_bias))


def glm4_without_bias():
    return glm4(attention_bias=False)


def with_adapter(model, lora_dropout=0.0):
    targets = ["query_key_value"] if isinstance(model, ChatGLMForConditionalGeneration) else QKV
    model = attach_adapter(model, LoraSettings(4, 8, lora_dropout, targets), seed=0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


def attention_of(model):
    return next(module for module in model.modules() if isinstance(module, STOCK))


def rotary_factors(model):
    """cos and sin of 9 tokens of two sequences."""
    embedding = {GlmForCausalLM: GlmRotaryEmbedding, Glm4ForCausalLM: Glm4RotaryEmbedding}.get(
        type(model.get_base_model())
    )
    if embedding:
        return embedding(model.config)(torch.zeros(1), torch.randint(0, 300, (2, 9)))
    return ChatGLMRotaryEmbedding(model.config)(torch.zeros(1), torch.randint(0, 300, (2, 2, 9)))


def fuse(model, sharded, kernel):
    fuse_lora_qkv(model, sharded)
    if kernel is not None:
        use_qkv_kernel(model, kernel)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("has_kernel", [False, True])
@pytest.mark.parametrize("build, sharded", [(chatglm, False), (glm, False), (glm, True), (glm4, False), (glm4, True)])
def test_attention_and_gradients_are_those_of_stock_layers(build, sharded, has_kernel, is_compiled):
    torch.manual_seed(0)
    stock_model = with_adapter(build())
    fused_model = copy.deepcopy(stock_model)
    kernel = Kernel(fits=True) if has_kernel else None
    fuse(fused_model, sharded, kernel)
    stock, fused = attention_of(stock_model), attention_of(fused_model)
    if build is not chatglm:
        assert fused.project is (project_lora_with_kernel if has_kernel else project_lora)
    else:
        assert type(fused) is (FusedChatGLMAttention if has_kernel else ChatGLMAttention)
    if has_kernel:
        assert kernel.asked == [(16, 4 if build is chatglm else 12)]
    factors, hidden_states = rotary_factors(stock_model), torch.randn(2, 9, 64)
    results = []
    with reference_ops():
        for attention in (stock, fused):
            forward = attention.forward
            if is_compiled and attention is fused:
                forward = torch.compile(forward, backend="aot_eager", fullgraph=True)
            inputs = hidden_states.clone().requires_grad_()
            output, _ = forward(inputs, factors, None)
            (output * torch.arange(output.numel()).view(output.shape).sin()).sum().backward()
            trained = [(name, p.grad) for name, p in attention.named_parameters() if p.requires_grad]
            results.append((("output", output.detach()), ("inputs", inputs.grad), *trained))
    for (name, expected), (fused_name, actual) in zip(*results, strict=True):
        assert fused_name == name and expected.norm() > 0
        assert (actual - expected).norm() <= 2e-6 * expected.norm(), name


def test_a_padded_batch_shares_its_positions():
    """The kernel gets cos and sin of every token, also where GLM computes one row for all sequences."""
    torch.manual_seed(0)
    model = with_adapter(glm())
    kernel_model = copy.deepcopy(model)
    fuse(kernel_model, False, Kernel(fits=True))
    factors = GlmRotaryEmbedding(model.config)(torch.zeros(1), torch.arange(9)[None])
    hidden_states = torch.randn(2, 9, 64)
    with reference_ops(), torch.no_grad():
        expected, _ = attention_of(model)(hidden_states, factors)
        actual, _ = attention_of(kernel_model)(hidden_states, factors)
    assert (actual - expected).norm() <= 2e-6 * expected.norm()


def test_a_kernel_that_does_not_hold_the_heads_is_not_used():
    model = with_adapter(glm())
    fuse(model, False, Kernel(fits=False))
    assert attention_of(model).project is project_lora
    model = with_adapter(chatglm())
    fuse(model, False, Kernel(fits=False))
    assert type(attention_of(model)) is ChatGLMAttention


def test_dropout_keeps_the_three_projections():
    model = with_adapter(glm(), lora_dropout=0.1)
    fuse(model, False, Kernel(fits=True))
    assert type(attention_of(model)) is GlmAttention


@pytest.mark.parametrize("build, sharded", [(chatglm, False), (glm, False), (glm, True), (glm4, False), (glm4, True)])
def test_a_fused_attention_is_the_stock_one_for_other_libraries(build, sharded):
    """PEFT's names, the order of the trained weights, which optimizers save, and attributes; twice as once."""
    model = with_adapter(build()).eval()
    stock = attention_of(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for _ in range(2):
        fuse(model, sharded, Kernel(fits=True))
        fused = attention_of(model)
        assert isinstance(fused, FusedChatGLMAttention if build is chatglm else FusedQKVAttention)
        assert isinstance(fused, type(stock)) and not fused.training
        assert all(getattr(fused, name) == getattr(stock, name) for name in OF_THE_LAYER if hasattr(stock, name))
        after = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        assert [name for name, _ in after] == [name for name, _ in trained]
        assert all(p is before for (_, p), (_, before) in zip(after, trained, strict=True))
    if build is not chatglm:
        assert type(fused.qkv_proj) is (ShardedLinear if sharded else nn.Linear)
        kinds = {type(getattr(fused, name).base_layer) for name in QKV}
        assert kinds == {nn.Linear if sharded else MovedToFusedQKV}


@pytest.mark.parametrize("build, sharded", [(chatglm, False), (glm, False), (glm, True), (glm4, False), (glm4, True)])
def test_adapters_are_saved_and_loaded_as_before(build, sharded):
    model, other = with_adapter(build()), with_adapter(build())
    saved = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    for parameter in other.parameters():
        parameter.data += 1
    fuse(model, sharded, Kernel(fits=True))
    fuse(other, sharded, Kernel(fits=True))
    state = get_peft_model_state_dict(model)
    assert state.keys() == saved.keys() and all(torch.equal(state[name], value) for name, value in saved.items())
    assert not any(torch.equal(value, saved[name]) for name, value in get_peft_model_state_dict(other).items())
    assert not set_peft_model_state_dict(other, saved).unexpected_keys
    assert all(torch.equal(value, saved[name]) for name, value in get_peft_model_state_dict(other).items())


def in_integers(model, bits):
    """The model, its q, k and v of random integers and scales."""
    quantize_modules(model, Quantization(bits), QKV)
    for layer in (getattr(attention_of(model), name) for name in QKV):
        layer.weight.random_(-128, 128)
        layer.weight_scale.uniform_(0, 2**-bits)
    return model


@pytest.mark.parametrize(
    "build",
    [glm, glm4, glm4_without_bias, lambda: in_integers(glm(), 8), lambda: in_integers(glm4_without_bias(), 4)],
    ids=["glm", "glm4", "glm4 without bias", "glm in int8", "glm4 in int4"],
)
def test_inference_computes_what_the_stock_layers_compute(build):
    torch.manual_seed(0)
    stock_model = build().eval()
    if (bias := attention_of(stock_model).q_proj.bias) is not None:
        nn.init.normal_(bias)
    stock_model.set_attn_implementation("eager")  # which returns attention weights
    model = copy.deepcopy(stock_model)
    for _ in range(2):
        fuse_qkv(model)
        fused = attention_of(model)
        assert isinstance(fused, FusedQKVAttention) and fused.project is project_frozen
        assert [name for name, _ in fused.named_children()] == ["o_proj", "qkv_proj"]
    ids = torch.randint(1, 64, (2, 7))
    with torch.no_grad():
        actual = model(ids, output_attentions=True, use_cache=True)
        expected = stock_model(ids, output_attentions=True, use_cache=True)
        assert (actual.logits - expected.logits).abs().max() <= 1e-5
        assert (actual.attentions[0] - expected.attentions[0]).abs().max() <= 1e-6
        cached = model(ids[:, :1], **{CACHE_KEY: actual.get(CACHE_KEY)}).logits
        assert (cached - stock_model(torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1:]).abs().max() <= 1e-5
