"""Shards of tensor parallelism: each process's slices of the weights, an adapter merged into them."""

import copy

import pytest
import torch
from conftest import GOLDEN, TINY
from peft import LoraConfig, get_peft_model
from transformers import Glm4Config, Glm4ForCausalLM

from utils.checkpoint.model import Checkpoint, load_model, set_tensor
from utils.common.errors import UsageError
from utils.inference.adapters import AttachAdapters
from utils.inference.tensor_parallel import WHOLE, Place, check_heads, cut_layers, load_shards
from utils.lora.adapter import merge_adapter
from utils.models.architectures import GLM_PLAN

ADAPTERS = GOLDEN / "adapters"
CHATGLM = GOLDEN / "chatglm-6b-tiny"
CPU = torch.device("cpu")
CHATGLM3 = GOLDEN / "chatglm3-6b-tiny"


def place(number: int, processes: int) -> Place:
    """The place of a process whose sum is its own shard's."""
    return Place(number, processes, all_reduce=lambda output: None)


def shards_of(path, dtype, processes: int, *adapters):
    """Yields for each process its sharded model, and what it should hold of each layer."""
    checkpoint = Checkpoint.open(str(path))
    for number in range(processes):
        model = load_shards(
            checkpoint, dtype, CPU, place(number, processes), AttachAdapters(tuple(map(str, adapters)))
        )
        plan = checkpoint.architecture.tensor_parallel
        yield model, cut_layers(checkpoint.empty_model(dtype), plan, place(number, processes))


@pytest.mark.parametrize("processes, heads", [(2, 2), (3, 6), (4, 4), (6, 6), (12, 12)])
@torch.no_grad()
def test_shards_of_all_processes_sum_to_the_layer(processes, heads):
    """Two key/value heads, as the 32B has with 48 query heads, are repeated; an MLP of 35 is split unevenly."""
    sizes = {"num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 32}
    torch.manual_seed(0)
    config = Glm4Config(**sizes, num_hidden_layers=1, intermediate_size=35, vocab_size=64, pad_token_id=0)
    config.attention_bias = True
    whole = Glm4ForCausalLM(config).eval()
    for parameter in whole.model.layers.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    block, hidden_states = whole.model.layers[0], torch.randn(2, 9, 32)
    positions = whole.model.rotary_emb(hidden_states, torch.arange(9)[None])
    attended, mlp, kv_rows = 0, 0, []
    for number in range(processes):
        model = copy.deepcopy(whole)
        shards = cut_layers(model, GLM_PLAN, place(number, processes))
        for key, value in whole.state_dict().items():
            layer, _, kind = key.rpartition(".")
            set_tensor(model, key, shards.get(layer, WHOLE).of(kind, value, CPU, value.dtype), CPU)
        shard = model.model.layers[0]
        attended += shard.self_attn(hidden_states, positions, attention_mask=None)[0]
        mlp += shard.mlp(hidden_states)
        kv_rows.append(shard.self_attn.k_proj.weight.shape[0])
        assert shard.self_attn.v_proj.bias.shape[0] == kv_rows[-1] and shard.mlp.down_proj.in_features < 35
        assert model.config.num_key_value_heads == heads and whole.config.num_key_value_heads == 2
    assert kv_rows == [heads * 8 // processes] * processes
    assert (attended - block.self_attn(hidden_states, positions, attention_mask=None)[0]).abs().max() <= 1e-4
    assert (mlp - block.mlp(hidden_states)).abs().max() <= 1e-4


def test_heads_that_cannot_be_split_evenly():
    with pytest.raises(UsageError, match="8 attention heads cannot be split over 3 processes: use 1, 2, 4, 8"):
        check_heads(Checkpoint.open(str(TINY)).config, 3)


def check_slices(path, dtype, processes, adapter):
    """Every process holds its slices of what PEFT merges into the whole model."""
    merged = merge_adapter(load_model(str(path), dtype), adapter).state_dict()
    for model, shards in shards_of(path, dtype, processes, adapter):
        state = model.state_dict()
        assert state.keys() == merged.keys()
        for key, value in state.items():
            layer, _, kind = key.rpartition(".")
            expected = shards.get(layer, WHOLE).of(kind, merged[key], CPU, dtype)
            assert value.dtype == dtype and value.shape == expected.shape
            assert (value - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max(), key


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("path, adapter", [(CHATGLM, "v1/all"), (CHATGLM3, "v3/all")], ids=str)
@pytest.mark.parametrize("processes", (2, 4))
def test_an_adapter_is_merged_slice_by_slice(path, adapter, processes, dtype):
    check_slices(path, dtype, processes, ADAPTERS / adapter)


@pytest.mark.parametrize("init", ("pissa", "olora"))
def test_an_adapter_on_a_base_without_its_principal_part(tmp_path, init):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["k_proj", "o_proj"], init_lora_weights=init)
    model = get_peft_model(load_model(str(CHATGLM3)), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    check_slices(CHATGLM3, torch.float32, 4, tmp_path)


def test_adapters_that_shards_cannot_take(tmp_path):
    model = get_peft_model(load_model(str(CHATGLM)), LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    for adapters, words in (
        ([ADAPTERS / "v1" / "all", tmp_path], "several adapters on a sharded model"),
        ([tmp_path], "the adapter is on lm_head, whose weight is the embedding's too"),
        ([ADAPTERS / "v3" / "all"], "does not fit"),
    ):
        with pytest.raises(UsageError, match=words):
            next(shards_of(CHATGLM, torch.float32, 2, *adapters))
