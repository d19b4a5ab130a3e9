"""Adapters from other tools against values of the released models with PEFT; what is refused when loading."""

import json
import shutil

import pytest
import torch
from conftest import GOLDEN, check_generation
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from utils.checkpoint.directory import refuse_pointer
from utils.checkpoint.model import Checkpoint, load_model
from utils.common.errors import UsageError
from utils.lora.adapter import (
    AdapterOrigin,
    LoraSettings,
    attach_adapter,
    check_base,
    load_adapter,
    merge_adapter,
    read_origin,
    save_adapter,
)
from utils.lora.formats import RAW_NAME
from utils.models.convert_checkpoint import target_keys

BASES = {"v1": "chatglm-6b-tiny", "v2": "chatglm2-6b-tiny", "v3": "chatglm3-6b-tiny"}
ADAPTERS = GOLDEN / "adapters"
FORMS = ("", "newer-peft", RAW_NAME, f"chatglm-lora_older-names/{RAW_NAME}", "chatglm-lora_older-names")


def base(name):
    return load_model(str(GOLDEN / BASES[name]))


def values_of(directory):
    return json.loads((directory / "golden.json").read_text()), load_file(directory / "golden.safetensors")


@pytest.fixture(params=[f"{name}/{kind}" for name in BASES for kind in ("qkv", "all")])
def adapter(request):
    return ADAPTERS / request.param


@torch.no_grad()
def test_logits_in_every_form(adapter):
    _, tensors = values_of(adapter)
    for form in FORMS:
        model = load_adapter(base(adapter.parent.name), adapter / form)
        for i in range(2):
            logits = model(input_ids=tensors[f"prompt.{i}.input_ids"]).logits
            assert (logits - tensors[f"prompt.{i}.logits"]).abs().max() <= 1e-4, form


def test_greedy_ids_beside_and_inside_the_weights(adapter):
    values, tensors = values_of(adapter)
    assert values["generate"]
    for apply in (load_adapter, merge_adapter):
        model = apply(base(adapter.parent.name), adapter)
        for case in values["generate"]:
            check_generation(model, tensors, case)


def test_loss_and_gradients(adapter):
    """Query, key and value have a copy of A each: the released A's gradient is the sum of theirs."""
    values, _ = values_of(adapter)
    model = load_adapter(base(adapter.parent.name), adapter)
    parameters = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    inputs = load_file(GOLDEN / BASES[adapter.parent.name] / "golden.safetensors")
    loss = model(**{key: inputs[f"train.single.{key}"] for key in ("input_ids", "labels")}).loss
    assert abs(loss.item() - values["train"]["loss"]) <= 1e-5
    loss.backward()
    assert len(values["train"]["grad_norms"]) >= 6
    for name, expected in values["train"]["grad_norms"].items():
        module, _, matrix = name.removeprefix("base_model.model.").rpartition(".lora_")
        targets = [f"{module}.weight"]
        if "encoder.layers" in module:
            targets = target_keys(targets[0])
        grads = [parameters[f"base_model.model.{t.removesuffix('.weight')}.lora_{matrix}"].grad for t in targets]
        whole = sum(grads) if matrix.startswith("A") else torch.cat(grads)
        assert abs(whole.norm().item() - expected) <= 1e-4 * expected, name


def test_a_pickle_without_safetensors_is_read(tmp_path):
    source = ADAPTERS / "v3" / "all"
    for name in ("adapter_config.json", "adapter_model.bin"):
        shutil.copy(source / name, tmp_path)
    read, expected = (load_adapter(base("v3"), path).state_dict() for path in (tmp_path, source))
    assert all(torch.equal(read[key], expected[key]) for key in expected)


def test_alpha_of_a_raw_file(tmp_path):
    raw = shutil.copy(ADAPTERS / "v2" / "qkv" / RAW_NAME, tmp_path)
    scales = []
    for alpha in (None, 16):
        adapted = load_adapter(base("v2"), raw, alpha)
        scales.append(next(m for m in adapted.modules() if isinstance(m, LoraLayer)).scaling["default"])
    assert scales == [8, 4]
    for path in (ADAPTERS / "v2" / "qkv", ADAPTERS / "v2" / "qkv" / RAW_NAME):
        with pytest.raises(UsageError, match="--lora_alpha 16: .* records its own"):
            load_adapter(base("v2"), path, 16)


def test_quantised_base_takes_an_adapter():
    tensors = load_file(GOLDEN / "chatglm-6b-int4-tiny" / "golden.safetensors")
    ids, source = tensors["prompt.1.input_ids"], GOLDEN / "chatglm-6b-int4-tiny"
    adapted = merge_adapter(load_model(str(source)), ADAPTERS / "v1" / "all")
    assert (adapted(input_ids=ids).logits - tensors["prompt.1.logits"]).abs().max() > 1


class Trap:
    """A pickle that would run code."""

    def __reduce__(self):
        return (print, ("ran",))


def spoil(change):
    def make(directory):
        state = torch.load(ADAPTERS / "v3" / "qkv" / RAW_NAME, weights_only=True)
        torch.save(change(state), directory / RAW_NAME)

    return make


