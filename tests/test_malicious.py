"""Checkpoints, adapters and configurations that would run code, read elsewhere or take all memory are refused."""

import json
import pickle
import shutil
import struct
import sys
import zipfile

from utils.checkpoint import Checkpoint, load_model, load_tokenizer
from utils.errors import UsageError
from utils.lora import load_adapter

import pytest
import torch
from conftest import GOLDEN, TINY
from safetensors.torch import load_file, save_file

INDEX = "pytorch_model.bin.index.json"


class Trap:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a released-layout checkpoint in two pickles."""
    return shutil.copytree(GOLDEN / "chatglm-6b-tiny", tmp_path / "checkpoint")


def change_config(directory, **values):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("write", ("zip", "legacy", "plain"))
def test_a_pickle_does_not_run(checkpoint, tmp_path, write):
    file, trap = checkpoint / "pytorch_model-00001-of-00002.bin", Trap(tmp_path / "ran")
    if write == "plain":
        file.write_bytes(pickle.dumps({"a": trap}))
    else:
        torch.save({"a": trap}, file, _use_new_zipfile_serialization=write == "zip")
    with pytest.raises(UsageError, match="that can be read safely"):
        load_model(str(checkpoint))
    with pytest.raises(pickle.UnpicklingError):  # nor where a library asks for it
        torch.load(file, weights_only=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ("chatglm-6b-tiny", "chatglm3-6b-tiny"))
def test_code_that_a_configuration_names_is_not_run(tmp_path, monkeypatch, name):
    directory = shutil.copytree(GOLDEN / name, tmp_path / "checkpoint")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Any: pass\n"
    for module in ("evil", "tokenization_chatglm"):
        (directory / f"{module}.py").write_text(code)
    maps = {"AutoConfig": "evil.Any", "AutoModel": "evil.Any", "AutoModelForCausalLM": "evil.Any"}
    change_config(
        directory, auto_map=maps, attn_implementation="evil/kernels", quantization_config={"quant_method": "x"}
    )
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Any", None]}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.chdir(directory)
    expected = load_model(str(GOLDEN / name)).state_dict()
    model = load_model(str(directory))
    assert all(value.equal(expected[key]) for key, value in model.state_dict().items())
    assert load_tokenizer(str(directory)).encode("你好") == load_tokenizer(str(GOLDEN / name)).encode("你好")
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules


@pytest.mark.parametrize("name", ("../elsewhere.bin", "/etc/passwd", "..", "a/b.bin", 7, None))
def test_an_index_that_points_outside(checkpoint, tmp_path, name):
    shutil.copy(checkpoint / "pytorch_model-00001-of-00002.bin", tmp_path / "elsewhere.bin")
    index = json.loads((checkpoint / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (checkpoint / INDEX).write_text(json.dumps(index))
    for open_it in (load_model, Checkpoint.open):
        with pytest.raises(UsageError, match="which is no file beside it"):
            open_it(str(checkpoint))


def header_of(tensors):
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    "content",
    [
        header_of({"lm_head.weight": {"dtype": "F32", "shape": [1 << 19, 1 << 19], "data_offsets": [0, 1 << 40]}}),
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 90 << 20) + b"{}",
        header_of({"lm_head.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}) + b"abcd",
        b"",
    ],
)
def test_a_header_that_claims_too_much(tmp_path, content):
    directory = shutil.copytree(TINY, tmp_path / "checkpoint")
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match="is cut or no safetensors file"):
        load_model(str(directory))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"num_layers": 10**9}, "num_layers is 1000000000, and must be a number from 1 to"),
        ({"hidden_size": -4}, "hidden_size is -4"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"num_attention_heads": "32"}, "num_attention_heads is '32'"),
        ({"vocab_size": 1 << 22}, "has the shape"),  # within bounds, and more than the file holds
        ({"num_layers": 500}, "weights are missing"),
        ({"layernorm_epsilon": {}}, "is no ChatGLM-6B"),
    ],
)
def test_absurd_sizes_take_no_memory(tmp_path, values, words):
    directory = shutil.copytree(TINY, tmp_path / "checkpoint")
    change_config(directory, **values)
    with pytest.raises(UsageError, match=words):
        load_model(str(directory))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda weight: weight.view(-1)[3:4].fill_(float("nan")), "not finite"),
        (lambda weight: weight.view(-1)[-1:].fill_(float("-inf")), "not finite"),
        (lambda weight: weight.view(-1)[:1].fill_(1e6), "too large for torch.float16"),
        (lambda weight: weight.resize_(3, 5), "has the shape .3, 5., not"),
    ],
)
def test_weights_that_cannot_be(tmp_path, change, words):
    directory = shutil.copytree(TINY, tmp_path / "checkpoint")
    weights = {key: value.float() for key, value in load_file(directory / "model.safetensors").items()}
    change(weights["transformer.layers.2.mlp.dense_4h_to_h.weight"])
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=words):
        load_model(str(directory), dtype=torch.float16)


def test_an_adapter_that_would_import_or_take_memory(tmp_path):
    source = GOLDEN / "adapters" / "v1" / "qkv"
    base = load_model(str(GOLDEN / "chatglm-6b-tiny"))
    for number, (values, words) in enumerate(
        [
            ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "names code to import"),
            ({"r": 10**9}, "has the rank 1000000000"),
            ({"r": "8"}, "has the rank 8"),
            ({"peft_type": "IA3"}, "only LORA"),
        ]
    ):
        directory = shutil.copytree(source, tmp_path / str(number))
        config = json.loads((directory / "adapter_config.json").read_text())
        (directory / "adapter_config.json").write_text(json.dumps(config | values))
        with pytest.raises(UsageError, match=words):
            load_adapter(base, directory)


def test_a_spoiled_vocabulary(checkpoint):
    (checkpoint / "ice_text.model").write_bytes(b"\xff" * 100)
    with pytest.raises(UsageError, match="cannot be read"):
        load_tokenizer(str(checkpoint))


def test_a_zip_that_names_files_elsewhere(checkpoint, tmp_path):
    with zipfile.ZipFile(checkpoint / "pytorch_model-00001-of-00002.bin", "w") as file:
        file.writestr("../../ran", b"x")
        file.writestr("archive/data.pkl", b"x")
    with pytest.raises(UsageError, match="read safely"):
        load_model(str(checkpoint))
    assert not (tmp_path / "ran").exists()
