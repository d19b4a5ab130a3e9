"""Several adapters beside a layer, and beside the fused projection of an attention (tests/kernels has the kernel)."""

import copy
from types import SimpleNamespace

import pytest
import torch
from reference_ops import reference_ops
from torch import nn
from transformers import GlmConfig, GlmForCausalLM

from utils.layers.fp8 import Fp8DecodeLinear, convert_to_fp8
from utils.layers.fused_qkv import FusedQKVAttention, fuse_qkv
from utils.layers.mixed_lora import AdapterChoice, LoraFactors, MixedLoraLinear
from utils.layers.skinny_linear import SkinnyLinear, SkinnyMLP, use_skinny_layers
from utils.models.family import QKV

SKINNY = SimpleNamespace(max_rows=lambda weight: 4, supports_weight=lambda weight: True)
# The rank of each of three adapters on a layer; 0: the adapter lacks it.
RANKS = {"q_proj": (2, 5, 0), "k_proj": (0, 0, 3), "v_proj": (1, 2, 3), "o_proj": (0, 4, 0)}


def random_pair(rank: int, linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor] | None:
    return (torch.randn(rank, linear.in_features), torch.randn(linear.out_features, rank)) if rank else None


def glm() -> GlmForCausalLM:
    torch.manual_seed(0)
    config = GlmConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_hidden_layers=2, vocab_size=64,
        intermediate_size=96, attention_bias=True, pad_token_id=0,
    )  # fmt: skip
    return GlmForCausalLM(config).eval().requires_grad_(False)


def with_adapters(model: GlmForCausalLM, ranks=RANKS):
    """The model with three adapters, and, as what each computes alone, three models with weights that have it."""
    choice, merged = AdapterChoice(), [copy.deepcopy(model) for _ in range(3)]
    for index, block in enumerate(model.model.layers):
        for name in ranks:
            linear = getattr(block.self_attn, name)
            pairs = [random_pair(rank, linear) for rank in ranks[name]]
            for alone, pair in zip(merged, pairs, strict=True):
                if pair:
                    getattr(alone.model.layers[index].self_attn, name).weight += pair[1] @ pair[0]
            setattr(block.self_attn, name, MixedLoraLinear(linear, LoraFactors.of_pairs(pairs), choice))
    return choice, merged


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("names", [tuple(RANKS), ("q_proj", "v_proj")])
def test_each_row_computes_with_its_adapter(fused, names):
    base, model = glm(), glm()
    choice, merged = with_adapters(model, {name: RANKS[name] for name in names})
    if fused:
        fuse_qkv(model)
        attention = model.model.layers[0].self_attn
        assert isinstance(attention, FusedQKVAttention) and attention.head_counts == [4, 2, 2]
        assert type(attention.qkv_proj.base_layer) is nn.Linear and attention.qkv_proj.widths == [64, 32, 32]
    ids = torch.randint(1, 64, (5, 7))
    numbers = [2, 0, 1, 3, 2]
    choice.rows = torch.tensor(numbers)[:, None]
    logits = model(ids).logits
    for row, number in enumerate(numbers):
        expected = (base, *merged)[number](ids[row : row + 1]).logits[0]
        assert (logits[row] - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_each_token_computes_with_its_adapter():
    """As packed prompts do; an infinite factor changes the tokens of its adapter alone."""
    linear, choice = nn.Linear(8, 16), AdapterChoice()
    pairs = [random_pair(2, linear), random_pair(3, linear)]
    layer = MixedLoraLinear(linear, LoraFactors.of_pairs(pairs), choice)
    hidden_states, numbers = torch.randn(1, 6, 8), [1, 1, 0, 2, 2, 1]
    choice.rows = torch.tensor([numbers])
    output = layer(hidden_states)
    for token, number in enumerate(numbers):
        A, B = pairs[number - 1] if number else (torch.zeros(1, 8), torch.zeros(16, 1))
        expected = linear(hidden_states[0, token]) + B @ (A @ hidden_states[0, token])
        assert (output[0, token] - expected).abs().max() <= 1e-5
    layer.A[0, 0, 0] = torch.inf
    changed = layer(hidden_states)[0]
    assert [bool((changed[token] == output[0, token]).all()) for token in range(6)] == [n != 1 for n in numbers]


@torch.no_grad()
def test_the_layers_of_a_decode_step_stay_below_the_adapters():
    stock, model = glm(), glm()
    choice, _ = with_adapters(model)
    fuse_qkv(model)
    fuse_qkv(stock)
    for each in (model, stock):
        use_skinny_layers(each.model.layers, SKINNY)
    block, stock_block = model.model.layers[0], stock.model.layers[0]
    assert type(block.self_attn.qkv_proj.base_layer) is type(stock_block.self_attn.qkv_proj) is SkinnyLinear
    assert isinstance(block.mlp, SkinnyMLP)
    choice.rows = torch.zeros(3, 1, dtype=torch.int64)
    ids = torch.randint(1, 64, (3, 1))
    with reference_ops():
        assert model(ids).logits.equal(stock(ids).logits)  # of number 0, to the bit


def test_fp8_below_the_adapters():
    model = glm()
    with_adapters(model)
    fuse_qkv(model)
    convert_to_fp8(model, {"qkv_proj", "o_proj"}, trains=False, device="cpu")
    attention = model.model.layers[1].self_attn
    for name in ("qkv_proj", "o_proj"):
        assert type(getattr(attention, name).base_layer) is Fp8DecodeLinear
    assert not any(hasattr(attention, name) for name in QKV)
