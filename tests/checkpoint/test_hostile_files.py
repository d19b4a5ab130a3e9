"""Checkpoints, adapters and configurations that would run code, read elsewhere or take all memory are refused."""

import json
import pickle
import shutil
import struct
import sys
import zipfile
from argparse import Namespace

import pytest
import torch
from conftest import GOLDEN, TINY
from safetensors.torch import load_file, save_file

from utils.checkpoint.model import Checkpoint, load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.checkpoint.weight_files import read_tensors, read_weights
from utils.common.errors import UsageError
from utils.lora.adapter import AdapterOrigin, load_adapter
from utils.training.preflight import check_previous_adapter

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
        with pytest.raises(UsageError, match="which is not a file beside it"):
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
    with pytest.raises(UsageError, match="is truncated or not a safetensors file"):
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
        ({"layernorm_epsilon": {}}, "does not describe ChatGLM-6B"),
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
            ({"r": 10**9}, "r is 1000000000, not a whole number"),
            ({"r": "8"}, "r is '8', not a whole number"),
            ({"peft_type": "IA3"}, "only LORA"),
        ]
    ):
        directory = shutil.copytree(source, tmp_path / str(number))
        config = json.loads((directory / "adapter_config.json").read_text())
        (directory / "adapter_config.json").write_text(json.dumps(config | values))
        with pytest.raises(UsageError, match=words):
            load_adapter(base, directory)


HUGE = 1 << 40  # values, which no machine holds


class Bytes:
    """A pickle that weights_only allows, and that takes as many bytes as it says."""

    def __reduce__(self):
        return (bytearray, (HUGE,))


def shared_by_many():
    one = torch.ones(256)
    return {f"w{number}": one.view(16, 16) for number in range(10)}


