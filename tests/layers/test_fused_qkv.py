"""Query, key and value from one kernel: the code around the kernel (tests/kernels checks the kernel itself)."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import GlmConfig, GlmForCausalLM
from transformers.models.glm.modeling_glm import GlmAttention, GlmRotaryEmbedding, apply_rotary_pos_emb

from utils.layers import fused_qkv
from utils.layers.fused_qkv import fuse_projections, rotate_neighbours
from utils.lora.adapter import LoraSettings, attach_adapter
from utils.models import ChatGLMConfig, ChatGLMForConditionalGeneration
from utils.models.modeling_chatglm import ChatGLMAttention, ChatGLMRotaryEmbedding, rotate_half_2d


def test_neighbours_are_rotated_as_by_transformers():
    """To the bit, in bfloat16, whether all of a head turns or half of it."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 16).bfloat16(), torch.randn(2, 2, 5, 16).bfloat16()
    for size in (8, 16):
        angles = torch.randn(2, 5, size // 2).repeat(1, 1, 2)
        factors = angles.cos().bfloat16(), angles.sin().bfloat16()
        for found, expected in zip(
            rotate_neighbours(query, key, *factors), apply_rotary_pos_emb(query, key, *factors), strict=True
        ):
            assert torch.equal(found, expected)


def turn(query, key, cos, sin, neighbours):
    if neighbours:
        heads = (states.transpose(0, 1)[None] for states in (query, key))
        return (states[0].transpose(0, 1) for states in rotate_neighbours(*heads, cos[None], sin[None]))
    return (states * cos[:, None] + rotate_half_2d(states) * sin[:, None] for states in (query, key))


def heads_of(heads, hidden, B, cos, sin, counts, neighbours):
    H, K = counts
    heads = (heads + hidden @ B.t()).unflatten(1, (H + 2 * K, -1))
    query, key, value = heads.split((H, K, K), dim=1) if neighbours else heads.unflatten(1, (H, 3)).unbind(2)
    return *(states.contiguous() for states in turn(query, key, cos, sin, neighbours)), value.clone()


def heads_gradient(query, key, value, cos, sin, neighbours):
    heads = (*turn(query, key, cos, -sin, neighbours), value)
    return (torch.cat(heads, dim=1) if neighbours else torch.stack(heads, dim=2)).flatten(1)


@pytest.fixture
def ops():
    """The kernel's operators, by torch, where there is no kernel."""
    common = "Tensor cos, Tensor sin"
    with torch.library._scoped_library("chatglm_family", "FRAGMENT") as library:
        library.define(
            f"qkv_rope_lora(Tensor heads, Tensor hidden, Tensor B, {common}, int[] counts, bool neighbours)"
            " -> (Tensor, Tensor, Tensor)"
        )
        library.define(
            f"qkv_rope_lora_backward(Tensor query, Tensor key, Tensor value, {common}, bool neighbours) -> Tensor"
        )
        library.impl("qkv_rope_lora", heads_of, "CompositeExplicitAutograd")
        library.impl("qkv_rope_lora_backward", heads_gradient, "CompositeExplicitAutograd")
        yield


def chatglm():
    config = ChatGLMConfig(
        hidden_size=64, num_attention_heads=4, vocab_size=64, num_layers=1, inner_hidden_size=64,
        bos_token_id=1, eos_token_id=2, mask_token_id=3, gmask_token_id=4, pad_token_id=0,
    )  # fmt: skip
    model = attach_adapter(
        ChatGLMForConditionalGeneration(config), LoraSettings(4, 8, 0.0, ["query_key_value"]), seed=0
    )
    return model, ChatGLMRotaryEmbedding(config)(torch.zeros(1), torch.randint(0, 300, (2, 2, 9)))


def glm(partitioned=False):
    config = GlmConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_hidden_layers=1,
        intermediate_size=64, vocab_size=64, attention_bias=True, pad_token_id=0,
    )  # fmt: skip
    model = attach_adapter(GlmForCausalLM(config), LoraSettings(4, 8, 0.0, ["q_proj", "k_proj", "v_proj"]), seed=0)
    fuse_projections(model, partitioned)
    return model, GlmRotaryEmbedding(config)(torch.zeros(1), torch.randint(0, 300, (2, 9)))


def partitioned_glm():
    return glm(partitioned=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the operators are the kernels: see tests/kernels")
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("family", [chatglm, glm, partitioned_glm])
def test_heads_are_those_without_a_kernel(family, is_compiled, ops, monkeypatch):
    torch.manual_seed(0)
    model, factors = family()
    plain = next(module for module in model.modules() if isinstance(module, GlmAttention | ChatGLMAttention))
    for parameter in plain.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    fused = copy.deepcopy(plain)
    fused_qkv.fuse_heads(fused)
    assert type(fused) is type(plain)  # without a kernel
    sizes = []
    kernels = SimpleNamespace(supports_head_dim=lambda *size: sizes.append(size) or len(sizes) > 1)
    monkeypatch.setattr(fused_qkv, "load_qkv_rope_lora", lambda: kernels)
    fused_qkv.fuse_heads(fused)
    assert type(fused) is type(plain) and sizes == [(16, 4 if family is chatglm else 12)]  # where it does not fit
    fused_qkv.fuse_heads(fused)
    assert isinstance(fused, type(plain)) and type(fused) is not type(plain)
    hidden_states = torch.randn(2, 9, 64)
    results = []
    for module in (plain, fused):
        heads_of = module.heads_of
        if is_compiled and module is fused:
            heads_of = torch.compile(heads_of, backend="aot_eager", fullgraph=True)
        inputs = hidden_states.clone().requires_grad_()
        heads = torch.cat([states.flatten(1) for states in heads_of(inputs, factors)], dim=1)
        (heads * torch.arange(heads.numel()).view(heads.shape).sin()).sum().backward()
        trained = [parameter.grad for _, parameter in sorted(module.named_parameters()) if parameter.requires_grad]
        assert trained and all(gradient.norm() > 0 for gradient in trained)
        results.append((heads.detach(), inputs.grad, *trained))
    for expected, found in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-6 * expected.norm()