LAYER = "base_model.model.transformer.encoder.layers.{}.self_attention.query_key_value.lora_{}.default.weight"


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda directory: None, "neither adapter_config.json nor chatglm-lora.pt"),
        (spoil(lambda s: s | {"transformer.output_layer.weight": torch.zeros(2, 2)}), "is not a LoRA weight"),
        (spoil(lambda s: s | {LAYER.format(9, "A"): s[LAYER.format(0, "A")]}), "match nothing, first .*layers.9"),
        (spoil(lambda s: {k: v for k, v in s.items() if k != LAYER.format(1, "B")}), "are missing, first .*layers.1"),
        (
            spoil(lambda s: s | {LAYER.format(1, "B"): torch.zeros(64, 4)}),
            r"is \(64, 4\), not \(128, 4\)",
        ),
        (spoil(lambda s: s | {LAYER.format(1, "A"): torch.zeros(2, 64)}), "holds 2 ranks"),
        (spoil(lambda s: s | {LAYER.format(1, "A"): torch.full((4, 64), torch.nan)}), "not finite"),
        (spoil(lambda s: list(s.values())), "only names and tensors"),
        (spoil(lambda s: Trap()), "read safely"),
        (lambda directory: (directory / RAW_NAME).write_text("x"), "read safely"),
    ],
)
def test_a_spoiled_raw_file_is_refused(tmp_path, capsys, make, words):
    make(tmp_path)
    with pytest.raises(UsageError, match=words):
        load_adapter(base("v3"), tmp_path)
    assert "ran" not in capsys.readouterr().out


def test_an_adapter_of_another_generation_is_refused():
    with pytest.raises(UsageError, match="does not fit"):
        load_adapter(base("v3"), ADAPTERS / "v1" / "all")
    with pytest.raises(UsageError, match="does not fit"):
        load_adapter(base("v1"), ADAPTERS / "v2" / "qkv")


@pytest.fixture
def recorded(tmp_path):
    """An adapter that says it was trained on the ChatGLM-6B golden checkpoint."""
    checkpoint = Checkpoint.open(str(GOLDEN / BASES["v1"]))
    model = attach_adapter(base("v1"), LoraSettings(4, 32, 0.0, ["dense"]), seed=0)
    save_adapter(model, tmp_path / "adapter", AdapterOrigin("native", checkpoint.fingerprint(), "THUDM/chatglm-6b"))
    return tmp_path / "adapter"


def test_other_weights_are_told_apart(recorded, tmp_path):
    check_base(recorded, Checkpoint.open(str(GOLDEN / BASES["v1"])))
    check_base(recorded, Checkpoint.open(str(GOLDEN / "chatglm-6b-int4-tiny")))  # the same model, quantised
    check_base(ADAPTERS / "v1" / "qkv", Checkpoint.open(str(GOLDEN / "chatglm-6b-tiny28")))  # it records nothing
    for name in ("chatglm-6b-tiny28", "chatglm3-6b-tiny"):
        with pytest.raises(UsageError, match="trained on other weights .* THUDM/chatglm-6b"):
            check_base(recorded, Checkpoint.open(str(GOLDEN / name)))
    changed = tmp_path / "changed"
    load_model(str(GOLDEN / BASES["v1"])).save_pretrained(changed)  # other files, in float32: the same weights
    check_base(recorded, Checkpoint.open(str(changed)))
    state = load_file(changed / "model.safetensors")
    state["transformer.layers.1.mlp.dense_4h_to_h.weight"][0, 0] += 1
    save_file(state, changed / "model.safetensors")
    with pytest.raises(UsageError, match="trained on other weights"):
        check_base(recorded, Checkpoint.open(str(changed)))


def test_any_base_overrides_the_check(recorded, run_script, tmp_path):
    state = load_model(str(GOLDEN / BASES["v1"])).save_pretrained(tmp_path / "other")
    for name in ("ice_text.model", "tokenizer_config.json"):
        shutil.copy(GOLDEN / BASES["v1"] / name, tmp_path / "other")
    state = load_file(tmp_path / "other" / "model.safetensors")
    state["transformer.final_layernorm.weight"] *= 2
    save_file(state, tmp_path / "other" / "model.safetensors")
    command = (
        f"chatglm_milti_gpu_inference.py --model_name_or_path {tmp_path}/other --adapter_path {recorded} "
        f"--output_path {tmp_path}/answers --max_new_tokens 2"
    )
    refused = run_script(command)
    assert refused.code == 2 and "--any_base" in refused.err
    run_script(f"{command} --any_base").check()


def test_the_origin_lies_beside_a_file_too(recorded):
    origin = read_origin(recorded)
    assert read_origin(recorded / "adapter_model.safetensors") == origin and origin.tokenizer is None
    values = json.loads((recorded / "adapter_origin.json").read_text())
    for change, words in (
        ({"base": {"norms": "0"}}, "is not what this toolkit writes"),
        ({"template": "other"}, "is not what this toolkit writes"),
        ({"tokenizer": 3}, "is not what this toolkit writes"),
        ({"template": None}, "'template' is NoneType, not str"),
    ):
        (recorded / "adapter_origin.json").write_text(json.dumps(values | change))
        with pytest.raises(UsageError, match=words):
            read_origin(recorded)
    for content in ("", "[]", '{"base":' * 50_000):
        (recorded / "adapter_origin.json").write_text(content)
        with pytest.raises(UsageError, match="adapter_origin.json"):
            read_origin(recorded)
    del values["tokenizer"]  # what was written before
    (recorded / "adapter_origin.json").write_text(json.dumps(values | {"later": 1}))
    assert read_origin(recorded) == origin


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(UsageError, match="tokenizer.model is a Git LFS pointer, not the file: run `git lfs pull`"):
        refuse_pointer(tmp_path / "tokenizer.model")
    refuse_pointer(GOLDEN / BASES["v1"] / "ice_text.model")