FILES = [
    ({"a": torch.ones(1).expand(HUGE)}, r"a of shape \(1099511627776,\) is larger than its data in the file"),
    ({"a": torch.ones(8).as_strided((1 << 20, 8), (0, 1))}, "is larger than its data in the file"),
    ({"a": torch.ones(8).as_strided((5, 4), (1, 1))}, "is larger than its data in the file"),
    (shared_by_many(), "w4 of shape .* is larger than its data in the file"),
    ({"a": torch.empty(HUGE, device="meta")}, "read safely"),
    ({"a": torch.sparse_coo_tensor([[5]], [1.0], (HUGE,))}, "read safely"),
    ({"a": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)}, "read safely"),
    ({"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, "read safely"),
    ({"a": Bytes()}, "read safely"),
    ({"a": torch.ones(4, dtype=torch.complex64)}, "a is complex64; a weight is float16, bfloat16"),
    ({"a": torch.ones(4, dtype=torch.bool)}, "a is bool"),
    ({"a": torch.ones(4, dtype=torch.int64)}, "a is int64"),
    ({"a" * 2000: torch.ones(4)}, "weight of the name 'aaa.*2,000 characters"),
    ({"a\n.b": torch.ones(4)}, r"weight of the name 'a\\n.b'"),
    ({3: torch.ones(4)}, "only names and tensors"),
    ({"a": {"b": torch.ones(4)}}, "only names and tensors"),
]


@pytest.mark.parametrize("content, words", FILES, ids=range(len(FILES)))
@pytest.mark.parametrize("zipped", (True, False))
def test_a_tensor_that_is_more_than_its_file(tmp_path, content, words, zipped):
    file = tmp_path / "pytorch_model.bin"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    for name in (file.name, "chatglm-lora.pt"):
        if name != file.name:
            shutil.copy(file, tmp_path / name)
        with pytest.raises(UsageError, match=words) as caught:
            list(read_tensors(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_views_and_shared_weights_are_read(tmp_path):
    """What real files hold: parts of one storage, a transposed weight, two names of one, a parameter, nothing."""
    whole = torch.arange(24.0).view(4, 6)
    content = {"a": whole[1:], "b": whole.t(), "c": whole, "p": torch.nn.Parameter(whole[:1]), "n": whole[:0]}
    for zipped in (True, False):
        torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        read = dict(read_weights(tmp_path))
        assert all(read[name].equal(value) and not read[name].requires_grad for name, value in content.items())


def test_parts_that_grow_when_they_are_read(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as plain, zipfile.ZipFile(tmp_path / "grown.bin", "w") as grown:
        for part in plain.infolist():
            grown.writestr(part.filename, plain.read(part), zipfile.ZIP_DEFLATED)
    assert list(read_tensors(tmp_path / "plain.bin"))
    with pytest.raises(UsageError, match="read safely"):
        list(read_tensors(tmp_path / "grown.bin"))


@pytest.mark.parametrize("name", ("chatglm-6b-tiny", "chatglm3-6b-tiny", "glm-4-9b-chat-tiny", "glm4-9b-0414-tiny"))
def test_a_checkpoint_with_an_expanded_norm(tmp_path, name):
    """In the fingerprint too, which is made before the model is loaded."""
    directory = shutil.copytree(GOLDEN / name, tmp_path / "checkpoint")
    state = dict(read_weights(directory))
    for file in (*directory.glob("*.index.json"), *directory.glob("model.safetensors")):
        file.unlink()
    norm = next(key for key in state if "final_layernorm.weight" in key or key == "model.norm.weight")
    torch.save(state | {norm: torch.ones(1).expand(HUGE)}, directory / "pytorch_model.bin")
    for read in (load_model, lambda path: Checkpoint.open(path).fingerprint()):
        with pytest.raises(UsageError, match=f"{norm} of shape"):
            read(str(directory))


def test_integers_in_place_of_weights(tmp_path):
    directory = shutil.copytree(TINY, tmp_path / "checkpoint")
    state = load_file(directory / "model.safetensors")
    state["transformer.layers.0.mlp.dense_h_to_4h.weight"] = torch.ones(
        state["transformer.layers.0.mlp.dense_h_to_4h.weight"].shape, dtype=torch.int8
    )
    save_file(state, directory / "model.safetensors")
    with pytest.raises(UsageError, match="dense_h_to_4h.weight is int8: is config.json that of these weights"):
        load_model(str(directory))


@pytest.mark.parametrize(
    "content, words",
    [
        ("[]", "list, not a JSON object"),
        ('{"weight_map":' * 50_000, "nested too deeply"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {"a": "absent.bin"}}', "lacks 1 of its weight files, first absent.bin"),
        ('{"weight_map": {"a": "ice_text.model"}}', "ice_text.model is not a plain file of tensors"),
        ("version https://git-lfs.github.com/spec/v1\n", f"{INDEX} is a Git LFS pointer"),
    ],
)
def test_an_index_of_another_shape(checkpoint, content, words):
    (checkpoint / INDEX).write_text(content)
    with pytest.raises(UsageError, match=words):
        load_model(str(checkpoint))


def test_a_weight_in_two_files(checkpoint):
    file = checkpoint / "pytorch_model-00001-of-00002.bin"
    state = torch.load(file, weights_only=True)
    state["lm_head.weight"] = torch.load(checkpoint / "pytorch_model-00002-of-00002.bin", weights_only=True)[
        "lm_head.weight"
    ]
    torch.save(state, file)
    with pytest.raises(UsageError, match="lm_head.weight is in pytorch_model-00001-of-00002.bin and in"):
        load_model(str(checkpoint))


def test_a_pointer_in_place_of_weights(checkpoint):
    (checkpoint / "pytorch_model-00002-of-00002.bin").write_text("version https://git-lfs.github.com/spec/v1\noid 0\n")
    with pytest.raises(UsageError, match="pytorch_model-00002-of-00002.bin is a Git LFS pointer"):
        Checkpoint.open(str(checkpoint))


def test_an_adapter_of_huge_rank(tmp_path):
    directory = shutil.copytree(GOLDEN / "adapters" / "v1" / "qkv", tmp_path / "adapter")
    state = load_file(directory / "adapter_model.safetensors")
    (directory / "adapter_model.safetensors").unlink()
    huge = {
        key: torch.ones(1, 1).expand(*((1 << 20, value.shape[1]) if "lora_A" in key else (value.shape[0], 1 << 20)))
        for key, value in state.items()
    }
    torch.save(huge, directory / "adapter_model.bin")
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | {"r": 1 << 20}))
    with pytest.raises(UsageError, match="is larger than its data in the file"):
        load_adapter(load_model(str(GOLDEN / "chatglm-6b-tiny")), directory)


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


@pytest.mark.parametrize(
    "content, words",
    [
        ("[" * 50_000, "adapter_config.json is nested too deeply"),
        ("[]", "adapter_config.json holds list"),
        ('{"target_modules": 7, "r": 4}', "holds the adapter of another run, with lora_rank 4 .now 8."),
        ('{"target_modules": [1, "a", null]}', "lora_target_modules ..1., .None., .a.. .now"),
    ],
)
def test_an_output_directory_with_a_spoiled_adapter(tmp_path, content, words):
    (tmp_path / "adapter_config.json").write_text(content)
    values = Namespace(
        output_dir=str(tmp_path),
        resume_from_checkpoint=None,
        lora_rank=8,
        lora_alpha=32,
        lora_target_modules=["query_key_value"],
    )
    with pytest.raises(UsageError, match=words):
        check_previous_adapter(values, AdapterOrigin("native", {}, "base"))
