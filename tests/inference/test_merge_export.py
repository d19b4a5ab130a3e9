"""--merge_and_save: what it writes, who can open it, and that the answers are those of base and adapter."""

import json
import os
import re
import shutil

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
)

from utils.checkpoint.model import Checkpoint, load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.errors import UsageError
from utils.inference import merge_export
from utils.lora.adapter import AdapterOrigin, LoraSettings, attach_adapter, merge_adapter, save_adapter
from utils.models.conversation import Message
from utils.models.convert_tokenizer import fast_tokenizer
from utils.models.family import CHATGLM_6B, GLM4_0414, GLM4_HF, GLM_Z1, generation_of
from utils.models.templates import encode_prompt, template_for
from utils.models.token_spans import encode_text

SCRIPT = "chatglm_milti_gpu_inference.py"
BASES = {
    "chatglm-6b-tiny": GOLDEN / "adapters" / "v1" / "all",
    "chatglm2-6b-tiny": GOLDEN / "adapters" / "v2" / "all",
    "chatglm3-6b-tiny": GOLDEN / "adapters" / "v3" / "all",
    "glm-4-9b-chat-tiny": None,  # made below
    "glm4-9b-0414-tiny": GOLDEN / "glm4-9b-0414-tiny" / "adapters" / "all-linear",
}
CHAT = [Message("user", "今天天气怎么样？"), Message("assistant", "晴。"), Message("user", "hello")]


def make_adapter(directory, name="glm-4-9b-chat-tiny", template="native"):
    base = str(GOLDEN / name)
    model = attach_adapter(load_model(base), LoraSettings(4, 32, 0.0, ["q_proj", "down_proj"]), seed=1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, directory, AdapterOrigin(template, Checkpoint.open(base).fingerprint(), base, "made"))
    return directory


def merge(base, adapter, directory) -> None:
    """Write a merged checkpoint in float32."""
    source = merge_export.MergeSource(Checkpoint.open(str(base)), load_tokenizer(str(base)), adapter)
    merge_export.merge_and_save(source, directory, torch.float32)


