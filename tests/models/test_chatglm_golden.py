"""ChatGLM-6B against values of the released code, on tiny random checkpoints in the released layout."""

import json
from functools import cached_property

import pytest
import torch
from conftest import GOLDEN, check_text_case
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from utils.checkpoint.model import load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.models import ChatGLMForConditionalGeneration, ChatGLMTokenizer

LOGITS = 1e-4
NAMES = ("chatglm-6b-tiny", "chatglm-6b-tiny28")


class Golden:
    """One checkpoint with its expected values."""

    def __init__(self, name: str):
        self.path = GOLDEN / name
        self.values = json.loads((self.path / "golden.json").read_text(encoding="utf-8"))
        self.tensors = load_file(self.path / "golden.safetensors")
        self.model = load_model(str(self.path))

    @cached_property
    def tokenizer(self) -> ChatGLMTokenizer:
        return load_tokenizer(str(self.path))


@pytest.fixture(scope="module", params=NAMES)
def golden(request) -> Golden:
    return Golden(request.param)


@pytest.fixture(params=("sdpa", "eager"))
def model(request, golden) -> ChatGLMForConditionalGeneration:
    golden.model.set_attn_implementation(request.param)
    yield golden.model
    golden.model.set_attn_implementation("sdpa")
    golden.model.zero_grad()


def largest_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()


@torch.no_grad()
def test_logits(golden, model):
    for i in range(3):
        logits = model(input_ids=golden.tensors[f"prompt.{i}.input_ids"]).logits
        assert largest_difference(logits, golden.tensors[f"prompt.{i}.logits"]) <= LOGITS
    logits = model(input_ids=golden.tensors["long.input_ids"]).logits[:, -4:]
    assert largest_difference(logits, golden.tensors["long.logits_last4"]) <= LOGITS


@torch.no_grad()
def test_hidden_states(golden, model):
    output = model(input_ids=golden.tensors["prompt.0.input_ids"], output_hidden_states=True)
    assert largest_difference(torch.stack(output.hidden_states), golden.tensors["prompt.0.hidden_states"]) <= LOGITS


@torch.no_grad()
def test_left_padded_batch(golden, model):
    tensors = golden.tensors
    logits = model(input_ids=tensors["batch.input_ids"], attention_mask=tensors["batch.valid"].long()).logits
    assert largest_difference(logits[tensors["batch.check"]], tensors["batch.logits_check"]) <= LOGITS


@torch.no_grad()
@pytest.mark.parametrize("layout", ("mask_only", "mask_and_gmask", "mask_in_text", "partial_answer"))
def test_other_special_token_layouts(golden, model, layout):
    input_ids = golden.tensors[f"special.{layout}.input_ids"]
    expected = golden.tensors[f"special.{layout}.logits_last"]
    assert largest_difference(model(input_ids=input_ids).logits[:, -1:], expected) <= LOGITS


