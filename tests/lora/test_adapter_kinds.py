"""PEFT adapters of every configuration: they compute as in training, or are refused by the key's name."""

import json
import shutil
from dataclasses import fields

import pytest
import torch
from conftest import GOLDEN
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from utils.checkpoint.model import Checkpoint, load_model
from utils.common.errors import UsageError
from utils.inference.arguments import adapter_names
from utils.inference.placement import dispatch
from utils.lora.adapter import load_adapter, merge_adapter, read_origin
from utils.lora.adapter_config import COMPUTED, HOW_TO_MERGE, WITHOUT_EFFECT, read_adapter_config
from utils.lora.formats import adapter_directory
from utils.lora.multi_lora import adapter_choice_of, add_adapters

BASE = str(GOLDEN / "chatglm3-6b-tiny")
NAME = "model.layers.{}.self_attn.{}_proj"
IDS = torch.tensor([[5, 9, 14, 77, 31, 8]])


def train(parameters):
    """Moves an adapter from its initial weights, every time by the same."""
    generator = torch.Generator().manual_seed(1)
    for value in parameters:
        value.data += 0.3 * torch.randn(value.shape, generator=generator) * value.data.abs().mean().clamp(min=0.1)


def make(directory, **settings):
    """Saves an adapter that PEFT made; returns the logits and the merged weights of the model in training."""
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(load_model(BASE), LoraConfig(**config))
    train(value for value in model.parameters() if value.requires_grad)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    model.save_pretrained(directory, save_embedding_layers=False)
    return logits, {key: value.clone() for key, value in model.merge_and_unload().state_dict().items()}


def change(directory, **values):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@torch.no_grad()
def check(directory, logits, weights):
    """The adapter computes as in training: alone, merged, beside another, on an offloaded base, by its file."""
    assert (load_adapter(load_model(BASE), directory)(input_ids=IDS).logits - logits).abs().max() <= 1e-4
    merged = merge_adapter(load_model(BASE), directory / "adapter_model.safetensors").state_dict()
    assert all((merged[key] - weights[key]).abs().max() <= 1e-4 for key in weights)
    several = load_model(BASE)
    before = {key: value.clone() for key, value in several.state_dict().items()}
    choice = add_adapters(several, {"one": directory, "two": directory})
    assert adapter_choice_of(several) is choice and adapter_choice_of(load_model(BASE)) is None
    for row in (1, 2, 0):
        choice.rows = torch.tensor([[row]])
        difference = (several(input_ids=IDS).logits - logits).abs().max()
        assert difference <= 1e-4 if row else difference > 1e-3
    kept = {key.replace(".base_layer", ""): value for key, value in several.state_dict().items()}
    assert all(kept[key].equal(before[key]) for key in before)
    offloaded = load_adapter(dispatch(Checkpoint.open(BASE), torch.float32, {"cpu": "800KB"}), directory)
    assert "disk" in offloaded.hf_device_map.values()
    assert (offloaded(input_ids=IDS).logits - logits).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora", "use_rslora": True},
        {
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"q_proj": 5},
        },
        {"rank_pattern": {r"model\.layers\.(0|1)\..*q_proj": 6, "self_attn.q_proj": 2}, "alpha_pattern": {"^x": 1}},
        {"target_modules": r".*layers\.[01]\..*(q|down)_proj", "exclude_modules": r".*\.0\..*q_proj"},
        {"layers_to_transform": [1], "layers_pattern": "layers", "exclude_modules": ["v_proj"]},
        {"target_modules": "all-linear", "init_lora_weights": "orthogonal"},
    ],
    ids=str,
)
def test_the_weights_are_those_of_training(tmp_path, settings):
    check(tmp_path, *make(tmp_path, **settings))