class Merged:
    def __init__(self, name, directory, run_script):
        self.base, self.path = GOLDEN / name, directory / "merged"
        self.adapter = BASES[name] or make_adapter(directory / "adapter")
        (directory / "rows.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in "天气猫狗你我"))
        self.paths = f"--input_path {directory}/rows.jsonl --output_path {directory}/answers --max_new_tokens 16"
        command = f"{SCRIPT} --model_name_or_path {self.base} --adapter_path {self.adapter}"
        umask = os.umask(0o027)
        result = run_script(f"{command} --merge_and_save {self.path} {self.paths}").check()
        os.umask(umask)
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
    assert {oct(path.stat().st_mode & 0o777) for path in merged.path.iterdir()} == {"0o640"}  # by the umask
    expected = Checkpoint.open(str(merged.base)).generation.name
    assert checkpoint.generation.name == ("GLM-4-9B-hf" if expected == "GLM-4-9B" else expected)
    assert not [path for path in merged.path.parent.iterdir() if path.name.startswith(f".{merged.path.name}")]
    state = load_file(merged.path / "model.safetensors")
    if checkpoint.generation is CHATGLM_6B:
        assert "lm_head.weight" in state and "transformer.layers.0.attention.query_key_value.weight" in state
        assert json.loads((merged.path / "config.json").read_text())["inner_hidden_size"]
    expected = merge_adapter(load_model(str(merged.base)), merged.adapter).state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


# ChatGLM-6B is no model of transformers, and the tiny GLM-4-0414 has no chat template.
@pytest.mark.parametrize("merged", list(BASES)[1:-1], indirect=True)
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
    """GLM-4's rope_ratio of 500, for readers of either spelling, after a second merge too."""
    make_adapter(tmp_path / "adapter")
    base, frequencies = GOLDEN / "glm-4-9b-chat-tiny", []
    for name in ("once", "twice"):
        merge(base, tmp_path / "adapter", tmp_path / name)
        base = tmp_path / name
        config = json.loads((base / "config.json").read_text())
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000000
        assert config["partial_rotary_factor"] == 0.5 and "rope_scaling" not in config
        older = {key: value for key, value in config.items() if key != "rope_parameters"}
        for values in (config, older):
            (base / "config.json").write_text(json.dumps(values))
            assert AutoConfig.from_pretrained(base).rope_parameters["rope_theta"] == 5000000
            frequencies.append(AutoModelForCausalLM.from_pretrained(base).model.rotary_emb.inv_freq)
    assert all(values.equal(frequencies[0]) for values in frequencies)


def test_interpolated_positions_survive(tmp_path):
    """ChatGLM2-6B-32k's, which older readers know as rope_scaling."""
    base = shutil.copytree(GOLDEN / "chatglm2-6b-tiny", tmp_path / "base")
    change(base / "config.json", rope_ratio=16)
    make_adapter(tmp_path / "adapter", "chatglm2-6b-tiny")
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 16.0} and config["rope_theta"] == 10000
    before = AutoConfig.from_pretrained(tmp_path / "merged").rope_parameters
    del config["rope_parameters"]
    (tmp_path / "merged" / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(tmp_path / "merged").rope_parameters == before
    assert before == load_model(str(base)).config.rope_parameters


def change(file, **values):
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


SETTINGS = [
    ({"do_sample": False, "temperature": 0.8, "top_p": 0.8}, {"do_sample": False}),
    ({"do_sample": True, "temperature": 0.8, "repetition_penalty": 1.3, "top_p": 0.8}, None),
    ({"do_sample": True, "num_beams": 2, "num_return_sequences": 2, "early_stopping": True}, None),
    ({"num_return_sequences": 4, "typical_p": 0.5, "top_k": 7}, {}),
    ({"min_new_tokens": 3, "no_repeat_ngram_size": 2, "bad_words_ids": [[5]], "of_another_program": {"a": 1}}, None),
    ({"assistant_model": "x", "cache_implementation": "of the future", "max_new_tokens": 5}, {"max_new_tokens": 5}),
    ({"eos_token_id": 1, "pad_token_id": -1, "bos_token_id": 1}, {"bos_token_id": 1}),
]


@pytest.mark.parametrize("name", ("chatglm-6b-tiny", "chatglm3-6b-tiny"))
def test_settings_for_generation_are_kept(tmp_path, capsys, name):
    """The check is greedy whatever they are; one line names those without effect, which cannot be written."""
    base = shutil.copytree(GOLDEN / name, tmp_path / "base")
    tokenizer = load_tokenizer(str(base))
    stops = template_for(tokenizer).stop_ids(tokenizer)
    for number, (settings, kept) in enumerate(SETTINGS):
        (base / "generation_config.json").write_text(json.dumps(settings))
        merged = tmp_path / str(number)
        merge(base, BASES[name], merged)
        written = json.loads((merged / "generation_config.json").read_text())
        expected = settings if kept is None else kept
        assert {key: written.get(key) for key in expected} == expected
        left_out = settings.keys() - expected.keys() - {"eos_token_id", "pad_token_id"}
        out = capsys.readouterr().out
        assert all(key in out and key not in written for key in left_out)
        assert (written["eos_token_id"], written["pad_token_id"]) == (stops, tokenizer.pad_token_id)
        GenerationConfig.from_pretrained(merged).save_pretrained(tmp_path / "again")
    for content, words in (("[]", "not a JSON object"), ('{"watermarking_config": {"a": 1}}', "cannot be used")):
        (base / "generation_config.json").write_text(content)
        with pytest.raises(UsageError, match=f"generation_config.json .*{words}"):
            merge(base, BASES[name], tmp_path / "new")


def test_files_that_are_links_and_code_are_not_copied(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("private key")
    base, adapter = shutil.copytree(GOLDEN / "chatglm-6b-tiny", tmp_path / "base"), BASES["chatglm-6b-tiny"]
    (base / "modeling_chatglm.py").write_text("code")
    (base / "notes.txt").symlink_to(secret)
    (base / "other.json").symlink_to(secret)
    (base / "special_tokens_map.json").symlink_to("also.json")  # within the directory
    (base / "also.json").write_text("{}")
    merge(base, adapter, tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert not names & {"modeling_chatglm.py", "notes.txt", "other.json"} and "special_tokens_map.json" in names
    secret.write_text("{}")
    for name in (
        "generation_config.json",
        "added_tokens.json",
        "chat_template.jinja",
        "additional_chat_templates/a.jinja",
    ):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).symlink_to(secret)
        with pytest.raises(UsageError, match=f"{name} is a link to {secret}, which a merge does not copy"):
            merge(base, adapter, tmp_path / "new")
        (base / name).unlink()


def test_a_hub_cache_of_links_is_merged(tmp_path):
    """Whose files are links to ../../blobs; those of another repository are not this one's."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "1234", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((GOLDEN / "chatglm3-6b-tiny").iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    adapter = BASES["chatglm3-6b-tiny"]
    merge(snapshot, adapter, tmp_path / "merged")
    (tmp_path / "models--y").mkdir()
    shutil.move(blobs / "0", tmp_path / "models--y" / "0")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "models--y" / "0")
    with pytest.raises(UsageError, match="is a link to .*models--y"):
        merge(snapshot, adapter, tmp_path / "new")


def test_merging_what_was_merged(tmp_path):
    make_adapter(tmp_path / "adapter", "chatglm3-6b-tiny")
    base = str(GOLDEN / "chatglm3-6b-tiny")
    merge(base, tmp_path / "adapter", tmp_path / "once")
    merge(tmp_path / "once", tmp_path / "adapter", tmp_path / "twice")
    assert type(AutoConfig.from_pretrained(tmp_path / "twice")) is GlmConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "twice")) is GlmForCausalLM
    assert AutoTokenizer.from_pretrained(tmp_path / "twice").encode("你好") == load_tokenizer(base).encode("你好")
    assert Checkpoint.open(str(tmp_path / "twice")).generation.name == "ChatGLM3-6B"


@pytest.mark.parametrize("name", ["GLM-4-9B-0414", "GLM-Z1-9B-0414"])
@pytest.mark.parametrize("in_a_file", [False, True])
def test_glm_4_0414_keeps_its_tokenizer_and_chat_template(tmp_path, name, in_a_file):
    """Merged once and twice, it is of the same generation, and transformers alone gives it the same logits."""
    text = "{{ '[gMASK]<sop>' }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}<|assistant|>"
    text += "\n<think>" if "Z1" in name else ""
    base = shutil.copytree(GOLDEN / "glm4-9b-0414-tiny", tmp_path / "base")
    if in_a_file:
        (base / "chat_template.jinja").write_text(text)
    else:
        change(base / "tokenizer_config.json", chat_template=text)
    adapter = base / "adapters" / "attention"
    merge(base, adapter, tmp_path / "once")
    merge(tmp_path / "once", adapter, tmp_path / "twice")
    generation = Checkpoint.open(str(base)).generation
    assert generation is (GLM_Z1 if "Z1" in name else GLM4_0414)
    kept = [file.name for file in base.iterdir() if "token" in file.name or file.name == "chat_template.jinja"]
    assert len(kept) == 2 + in_a_file
    for merged in (tmp_path / "once", tmp_path / "twice"):
        assert Checkpoint.open(str(merged)).generation is generation
        assert generation_of(load_tokenizer(str(merged))) is generation
        assert all((merged / name).read_bytes() == (base / name).read_bytes() for name in kept)
        assert AutoTokenizer.from_pretrained(merged).chat_template == text
        settings, released = (
            json.loads((path / "generation_config.json").read_text()) | {"transformers_version": None}
            for path in (merged, base)
        )
        assert settings == released
        config = json.loads((merged / "config.json").read_text())
        assert (config["model_type"], config["rope_theta"], config["rms_norm_eps"]) == ("glm4", 10000, 1e-5)
    expected = merge_adapter(load_model(str(base)), adapter)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    assert type(theirs) is Glm4ForCausalLM
    input_ids = load_file(base / "golden.safetensors")["prompt.0.input_ids"]
    assert torch.equal(theirs(input_ids).logits, expected(input_ids).logits)


def test_half_precision_is_what_is_asked_for(tmp_path, run_script):
    make_adapter(tmp_path / "adapter", template="alpaca")
    command = f"{SCRIPT} --model_name_or_path {GOLDEN}/glm-4-9b-chat-tiny --adapter_path {tmp_path}/adapter --bf16"
    out = run_script(f"{command} --merge_and_save {tmp_path}/merged").check().out
    assert '"rows"' not in out  # none were asked for
    assert {value.dtype for value in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    assert Checkpoint.open(str(tmp_path / "merged")).generation is GLM4_HF
    answer = f"{SCRIPT} --model_name_or_path {tmp_path}/merged --output_path {tmp_path}/answers --max_new_tokens 1"
    assert "template alpaca (the merged adapter's)" in " ".join(run_script(answer).check().out.split())


def test_a_merge_that_changes_answers_is_not_written(tmp_path, monkeypatch):
    make_adapter(tmp_path / "adapter")
    base = str(GOLDEN / "glm-4-9b-chat-tiny")
    monkeypatch.setattr(merge_export, "load_model", lambda path, dtype: load_model(base))  # never what was written
    with pytest.raises(RuntimeError, match="is not written"):
        merge(base, tmp_path / "adapter", tmp_path / "merged")
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
