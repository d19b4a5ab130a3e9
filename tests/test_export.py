"""--merge_and_save: what is written, who can open it, and that it answers as before."""

import json
import re
import shutil

import utils.export
from utils.chatglm.fast_tokenizer import fast_tokenizer
from utils.chatglm.generations import CHATGLM, GLM4_HF
from utils.checkpoint import Checkpoint, load_model, load_tokenizer
from utils.drafts import encode_text
from utils.lora import AdapterOrigin, attach_adapter, merge_adapter, save_adapter
from utils.prompts import encode_prompt, template_for
from utils.rows import Message

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GlmConfig, GlmForCausalLM

SCRIPT = "chatglm_milti_gpu_inference.py"
BASES = {
    "chatglm-6b-tiny": GOLDEN / "adapters" / "v1" / "all",
    "chatglm2-6b-tiny": GOLDEN / "adapters" / "v2" / "all",
    "chatglm3-6b-tiny": GOLDEN / "adapters" / "v3" / "all",
    "glm-4-9b-chat-tiny": None,  # made below
}
CHAT = [Message("user", "今天天气怎么样？"), Message("assistant", "晴。"), Message("user", "hello")]


def make_adapter(directory, name="glm-4-9b-chat-tiny", template="native"):
    base = str(GOLDEN / name)
    model = attach_adapter(load_model(base), 4, 32, 0.0, ["q_proj", "down_proj"], seed=1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, directory, AdapterOrigin(template, Checkpoint.open(base).fingerprint(), base, "made"))
    return directory


class Merged:
    def __init__(self, name, directory, run_script):
        self.base, self.path = GOLDEN / name, directory / "merged"
        self.adapter = BASES[name] or make_adapter(directory / "adapter")
        (directory / "rows.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in "天气猫狗你我"))
        self.paths = f"--input_path {directory}/rows.jsonl --output_path {directory}/answers --max_new_tokens 16"
        command = f"{SCRIPT} --model_name_or_path {self.base} --adapter_path {self.adapter}"
        result = run_script(f"{command} --merge_and_save {self.path} {self.paths}").check()
        assert "greedy tokens before and after merging: 64 of 64 equal" in result.out
        self.answers = (directory / "answers").read_text()


@pytest.fixture(scope="module", params=BASES)
def merged(request, tmp_path_factory, run_script):
    return Merged(request.param, tmp_path_factory.mktemp("export"), run_script)


def test_answers_are_those_of_base_and_adapter(merged, run_script):
    run_script(f"{SCRIPT} --model_name_or_path {merged.path} {merged.paths}").check()
    assert (merged.path.parent / "answers").read_text() == merged.answers


def test_layout(merged):
    checkpoint = Checkpoint.open(str(merged.path))
    expected = Checkpoint.open(str(merged.base)).generation.name
    assert checkpoint.generation.name == ("GLM-4-9B-hf" if expected == "GLM-4-9B" else expected)
    assert not [path for path in merged.path.parent.iterdir() if path.name.startswith(f".{merged.path.name}")]
    state = load_file(merged.path / "model.safetensors")
    if checkpoint.generation is CHATGLM:
        assert "lm_head.weight" in state and "transformer.layers.0.attention.query_key_value.weight" in state
        assert json.loads((merged.path / "config.json").read_text())["inner_hidden_size"]
    expected = merge_adapter(load_model(str(merged.base)), merged.adapter).state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("merged", list(BASES)[1:], indirect=True)  # ChatGLM-6B is no model of transformers
def test_transformers_opens_it_alone(merged, run_command):
    """In a process where no code of this repository can be imported."""
    code = (
        "import sys, json; from transformers import AutoModelForCausalLM, AutoTokenizer; path = sys.argv[1]; "
        "model = AutoModelForCausalLM.from_pretrained(path); tokenizer = AutoTokenizer.from_pretrained(path); "
        "chat = [{'role': 'user', 'content': '天气'}]; "
        "inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors='pt', "
        "return_dict=True); output = model.generate(**inputs, max_new_tokens=16, do_sample=False); "
        "print(json.dumps([type(model).__name__, output[0].tolist(), model.generation_config.eos_token_id])); "
        "assert 'utils' not in sys.modules"
    )
    script = merged.path.parent / "alone.py"
    script.write_text(code)
    result = run_command(f"python {script} {merged.path}", cwd=merged.path.parent).check()
    name, ids, stop_ids = json.loads(result.out.splitlines()[-1])
    tokenizer = load_tokenizer(str(merged.base))
    model = merge_adapter(load_model(str(merged.base)), merged.adapter)
    prompt = torch.tensor([encode_prompt(tokenizer, [Message("user", "天气")])])
    stops = template_for(tokenizer).stop_ids(tokenizer)
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
    )
    assert (name, ids, stop_ids) == ("GlmForCausalLM", output[0].tolist(), stops)