@torch.no_grad()
@pytest.mark.parametrize("init", ("pissa", "olora"))
def test_the_principal_part_of_the_fused_projection(tmp_path, init):
    """An adapter from the remote code, where query, key and value are one matrix, takes its part out of all three."""
    state, trained, rank, scale = {}, {}, 4, 2.0
    layers = load_model(BASE).model.layers
    for i, layer in enumerate(layers):
        weight = torch.cat([getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv"])
        if init == "pissa":
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            root = (values[:rank] / scale).sqrt().diag()
            a, b = root @ right[:rank], left[:, :rank] @ root
        else:
            left, right = torch.linalg.qr(weight)
            a, b = right[:rank].clone(), left[:, :rank].clone()
        rest = weight - scale * b @ a
        train((a, b))
        key = f"base_model.model.transformer.encoder.layers.{i}.self_attention.query_key_value.lora_"
        state |= {f"{key}A.weight": a.contiguous(), f"{key}B.weight": b.contiguous()}
        trained[i] = rest + scale * b @ a
    save_file(state, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "init_lora_weights": init, "bias": "none"}
    config["target_modules"] = ["query_key_value"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for i, layer in enumerate(merge_adapter(load_model(BASE), tmp_path).model.layers):
        weight = torch.cat([getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv"])
        assert (weight - trained[i]).abs().max() <= 1e-4


def test_patterns_with_the_remote_code_s_names(tmp_path):
    shutil.copytree(GOLDEN / "adapters" / "v3" / "all", tmp_path, dirs_exist_ok=True)
    (tmp_path / "adapter_model.bin").unlink(missing_ok=True)
    state = load_file(tmp_path / "adapter_model.safetensors")
    for key, value in state.items():
        if "dense_h_to_4h.lora_A" in key:
            state[key] = value[:2].contiguous()
        elif "dense_h_to_4h.lora_B" in key:
            state[key] = value[:, :2].contiguous()
    save_file(state, tmp_path / "adapter_model.safetensors")
    change(tmp_path, rank_pattern={"mlp.dense_h_to_4h": 2}, alpha_pattern={r".*layers\.1.*query_key_value": 3})
    scaling = {
        name.removeprefix("base_model.model."): layer.scaling["default"]
        for name, layer in load_adapter(load_model(BASE), tmp_path).named_modules()
        if isinstance(layer, LoraLayer)
    }
    alpha, rank = (json.loads((tmp_path / "adapter_config.json").read_text())[key] for key in ("lora_alpha", "r"))
    assert scaling[NAME.format(0, "k")] == alpha / rank
    assert scaling[NAME.format(1, "k")] == 3 / rank
    assert scaling["model.layers.1.mlp.gate_up_proj"] == alpha / 2


@pytest.fixture(scope="module")
def base():
    """For what is refused before the model is changed."""
    return load_model(BASE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    make(tmp_path_factory.getbasetemp() / "plain")
    return tmp_path_factory.getbasetemp() / "plain"


REFUSED = [
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', .*path_initial_model_for_weight"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
    ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
    ({"init_lora_weights": "of the future"}, "init_lora_weights is 'of the future'"),
    ({"init_lora_weights": {"a": 1}}, "init_lora_weights is a dict"),
    ({"use_dora": True}, "'use_dora' .True. is not supported: merge the adapter where it was trained"),
    ({"modules_to_save": ["lm_head"]}, "'modules_to_save' .a list. is not supported"),
    ({"modules_to_save": ["transformer.output_layer"]}, "'modules_to_save'"),
    ({"bias": "lora_only"}, "'bias' .'lora_only'."),
    ({"fan_in_fan_out": True}, "'fan_in_fan_out'"),
    ({"lora_bias": True}, "'lora_bias'"),
    ({"target_parameters": ["q_proj.weight"]}, "'target_parameters'"),
    ({"trainable_token_indices": [1]}, "'trainable_token_indices'"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "'layer_replication'"),
    ({"of_the_future": {"a": 1}}, "'of_the_future' .a dict. is not supported"),
    ({"peft_type": "IA3"}, "of a 'IA3' adapter; only LORA"),
    ({"peft_type": "PREFIX_TUNING"}, "only LORA"),
    ({"peft_type": None}, "only LORA"),
    ({"target_modules": None}, "names no target_modules"),
    ({"target_modules": {"a": 1}}, "target_modules is a dict, not a text or a list"),
    ({"target_modules": ["q_proj"]}, "weights match nothing"),
    ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, "weights are missing"),
    ({"target_modules": ["none"]}, "match no layer"),
    ({"target_modules": ["q_proj", "v_proj", "embed_tokens"]}, "embed_tokens is an embedding"),
    ({"r": 8}, r"is \(4, 64\), not \(8, 64\)"),
    ({"r": True}, "r is True, not a whole number from 1"),
    ({"r": 0}, "r is 0"),
    ({"rank_pattern": {"q_proj": 2}}, r"is \(4, 64\), not \(2, 64\)"),
    ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern is a dict, not names and ranks"),
    ({"lora_alpha": "8"}, "lora_alpha is '8', not a number"),
    ({"lora_alpha": 1e300}, "lora_alpha is 1e.300, not a number up to"),
    ({"alpha_pattern": [1]}, "alpha_pattern is a list"),
    ({"rank_pattern": {"(": 4}}, "rank_pattern is not a regular expression: .*missing"),
]


@pytest.mark.parametrize("values, words", REFUSED, ids=[str(values)[:50] for values, _ in REFUSED])
def test_a_refusal_names_what_it_is(base, plain, tmp_path, values, words):
    directory = shutil.copytree(plain, tmp_path / "adapter")
    change(directory, **values)
    for put, adapters in ((load_adapter, directory), (add_adapters, {"one": plain, "two": directory})):
        with pytest.raises(UsageError, match=words) as caught:
            put(base, adapters)
        assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


def test_pissa_on_a_quantised_base_is_refused(tmp_path):
    make(tmp_path, init_lora_weights="pissa")
    with pytest.raises(UsageError, match="this one is quantised: save it with path_initial_model_for_weight_conver"):
        load_adapter(load_model(BASE, quantize="int8"), tmp_path)


def test_every_key_of_peft_is_decided(plain):
    """One that PEFT adds is refused where it says something, until it is put into one of the two lists."""
    names = {field.name for field in fields(LoraConfig)}
    refused = names - COMPUTED - WITHOUT_EFFECT
    assert {"bias", "use_dora", "modules_to_save", "megatron_config"} <= refused and names >= COMPUTED
    assert len(refused) >= 15 and HOW_TO_MERGE
    assert read_adapter_config(plain / "adapter_config.json").rank == 4


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": "(a*)*" * 20 + "$"},
        {"exclude_modules": r"(.*)*(.*)*(.*)*\d\d\dx"},
        {"rank_pattern": {r"((\w|\.)*)*!": 4}},
        {"alpha_pattern": {r"((\w|\.)*)*!": 4}},
        {"layers_to_transform": [0], "layers_pattern": [r"((\w|\.)*)*!"]},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_regular_expression_without_end(base, plain, tmp_path, monkeypatch, values):
    monkeypatch.setattr("utils.lora.adapter_config.MATCH_SECONDS", 0.5)
    directory = shutil.copytree(plain, tmp_path / "adapter")
    change(directory, **values)
    with pytest.raises(UsageError, match=f"{list(values)[-1]} takes more than 0.5 s to match"):
        load_adapter(base, directory)


def test_a_million_names(plain, tmp_path):
    directory = shutil.copytree(plain, tmp_path / "adapter")
    change(directory, target_modules=["q_proj", "v_proj", *map(str, range(10**6))])
    load_adapter(load_model(BASE), directory)


def test_a_file_stands_for_its_directory(plain, tmp_path):
    file = plain / "adapter_model.safetensors"
    assert adapter_directory(file) == plain and adapter_names([str(file), "/a/b/", "/c.pt"]) == ["plain", "b", "c.pt"]
    shutil.copy(file, tmp_path)
    with pytest.raises(UsageError, match="has no adapter_config.json beside it, which says with which alpha"):
        load_adapter(load_model(BASE), tmp_path / file.name)
    assert read_origin(tmp_path / file.name) is None
    assert Checkpoint.open(BASE)
    raw = tmp_path / "other" / "chatglm-lora.pt"
    raw.parent.mkdir()
    torch.save(load_file(file), raw)
    shutil.copy(plain / "adapter_config.json", raw.parent)
    for path in (raw, raw.parent):  # the configuration counts, not the alpha of such files
        layers = [layer for layer in load_adapter(load_model(BASE), path).modules() if isinstance(layer, LoraLayer)]
        assert {layer.scaling["default"] for layer in layers} == {2}


def test_a_pointer_in_place_of_a_file(base, plain, tmp_path):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        directory = shutil.copytree(plain, tmp_path / name)
        (directory / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(UsageError, match=f"{name} is a Git LFS pointer"):
            load_adapter(base, directory)
