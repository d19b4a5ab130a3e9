"""`--template checkpoint`, the options of the chat flags, and the line on a template that differs."""

import json
import shutil
from types import SimpleNamespace

import pytest
from conftest import GOLDEN

from utils.checkpoint.template import template_of_flags
from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.errors import UsageError
from utils.data.encode import encode_example, encode_rows, rows_to_train
from utils.data.row_parser import parse_row
from utils.models.chat_options import chat_options
from utils.models.checkpoint_template import note_on_template
from utils.models.templates import template_for
from utils.models.token_spans import IGNORE_INDEX

BASE = GOLDEN / "glm4-9b-0414-tiny"
GLM = """[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>
{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
OTHER = """{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}\
{% if add_generation_prompt %}<s>assistant: {% endif %}"""
ENDS = GLM.replace("{{ m['content'] }}", "{{ m['content'] }}{% if m['role'] == 'assistant' %}<|user|>{% endif %}")
THINKS = GLM.replace("<|assistant|>{% endif %}", "<|assistant|>\n<think>{% endif %}")
ROW = {"messages": [{"role": "user", "content": "一 <|user|> 二"}, {"role": "assistant", "content": "三"}]}


def tokenizer_with(template):
    tokenizer = load_tokenizer(str(BASE))
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "ends"), [(GLM, "\n三<|user|>"), (OTHER, "三</s><|user|>"), (ENDS, "\n三<|user|>")]
)
def test_rows_have_the_tokens_of_the_checkpoints_template(template, ends):
    tokenizer = tokenizer_with(template)
    own, row = template_for(tokenizer, "checkpoint"), parse_row(ROW)
    (example,) = [each.example() for each in encode_rows(tokenizer, rows_to_train(row, own, "last"), None, own)]
    prompt = own.encoded_prompt(tokenizer, row._replace(messages=row.prompt)).ids()
    assert example.input_ids[: len(prompt)] == prompt and example.labels[: len(prompt)] == [IGNORE_INDEX] * len(prompt)
    assert tokenizer.decode(example.labels[len(prompt) :]) == ends
    rendered = tokenizer.apply_chat_template(ROW["messages"][:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt) == rendered
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    assert prompt.count(user) == ("<|" in template)  # the one that the question spells is text
    assert encode_example(tokenizer, row, len(example.input_ids), own) == example


def test_a_template_that_differs_is_named():
    for template, differs in ((GLM, True), (OTHER, True), (None, False)):  # the first knows no tools
        tokenizer = tokenizer_with(template)
        assert bool(note_on_template(tokenizer, template_for(tokenizer))) == differs
    with pytest.raises(UsageError, match="no chat_template"):
        template_of_flags(tokenizer_with(None), "checkpoint", {})


def test_flags_become_the_options_of_the_template():
    given = SimpleNamespace(thinking="off", clear_thinking="on", reasoning_effort="high")
    assert chat_options(given) == {"enable_thinking": False, "clear_thinking": True, "reasoning_effort": "high"}
    assert chat_options(SimpleNamespace(thinking=None, clear_thinking=None, reasoning_effort=None)) == {}


def test_an_option_without_effect_is_refused():
    for options, flag in (
        ({"enable_thinking": False}, "--thinking off"),
        ({"reasoning_effort": "high"}, "--reasoning"),
    ):
        with pytest.raises(UsageError, match=flag):
            template_of_flags(tokenizer_with(None), "native", options)
    assert template_of_flags(tokenizer_with(GLM), "checkpoint", {"enable_thinking": False}).options


def test_a_template_that_cannot_be_trained_on_is_a_usage_error(run_script, tmp_path):
    """GLM-Z1's opens an answer with <think>, and writes earlier answers without."""
    model = shutil.copytree(BASE, tmp_path / "model")
    (model / "chat_template.jinja").write_text(THINKS)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW))
    result = run_script(
        f"tokenize_dataset_rows_belle.py --jsonl_path {tmp_path}/rows.jsonl --save_path {tmp_path}/tokens "
        f"--model_name_or_path {model} --template checkpoint"
    )
    assert result.code == 2 and "--template checkpoint" in result.err and "Traceback" not in result.err


def test_training_inference_and_merging_take_the_checkpoints_template(run_script, tmp_path):
    model = shutil.copytree(GOLDEN / "glm-4-9b-chat-tiny", tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": OTHER}))
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW))
    flags = f"--model_name_or_path {model}"
    tokenize = (
        f"tokenize_dataset_rows_belle.py {flags} --jsonl_path {tmp_path}/rows.jsonl --save_path {tmp_path}/tokens"
    )
    assert "--template checkpoint uses" in run_script(tokenize).check().out
    run_script(f"{tokenize} --template checkpoint").check()
    run_script(
        f"multi_gpu_fintune_belle.py {flags} --dataset_path {tmp_path}/tokens --output_dir {tmp_path}/a --max_steps 1"
    ).check()
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "一"}))
    result = run_script(
        f"chatglm_milti_gpu_inference.py {flags} --adapter_path {tmp_path}/a --input_path {tmp_path}/prompts.jsonl "
        f"--output_path {tmp_path}/answers --max_new_tokens 2 --merge_and_save {tmp_path}/merged"
    ).check()
    assert "template checkpoint (the adapter's)" in result.words
    merged = load_tokenizer(str(tmp_path / "merged"))
    assert merged.chat_template == OTHER