@pytest.mark.parametrize("checkpointing", (False, True))
def test_loss_and_gradients(golden, model, checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    for case in golden.values["train"]:
        model.zero_grad()
        inputs = {key: golden.tensors[f"train.{case['name']}.{key}"] for key in ("input_ids", "labels")}
        loss = model(**inputs, use_cache=False).loss
        assert abs(loss.item() - case["loss"]) <= 1e-5
        loss.backward()
        parameters = dict(model.named_parameters())
        assert len(case["grad_norms"]) > 10
        for name, expected in case["grad_norms"].items():
            assert abs(parameters[name].grad.norm().item() - expected) <= 1e-4 * expected, name
    model.gradient_checkpointing_disable()
    model.eval()


def test_untied_gradients(golden):
    expected = golden.values["train_untied"]["grad_norms"]
    untied = ChatGLMForConditionalGeneration.from_pretrained(
        golden.path, dtype=torch.float32, tie_word_embeddings=False
    )
    untied(
        input_ids=golden.tensors["train.single.input_ids"], labels=golden.tensors["train.single.labels"]
    ).loss.backward()
    parameters = dict(untied.named_parameters())
    for name, norm in expected.items():
        assert abs(parameters[name].grad.norm().item() - norm) <= 1e-4 * norm


@pytest.mark.parametrize("cache", ("dynamic", "static", "none"))
def test_greedy_generation(golden, model, cache):
    kwargs = {
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "none": {"use_cache": False},
    }[cache]
    for case in golden.values["generate"]:
        input_ids = golden.tensors[f"generate.{case['name']}.input_ids"]
        output = model.generate(
            input_ids=input_ids,
            attention_mask=(input_ids != golden.tokenizer.pad_token_id).long(),
            **({"max_new_tokens": 24, "do_sample": False} | case["kwargs"] | kwargs),
        )
        assert torch.equal(output, golden.tensors[f"generate.{case['name']}.output_ids"]), case["name"]


def test_other_decoding_methods(golden):
    for name, kwargs in (("beam3", {"num_beams": 3}), ("reppen1.3", {"repetition_penalty": 1.3})):
        input_ids = golden.tensors[f"generate.{name}.input_ids"]
        mask = torch.ones_like(input_ids)
        output = golden.model.generate(
            input_ids=input_ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **kwargs
        )
        assert torch.equal(output, golden.tensors[f"generate.{name}.output_ids"]), name


def test_text_cases(golden):
    tokenizer = golden.tokenizer
    assert golden.values["texts"]
    for case in golden.values["texts"]:
        text, ids = case["text"], case["ids"]
        check_text_case(tokenizer, case)
        assert tokenizer.tokenize(text) == case["tokens"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == case["decode_noclean"]
        assert tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) == case["sp_ids"]


def test_pairs_truncation_and_padding(golden):
    tokenizer = golden.tokenizer
    for case in golden.values["pairs"]:
        assert tokenizer.encode(case["a"], case["b"]) == case["ids"]
        assert tokenizer.encode(case["a"], case["b"], add_special_tokens=False) == case["ids_nospecial"]
    for case in golden.values["truncation"]:
        assert tokenizer.encode(case["text"], truncation=True, **case["kwargs"]) == case["ids"]
    for case in golden.values["call_outputs"]:
        output = tokenizer(case["texts"], **case["kwargs"])
        assert output["input_ids"] == case["out"]["input_ids"]
        pads = [[int(i != tokenizer.pad_token_id) for i in row] for row in output["input_ids"]]
        assert output["attention_mask"] == pads


def test_decoding_of_single_ids(golden):
    for case in golden.values["decode_ids"]:
        assert golden.tokenizer.decode(case["ids"]) == case["decode"]
        assert golden.tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decode_skip_special"]
        assert golden.tokenizer.convert_ids_to_tokens(case["ids"]) == case["tokens"]


def test_special_tokens(golden):
    tokenizer, expected = golden.tokenizer, golden.values["special"]
    for key, value in expected.items():
        if key.startswith(("[", "<", "▁")):
            assert tokenizer.convert_tokens_to_ids(key) == value
        elif key == "len":
            assert len(tokenizer) == value
        elif key != "model_max_length":  # None there, a very large number in transformers 5
            assert getattr(tokenizer, key) == value, key


def test_auto_classes_and_round_trip(golden, tmp_path):
    tokenizer, model = AutoTokenizer.from_pretrained(golden.path), AutoModel.from_pretrained(golden.path)
    assert isinstance(tokenizer, ChatGLMTokenizer)
    assert isinstance(model, ChatGLMForConditionalGeneration)
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), dtype=model.dtype)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    text = "[MASK] here\ta  b<eop>c\n"
    assert load_tokenizer(str(tmp_path)).encode(text) == golden.tokenizer.encode(text)


def test_differing_lm_head_is_dropped(golden, tmp_path):
    """The released config ties the head to the embedding, and loading drops a head that differs."""
    state = {}
    for shard in golden.path.glob("*.bin"):
        state |= torch.load(shard, weights_only=True)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((golden.path / "config.json").read_bytes())
    model = load_model(str(tmp_path))
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert torch.equal(model.lm_head.weight, golden.model.lm_head.weight)


def test_rows_without_the_special_tokens_are_refused(golden):
    with pytest.raises(ValueError, match="<sop>"):
        golden.model(input_ids=torch.tensor([[5, 6, 7]]))
