"""The native and the alpaca template, and how inference takes the one that the rows were tokenised with."""

import json

import pytest
from conftest import GOLDEN, TINY

from utils.checkpoint.tokenizer import load_tokenizer
from utils.data.encode import encode_example, fingerprint
from utils.lora.adapter import read_origin
from utils.models.conversation import Conversation, Message
from utils.models.templates import encode_prompt, template_for

ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Input:\n"
)
MODELS = [TINY, *(GOLDEN / name for name in ("chatglm2-6b-tiny", "chatglm3-6b-tiny", "glm-4-9b-chat-tiny"))]
QUESTION = (Message("user", "你好"),)


@pytest.fixture(scope="module", params=MODELS, ids=lambda path: path.name)
def tokenizer(request):
    return load_tokenizer(str(request.param))


def test_alpaca_is_between_the_generations_own_tokens(tokenizer):
    native, alpaca = template_for(tokenizer), template_for(tokenizer, "alpaca")
    text = ALPACA + "你好\n\n### Response:"
    assert alpaca.render(Conversation(QUESTION)) == text
    ids = encode_prompt(tokenizer, QUESTION, alpaca)
    assert ids == tokenizer.encode(text)  # each generation's tokenizer puts its opening or closing tokens round a text
    example = encode_example(tokenizer, Conversation((*QUESTION, Message("assistant", "好"))), None, alpaca)
    assert example.input_ids[: len(ids)] == ids and example.labels[: len(ids)] == [-100] * len(ids)
    assert example.labels[-1] == native.stop_ids(tokenizer)[0]
    assert alpaca.clean(tokenizer.decode(example.labels[len(ids) : -1])) == "好"


def test_alpaca_repeats_its_form_for_earlier_turns(tokenizer):
    messages = [Message("user", "一"), Message("assistant", "二"), Message("user", "三")]
    rendered = template_for(tokenizer, "alpaca").render(Conversation(tuple(messages)))
    assert rendered == ALPACA + "一\n\n### Response:二\n\n### Input:\n三\n\n### Response:"


def test_alpaca_survives_truncation(tokenizer):
    row = Conversation((Message("user", "公园" * 60), Message("assistant", "学校" * 60)))
    alpaca = template_for(tokenizer, "alpaca")
    whole, cut = encode_example(tokenizer, row, None, alpaca), encode_example(tokenizer, row, 120, alpaca)
    closing = alpaca.encoded_prompt(tokenizer, row._replace(messages=row.prompt)).closing.ids.tolist()
    prompt = cut.input_ids[: cut.labels.count(-100)]
    assert len(cut.input_ids) == 120 and cut.input_ids[-1] == whole.input_ids[-1]
    assert prompt[-len(closing) :] == closing and tokenizer.encode("Response", add_special_tokens=False)[-1] in closing


def test_fingerprints_tell_tokenizers_and_templates_apart():
    tokenizers = [load_tokenizer(str(path)) for path in MODELS]
    hashes = {fingerprint(t, template_for(t, name)) for t in tokenizers for name in ("native", "alpaca")}
    assert len(hashes) == 2 * len(MODELS)


def test_inference_takes_the_template_of_training(run_script, tmp_path):
    run_script(
        f"tokenize_dataset_rows_belle.py --jsonl_path data/sample.train.json --save_path {tmp_path}/tokens "
        f"--model_name_or_path {TINY} --template alpaca"
    ).check()
    train = f"multi_gpu_fintune_belle.py --dataset_path {tmp_path}/tokens --max_steps 1"
    refused = run_script(f"{train} --model_name_or_path {MODELS[1]} --output_dir {tmp_path}/none")
    assert refused.code == 2 and "tokenise the rows again" in refused.err and not (tmp_path / "none").exists()
    run_script(f"{train} --model_name_or_path {TINY} --output_dir {tmp_path}/adapter").check()
    assert read_origin(tmp_path / "adapter").template == "alpaca"

    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "你好"}))
    answer = (
        f"chatglm_milti_gpu_inference.py --model_name_or_path {TINY} --input_path {tmp_path}/rows.jsonl "
        f"--output_path {tmp_path}/answers --max_new_tokens 2 --adapter_path {tmp_path}/adapter"
    )
    for flags, line, start in (
        ("", "template alpaca (the adapter's)", ALPACA),
        ("--template native", "template native (flag)", "你好"),
    ):
        assert line in " ".join(run_script(f"{answer} {flags}").check().out.split())
        assert json.loads((tmp_path / "answers").read_text())["prompt"].startswith(start)
