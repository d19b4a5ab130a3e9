"""A checkpoint directory: which generation its files are, and files that are not the real ones."""

import json

import pytest
import torch
from checkpoint_copies import V1, V2, V3, V4, copy_of, edit
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from utils.checkpoint.directory import choose_generation
from utils.checkpoint.model import Checkpoint, load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.errors import UsageError
from utils.models.checkpoint_files import CheckpointFiles
from utils.models.convert_tokenizer import fast_tokenizer
from utils.models.family import CHATGLM2, CHATGLM3, CHATGLM_6B, GLM4, identify


def generation_in(directory):
    """The generation that opening `directory` finds."""
    return Checkpoint.open(str(directory), weights=False).generation


@pytest.mark.parametrize(
    ("source", "path", "expected"),
    [
        (V3, "/root/chatglm2-lora/models/chatglm3-6b", CHATGLM3),
        (V2, "/root/chatglm3_compare/chatglm2-6b", CHATGLM2),
        (V3, "D:\\chatglm2\\chatglm3-6b-128k\\", CHATGLM3),
        (V2, "THUDM/chatglm2-6b-32k", CHATGLM2),
        (V2, "THUDM/codegeex2-6b", CHATGLM2),
    ],
)
def test_the_last_part_of_a_path_names_the_release(tmp_path, capsys, source, path, expected):
    directory = copy_of(source, tmp_path / "glm-4-chatglm2", {"_name_or_path": path}, {"name_or_path": None})
    assert generation_in(directory) is expected and capsys.readouterr().out == ""


def test_what_the_files_are_counts_more_than_a_name(tmp_path, capsys):
    directory = copy_of(V3, tmp_path / "chatglm2-6b", {"_name_or_path": "x/chatglm2-6b"}, {"name_or_path": None})
    (directory / "tokenization_chatglm.py").write_text("class ChatGLMTokenizer: roles = ['<|user|>']")
    assert generation_in(directory) is CHATGLM3
    (directory / "tokenization_chatglm.py").write_text("class ChatGLMTokenizer:\n    def build_prompt(self): ...")
    edit(directory / "config.json", _name_or_path="x/chatglm3-6b")
    assert generation_in(directory) is CHATGLM2
    (directory / "tokenization_chatglm.py").unlink()
    edit(directory / "tokenizer_config.json", chat_template="{{ '<|assistant|>' }}", name_or_path="chatglm2-6b")
    assert generation_in(directory) is CHATGLM3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("name", "expected"), [("final", CHATGLM2), ("my-ChatGLM3-run", CHATGLM3)])
def test_a_guessed_generation_is_printed_once_and_decided_by_the_flag(tmp_path, capsys, name, expected):
    nameless = {"_name_or_path": None}, {"name_or_path": None}
    directory = copy_of(V3, tmp_path / "chatglm3" / name, *nameless)
    assert generation_in(directory) is expected and generation_in(directory) is expected
    output = capsys.readouterr().out
    assert output.count(f"is taken for {expected.name}") == 1 and "--generation" in output and output.count("\n") == 1
    for flag, generation in (("chatglm2", CHATGLM2), ("chatglm3", CHATGLM3)):
        choose_generation(str(directory), flag)
        assert generation_in(directory) is generation and capsys.readouterr().out == ""
    choose_generation(str(directory), "glm4")
    with pytest.raises(UsageError, match="--generation glm4: the files in .* are those of ChatGLM"):
        generation_in(directory)


def test_the_vocabulary_tells_glm4_and_the_layout_chatglm(tmp_path):
    other_names = {"_name_or_path": "x/chatglm3-6b"}, {"name_or_path": "chatglm2-6b"}
    assert generation_in(copy_of(V4, tmp_path / "chatglm2", *other_names)) is GLM4
    assert generation_in(copy_of(V1, tmp_path / "chatglm3", *other_names)) is CHATGLM_6B
    big = json.loads((V4 / "config.json").read_text()) | {"padded_vocab_size": 151552}
    assert identify(CheckpointFiles(tmp_path, big, {})) == (GLM4, None)  # a directory without a vocabulary


def test_another_model_of_the_library_is_refused_by_what_it_lacks(tmp_path):
    """glm-edge: transformers' own Glm with a chat of another form."""
    directory = tmp_path / "glm-edge"
    load_model(str(V3)).save_pretrained(directory)
    fast_tokenizer(load_tokenizer(str(V3))).save_pretrained(directory)
    with pytest.raises(UsageError, match="its tokenizer has no <sop>, <.endoftext.>, so its chats"):
        load_tokenizer(str(directory))
    assert AutoTokenizer.from_pretrained(directory).convert_tokens_to_ids("[gMASK]")


@pytest.mark.parametrize("source", [V1, V3])
def test_an_opened_checkpoint_is_not_opened_again(tmp_path, source):
    directory = copy_of(source, tmp_path / "opened")
    checkpoint = Checkpoint.open(str(directory))
    (directory / "config.json").unlink()
    model, expected = checkpoint.load_model(), load_model(str(source))
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    text = "你好 <|user|>"
    assert checkpoint.load_tokenizer().encode(text) == load_tokenizer(str(source)).encode(text)
    with pytest.raises(UsageError, match="has no config.json"):
        load_model(str(directory))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1018370\n"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (V1, "ice_text.model"),
        (V2, "tokenizer.model"),
        (V4, "tokenizer.model"),
        (V3, "config.json"),
        (V3, "tokenizer_config.json"),
        (V3, "added_tokens.json"),
    ],
)
def test_a_git_lfs_pointer_is_named(tmp_path, source, name):
    directory = copy_of(source, tmp_path / "pointers")
    (directory / name).write_text(POINTER)
    with pytest.raises(UsageError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        load_tokenizer(str(directory))


def test_a_prefix_of_p_tuning_is_named(tmp_path, capsys):
    config_only = copy_of(V1, tmp_path / "config-only", {"pre_seq_len": 128, "prefix_projection": False})
    load_model(str(config_only))
    assert "pre_seq_len 128" in capsys.readouterr().out
    trained = copy_of(V1, tmp_path / "trained", {"pre_seq_len": 4})
    for file in trained.glob("pytorch_model*"):
        file.unlink()
    state = load_model(str(V1)).state_dict() | {"transformer.prefix_encoder.embedding.weight": torch.ones(4, 384)}
    save_file({name: value.clone() for name, value in state.items()}, trained / "model.safetensors")
    with pytest.raises(UsageError, match="prefix_encoder.embedding.weight is a P-tuning prefix"):
        load_model(str(trained))
    prefix = load_file(trained / "model.safetensors")["transformer.prefix_encoder.embedding.weight"]
    save_file({"transformer.prefix_encoder.embedding.weight": prefix}, trained / "model.safetensors")
    with pytest.raises(UsageError, match="P-tuning prefix"):  # what P-tuning itself saves
        load_model(str(trained))