@pytest.mark.parametrize("name", ("chatglm2-6b-tiny", "chatglm3-6b-tiny", "glm-4-9b-chat-tiny"))
def test_fast_tokenizer_makes_the_same_tokens(name):
    tokenizer = load_tokenizer(str(GOLDEN / name))
    fast = fast_tokenizer(tokenizer)
    special = [token.content for token in fast.added_tokens_decoder.values()]
    spelled = re.compile("|".join(rf"\b{t}\b" if t.isalpha() else re.escape(t) for t in special))
    texts = [case["text"] for case in json.loads((GOLDEN / name / "golden.json").read_text())["texts"]]
    plain = [text for text in texts if not spelled.search(text)]
    assert len(plain) > 70
    for text in [*plain, "soprano 是女高音"]:
        assert fast.encode(text, add_special_tokens=False) == encode_text(tokenizer, text), text
        assert fast.encode(text) == tokenizer.encode(text), text
    messages = [{"role": message.role, "content": message.content} for message in CHAT]
    for turns in (1, 3):
        ids = fast.apply_chat_template(messages[-turns:], add_generation_prompt=True, return_dict=False)
        assert ids == encode_prompt(tokenizer, CHAT[-turns:])


def test_rotary_base_survives(tmp_path):
    """GLM-4's rope_ratio of 500, for readers of either spelling."""
    make_adapter(tmp_path / "adapter")
    base = str(GOLDEN / "glm-4-9b-chat-tiny")
    utils.export.merge_and_save(base, tmp_path / "adapter", tmp_path / "merged", torch.float32)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000000
    assert AutoConfig.from_pretrained(tmp_path / "merged").rope_parameters["rope_theta"] == 5000000


def test_merging_what_was_merged(tmp_path):
    make_adapter(tmp_path / "adapter", "chatglm3-6b-tiny")
    base = str(GOLDEN / "chatglm3-6b-tiny")
    utils.export.merge_and_save(base, tmp_path / "adapter", tmp_path / "once", torch.float32)
    utils.export.merge_and_save(str(tmp_path / "once"), tmp_path / "adapter", tmp_path / "twice", torch.float32)
    assert type(AutoConfig.from_pretrained(tmp_path / "twice")) is GlmConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "twice")) is GlmForCausalLM
    assert AutoTokenizer.from_pretrained(tmp_path / "twice").encode("你好") == load_tokenizer(base).encode("你好")
    assert Checkpoint.open(str(tmp_path / "twice")).generation.name == "ChatGLM3-6B"


def test_half_precision_is_what_is_asked_for(tmp_path, run_script):
    make_adapter(tmp_path / "adapter", template="alpaca")
    command = f"{SCRIPT} --model_name_or_path {GOLDEN}/glm-4-9b-chat-tiny --adapter_path {tmp_path}/adapter --bf16"
    out = run_script(f"{command} --merge_and_save {tmp_path}/merged").check().out
    assert "rows" not in out  # none were asked for
    assert {value.dtype for value in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    assert Checkpoint.open(str(tmp_path / "merged")).generation is GLM4_HF
    answer = f"{SCRIPT} --model_name_or_path {tmp_path}/merged --output_path {tmp_path}/answers --max_new_tokens 1"
    assert "template alpaca (the merged adapter's)" in run_script(answer).check().out


def test_a_merge_that_changes_answers_is_not_written(tmp_path, monkeypatch):
    make_adapter(tmp_path / "adapter")
    base = str(GOLDEN / "glm-4-9b-chat-tiny")
    monkeypatch.setattr(utils.export, "load_model", lambda path, dtype: load_model(base))  # never what was written
    with pytest.raises(RuntimeError, match="is not written"):
        utils.export.merge_and_save(base, tmp_path / "adapter", tmp_path / "merged", torch.float32)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--merge_and_save {path}/new", "needs an adapter"),
        ("--merge_and_save {path}/new --adapter_path {path}/adapter --quantize int8", "without --quantize"),
        ("--merge_and_save {path} --adapter_path {path}/adapter", "is not empty"),
        ("--merge_and_save {path}/new --adapter_path {path}/other", "trained on other weights"),
    ],
)
def test_wrong_use_is_one_line(run_script, tmp_path, flags, words):
    make_adapter(tmp_path / "adapter")
    shutil.copytree(tmp_path / "adapter", tmp_path / "other")
    origin = json.loads((tmp_path / "other" / "adapter_origin.json").read_text())
    origin["base"]["norms"] = "0"
    (tmp_path / "other" / "adapter_origin.json").write_text(json.dumps(origin))
    base = GOLDEN / "glm-4-9b-chat-tiny"
    result = run_script(f"{SCRIPT} --model_name_or_path {base} {flags.format(path=tmp_path)}")
    assert result.code == 2 and words in result.err.strip().splitlines()[-1] and "Traceback" not in result.err
    assert not (tmp_path / "new").exists()


def test_a_quantised_base_is_refused(run_script, tmp_path):
    command = f"{SCRIPT} --model_name_or_path {GOLDEN}/chatglm-6b-int4-tiny --adapter_path {BASES['chatglm-6b-tiny']}"
    result = run_script(f"{command} --merge_and_save {tmp_path}/new")
    assert result.code == 2 and "is quantised and cannot take an adapter" in result.err
