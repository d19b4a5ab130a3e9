"""GLM-4-0414 and GLM-Z1 against values of transformers' Glm4ForCausalLM, and how the two are told apart."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Glm4ForCausalLM

from utils.checkpoint.directory import choose_generation
from utils.checkpoint.model import Checkpoint, load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.errors import UsageError
from utils.lora.adapter import load_adapter, merge_adapter
from utils.models.checkpoint_files import GENERATION_KEY
from utils.models.family import GLM4_0414, GLM4_HF, GLM_Z1, generation_of

PATH = GOLDEN / "glm4-9b-0414-tiny"
VALUES = json.loads((PATH / "golden.json").read_text(encoding="utf-8"))
TENSORS = load_file(PATH / "golden.safetensors")
ADAPTERS = ("attention", "all-linear")
LOGITS, ADAPTED_LOGITS = 5e-5, 1e-4
ANSWER_BEGINS = "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}<|assistant|>"
REASONING_BEGINS = "{%- if add_generation_prompt -%}<|assistant|>\n<think>{%- endif -%}"


@pytest.fixture(scope="module")
def model() -> Glm4ForCausalLM:
    return load_model(str(PATH))


def check_logits(model, tensors, tolerance):
    """Compare the logits of each prompt: of its last positions, as many as are recorded."""
    expected = {key: value for key, value in tensors.items() if key.startswith("prompt.") and key.endswith(".logits")}
    assert expected
    for key, values in expected.items():
        logits = model(input_ids=TENSORS[key.replace("logits", "input_ids")]).logits[:, -values.shape[1] :]
        assert (logits - values).abs().max() <= tolerance, key


def check_answers(model, tensors):
    """Compare greedy answers of at most 24 tokens."""
    expected = {key: value for key, value in tensors.items() if key.endswith(".output_ids")}
    assert expected
    for key, ids in expected.items():
        input_ids = TENSORS[key.replace("output_ids", "input_ids")]
        output = model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=24, do_sample=False
        )
        assert output.equal(ids), key


@torch.no_grad()
def test_logits(model):
    assert type(model) is Glm4ForCausalLM
    check_logits(model, TENSORS, LOGITS)
    logits = model(input_ids=TENSORS["long.input_ids"]).logits[:, -4:]
    assert (logits - TENSORS["long.logits_last4"]).abs().max() <= LOGITS
    valid = TENSORS["batch.valid"].bool()
    logits = model(input_ids=TENSORS["batch.input_ids"], attention_mask=valid.long()).logits[valid]
    assert (logits - TENSORS["batch.logits_valid"]).abs().max() <= LOGITS


def test_loss_and_gradients(model):
    model.zero_grad()
    names = ("input_ids", "labels", "attention_mask")
    loss = model(**{name: TENSORS[f"train.{name}"] for name in names}).loss
    assert abs(loss.item() - VALUES["train"]["loss"]) <= 1e-5
    loss.backward()
    parameters = dict(model.named_parameters())
    assert VALUES["train"]["grad_norms"].keys() == parameters.keys()
    for name, expected in VALUES["train"]["grad_norms"].items():
        assert abs(parameters[name].grad.norm().item() - expected) <= 1e-4 * expected, name


def test_greedy_generation(model):
    check_answers(model, TENSORS)


def test_texts():
    tokenizer = load_tokenizer(str(PATH))
    assert VALUES["texts"]
    for case in VALUES["texts"]:
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"]
        assert tokenizer.encode(case["text"]) == case["ids_default"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name):
    directory = PATH / "adapters" / name
    tensors = load_file(directory / "golden.safetensors")
    for apply in (load_adapter, merge_adapter):
        adapted = apply(load_model(str(PATH)), directory)
        with torch.no_grad():
            check_logits(adapted, tensors, ADAPTED_LOGITS)
            check_answers(adapted, tensors)


@pytest.mark.parametrize("name", ADAPTERS)
def test_loss_and_gradients_of_adapters(name):
    expected = load_file(PATH / "adapters" / name / "golden.safetensors")["train.loss"]
    norms = VALUES["adapters"][name]["grad_norms"]
    adapted = load_adapter(load_model(str(PATH)), PATH / "adapters" / name)
    parameters = {key.replace(".default", ""): p for key, p in adapted.named_parameters() if "lora_" in key}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    inputs = ("input_ids", "labels", "attention_mask")
    loss = adapted(**{key: TENSORS[f"train.{key}"] for key in inputs}).loss
    assert abs(loss - expected) <= 1e-5
    loss.backward()
    assert norms.keys() == parameters.keys()
    for key, norm in norms.items():
        assert abs(parameters[key].grad.norm().item() - norm) <= 1e-4 * norm, key


def files(directory: Path, **tokenizer_config) -> Path:
    """The checkpoint without its weights, under another name."""
    directory.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PATH / name, directory)
    change(directory / "tokenizer_config.json", **tokenizer_config)
    return directory


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def generations_of(directory: Path) -> set:
    """What the directory and its tokenizer are taken for."""
    tokenizer = load_tokenizer(str(directory))
    return {Checkpoint.open(str(directory), weights=False).generation, generation_of(tokenizer)}


@pytest.mark.parametrize(
    "template, generation",
    [
        (ANSWER_BEGINS, GLM4_0414),
        (REASONING_BEGINS, GLM_Z1),
        (REASONING_BEGINS.replace("\n", "\\n"), GLM_Z1),  # as an early revision has it
        ("{{ '<|assistant|>\\n<think>' }}", GLM_Z1),
        ("{{ '<|assistant|>' }}{{- '\\n<think>' -}}", GLM_Z1),
        (ANSWER_BEGINS + "{%- set text = text.split('</think>')[-1] -%}", GLM4_0414),
        (ANSWER_BEGINS + "\n<think></think>", GLM4_0414),  # no reasoning
        ([{"name": "default", "template": REASONING_BEGINS}], GLM_Z1),
    ],
)
def test_the_chat_template_tells_z1_apart(tmp_path, capsys, template, generation):
    """Whatever the directory is called, and without running the template."""
    other = {GLM_Z1: "GLM-4-9B-0414", GLM4_0414: "GLM-Z1-9B-0414"}[generation]
    assert generations_of(files(tmp_path / "json" / other, chat_template=template)) == {generation}
    if isinstance(template, str):
        directory = files(tmp_path / "jinja" / other, chat_template="{{ of_an_older_revision }}")
        (directory / "chat_template.jinja").write_text(template)
        assert generations_of(directory) == {generation}
    assert "is taken for" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, recorded, generation, reason",
    [
        ("GLM-Z1-9B-0414", None, GLM_Z1, "by the name of the directory"),
        ("glm-4-32b-base-0414", None, GLM4_0414, "by the name of the directory"),
        ("base", None, GLM4_0414, "the older of the two"),
        ("glm-4-from-z1", None, GLM4_0414, "the older of the two"),
        ("base", "zai-org/GLM-Z1-32B-0414", GLM_Z1, None),
        ("GLM-Z1-9B-0414", "zai-org/GLM-4-32B-Base-0414", GLM4_0414, None),
    ],
)
def test_without_a_chat_template_the_name_decides(tmp_path, capsys, name, recorded, generation, reason):
    directory = files(tmp_path / name)
    if recorded:
        change(directory / "config.json", _name_or_path=recorded)
    assert generations_of(directory) == {generation}
    out = " ".join(capsys.readouterr().out.split())
    guess = f"is taken for {generation.name} ({reason}): --generation glm4-0414 or glm-z1 decides"
    assert out.count("is taken for") == bool(reason) and (reason is None or guess in out)


def test_the_flag_decides(tmp_path):
    directory = files(tmp_path / "base", chat_template=REASONING_BEGINS)
    for row in (GLM4_0414, GLM_Z1):
        choose_generation(str(directory), row.flag)
        assert generations_of(directory) == {row}
    for flag in ("glm4", "chatglm3"):
        choose_generation(str(directory), flag)
        with pytest.raises(UsageError, match=f"--generation {flag}: the files in .* are those of GLM-Z1-0414"):
            load_tokenizer(str(directory))


@pytest.mark.parametrize("row", [GLM4_0414, GLM_Z1], ids=lambda row: row.flag)
def test_a_tokenizer_keeps_its_generation(tmp_path, row):
    """Copied, in another process, and saved: beside a config.json of the release and without one."""
    choose_generation(str(files(tmp_path / "base")), row.flag)
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    tokenizer.save_pretrained(tmp_path / "saved")
    copies = [copy.copy(tokenizer), copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))]
    copies.append(AutoTokenizer.from_pretrained(tmp_path / "saved"))
    assert all(generation_of(each) is row for each in copies)
    shutil.copy(PATH / "config.json", tmp_path / "saved")
    assert generations_of(tmp_path / "saved") == {row}


def test_a_record_of_another_architecture_is_not_followed(tmp_path):
    directory = files(tmp_path / "base", chat_template=REASONING_BEGINS)
    change(directory / "config.json", **{GENERATION_KEY: "ChatGLM3-6B"})
    assert generations_of(directory) == {GLM_Z1}
    change(directory / "config.json", **{GENERATION_KEY: "GLM-Z1-0414"}, model_type="glm")
    assert generations_of(directory) == {GLM4_HF}
    change(directory / "config.json", **{GENERATION_KEY: ["GLM-Z1-0414"]}, model_type="glm4")
    assert generations_of(directory) == {GLM_Z1}


@pytest.mark.parametrize("changes", [{"vision_config": {}}, {"text_config": {}}, {"model_type": "glm4v"}])
@pytest.mark.parametrize("recorded", [None, "GLM-4-0414"])
def test_models_that_see_are_refused(tmp_path, changes, recorded):
    directory = files(tmp_path / "GLM-4.1V-9B", chat_template=REASONING_BEGINS)
    change(directory / "config.json", **changes, **{GENERATION_KEY: recorded})
    with pytest.raises(UsageError, match="is not supported; supported are: .*GLM-Z1-32B-0414"):
        load_tokenizer(str(directory))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_hidden_layers": 2}, "layers.2.* is not a weight of GLM-4-0414"),
        ({"num_hidden_layers": 4}, "weights are missing, first model.layers.3"),
        ({"attention_bias": False}, "bias is not a weight of GLM-4-0414"),
        ({"num_key_value_heads": 4}, "has the shape"),
        ({"vocab_size": 970}, "speaks of 970 rows|has the shape"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"rms_norm_eps": "small"}, "does not describe GLM-4-0414"),
    ],
)
def test_a_config_of_other_weights_is_refused(tmp_path, changes, words):
    directory = shutil.copytree(PATH, tmp_path / "base")
    change(directory / "config.json", **changes)
    with pytest.raises(UsageError, match=words):
        load_model(str(directory))


def test_an_unknown_weight_is_refused(tmp_path):
    directory = shutil.copytree(PATH, tmp_path / "base")
    state = load_file(directory / "model.safetensors") | {"model.layers.0.mlp.gate.weight": torch.zeros(2)}
    save_file(state, directory / "model.safetensors")
    with pytest.raises(UsageError, match="layers.0.mlp.gate.weight is not a weight of GLM-4-0414"):
        load_model(str(directory))


@torch.no_grad()
def test_other_shapes_are_those_of_transformers(tmp_path):
    """Without biases and in bfloat16 as the 32B; heads that divide the hidden size otherwise; tied embeddings."""
    for number, changes in enumerate(
        (
            {"attention_bias": False, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8},
            {"num_key_value_heads": 1, "partial_rotary_factor": 1.0, "rope_theta": 500000.0},
            {"tie_word_embeddings": True, "num_hidden_layers": 1},
        )
    ):
        directory = shutil.copytree(PATH, tmp_path / str(number), ignore=shutil.ignore_patterns("*.safetensors"))
        change(directory / "config.json", **changes)
        torch.manual_seed(number)
        config = Checkpoint.open(str(directory), weights=False).config
        Glm4ForCausalLM(config).bfloat16().save_pretrained(directory)
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        input_ids = TENSORS["prompt.1.input_ids"]
        assert torch.equal(load_model(str(directory))(input_ids).logits, theirs(input_ids).logits)
