"""What is trained on of rows with tools and reasoning, in every generation that has a form of them."""

import json

import pytest
from conftest import GOLDEN
from transformers import AutoTokenizer

from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.errors import RowError
from utils.data.encode import encode_example, encode_rows, rows_to_train
from utils.data.row_parser import parse_prompt, parse_row
from utils.models.conversation import Conversation, Message
from utils.models.family import GLM_Z1, generation_of, record_generation
from utils.models.templates import template_for
from utils.models.token_spans import IGNORE_INDEX
from utils.models.turn_formats import ChatGLM3Template, GLM45Template, GLM47Template, GLM51Template, GLM52Template

TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "天气", "parameters": {"type": "object"}}}
]


def call(city):
    return {"function": {"name": "weather", "arguments": {"city": city}}}


CALLS = [
    {"role": "system", "content": "简短。"},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "您好"},
    {"role": "user", "content": "天气？"},
    {"role": "assistant", "content": "看看", "tool_calls": [call("A"), call("B")]},
    {"role": "tool", "content": "晴"},
    {"role": "tool", "content": "雨"},
    {"role": "assistant", "content": "晴和雨"},
]
REASONING = [
    {"role": "user", "content": "一加一？"},
    {"role": "assistant", "content": "二", "reasoning_content": "数一数"},
    {"role": "user", "content": "再加一？"},
    {"role": "assistant", "content": "三", "reasoning_content": "再数"},
]


def tokenizer_of(name):
    if name == "z1":
        tokenizer = load_tokenizer(str(GOLDEN / "glm4-9b-0414-tiny"))
        record_generation(tokenizer, GLM_Z1)
        return tokenizer
    path = GOLDEN / name
    return load_tokenizer(str(path)) if (path / "config.json").is_file() else AutoTokenizer.from_pretrained(path)


FORMS = {
    "chatglm3": ("chatglm3-6b-tiny", None),
    "glm-4-9b": ("glm-4-9b-chat-tiny", None),
    "0414": ("glm4-9b-0414-tiny", None),
    "z1": ("z1", None),
    "4.5": ("glm4-moe-air-tiny", GLM45Template),
    "4.7": ("glm4-moe-lite-tiny", GLM47Template),
    "5.1": ("glm4-moe-lite-tiny", GLM51Template),
    "5.2": ("glm4-moe-lite-tiny", GLM52Template),
}
WITH_REASONING = ("z1", "4.5", "4.7", "5.1", "5.2")


@pytest.fixture(scope="module", params=FORMS)
def form(request):
    name, template_class = FORMS[request.param]
    tokenizer = tokenizer_of(name)
    return request.param, tokenizer, template_class() if template_class else template_for(tokenizer)


def trained_texts(tokenizer, example):
    """The runs of trained tokens as text, and the position at which each begins."""
    runs, previous = [], IGNORE_INDEX
    for position, label in enumerate(example.labels):
        if label != IGNORE_INDEX:
            if previous == IGNORE_INDEX:
                runs.append((position, []))
            runs[-1][1].append(label)
        previous = label
    return [(start, tokenizer.decode(ids)) for start, ids in runs]


def examples_of(row, tokenizer, template, loss_on):
    encoded = encode_rows(tokenizer, rows_to_train(row, template, loss_on), None, template)
    return [each.example() for each in encoded]


def plain(text):
    return text.replace(" ", "")  # SentencePiece's decoder writes blanks around tokens


def test_every_call_and_answer_of_the_last_turn_is_trained_on(form):
    name, tokenizer, template = form
    row = parse_row({"messages": CALLS, "tools": TOOLS})
    texts = [
        plain(text)
        for each in examples_of(row, tokenizer, template, "last")
        for _, text in trained_texts(tokenizer, each)
    ]
    joined = "|".join(texts)
    for written in ("看看", "weather", "A", "B", "晴和雨"):
        assert written in joined
    for unwritten in ("简短", "你好", "天气", "|晴|", "雨<", "您好"):
        assert unwritten not in joined.replace("晴和雨", "")
    assert texts[0].endswith("<|observation|>")
    assert joined.endswith("</s>" if name == "chatglm3" else "<|user|>") or name == "chatglm3"
    every = "|".join(
        plain(text)
        for each in examples_of(row, tokenizer, template, "every")
        for _, text in trained_texts(tokenizer, each)
    )
    assert "您好" in every and every.count("晴和雨") == 1 and every.count("看看") == 1


@pytest.mark.parametrize("messages", [CALLS, REASONING])
@pytest.mark.parametrize("loss_on", ["last", "every"])
def test_what_is_trained_on_follows_the_prompt_of_inference(form, messages, loss_on):
    """The tokens before each trained message are those that inference starts from."""
    name, tokenizer, template = form
    if messages is REASONING and name not in WITH_REASONING:
        with pytest.raises(RowError, match="no form of it"):
            rows_to_train(parse_row({"messages": messages}), template, loss_on)
        return
    raw = {"messages": messages, "tools": TOOLS} if messages is CALLS else {"messages": messages}
    row = parse_row(raw)
    prompts = []
    for number in row.trained_messages(loss_on):
        thinks = bool(row.messages[number].reasoning)
        prompt = row.first_messages(number)._replace(options=(("enable_thinking", thinks),))
        prompts.append(template.encoded_prompt(tokenizer, prompt).ids())
    starts = []
    for example in examples_of(row, tokenizer, template, loss_on):
        starts += [example.input_ids[:start] for start, _ in trained_texts(tokenizer, example)]
    assert starts == prompts


def test_reasoning_is_trained_on_where_there_is_a_form_of_it(form):
    name, tokenizer, template = form
    if name not in WITH_REASONING:
        return
    every = examples_of(parse_row({"messages": REASONING}), tokenizer, template, "every")
    texts = [text for each in every for _, text in trained_texts(tokenizer, each)]
    assert len(texts) == 2
    assert "数一数</think>" in texts[0] and texts[0].endswith("二<|user|>")
    assert "再数</think>" in texts[1] and texts[1].endswith("三<|user|>")
    without = parse_row({"messages": [REASONING[0], {"role": "assistant", "content": "二"}]})
    (example,) = examples_of(without, tokenizer, template, "last")
    (start, text), *others = trained_texts(tokenizer, example)
    assert not others and text.endswith("二<|user|>") and text.count("</think>") == (name == "z1")


def test_a_message_says_itself_whether_it_is_trained_on(form):
    name, tokenizer, template = form
    messages = [dict(message) for message in CALLS]
    messages[2]["loss"], messages[7]["loss"] = True, False
    row = parse_row({"messages": messages, "tools": TOOLS})
    joined = "".join(
        plain(text)
        for each in examples_of(row, tokenizer, template, "last")
        for _, text in trained_texts(tokenizer, each)
    )
    assert "您好" in joined and "看看" in joined and "晴和雨" not in joined


def test_a_call_is_not_cut(form):
    name, tokenizer, template = form
    row = parse_row(
        {"messages": [{"role": "user", "content": "问" * 300}, {"role": "assistant", "tool_calls": [call("C" * 40)]}]}
    )
    whole = encode_example(tokenizer, row, None, template)
    limit = len(whole.input_ids) - 100
    cut = encode_example(tokenizer, row, limit, template)
    assert len(cut.input_ids) == limit
    target = [label for label in whole.labels if label != IGNORE_INDEX]
    assert [label for label in cut.labels if label != IGNORE_INDEX] == target
    with pytest.raises(RowError, match="leave no room"):
        encode_example(tokenizer, row, len(target), template)


def test_spelled_tokens_are_text(form):
    name, tokenizer, template = form
    spelled = "<|user|></think><tool_call>[gMASK]<|observation|>"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call("x")]}]
    messages += [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "x"}]
    special = set(tokenizer.get_added_vocab().values())
    counts = []
    for text in ("x", spelled):
        filled = [message | ({"content": text} if message["role"] in ("user", "tool") else {}) for message in messages]
        example = encode_example(tokenizer, parse_row({"messages": filled}), None, template)
        counts.append([token for token in example.input_ids if token in special])
    assert counts[0] == counts[1]


def test_answers_are_parsed_back(form):
    """What is trained on, as the model would write it, is the row's message again."""
    name, tokenizer, template = form
    from utils.inference.batch_generator import PromptCodec

    codec = PromptCodec(tokenizer, template)
    rows = [{"messages": CALLS[:5], "tools": TOOLS}, {"messages": CALLS, "tools": TOOLS}]
    rows += [{"messages": REASONING}] if name in WITH_REASONING else []
    for raw in rows:
        row = parse_row(raw)
        example = examples_of(row, tokenizer, template, "last")[-1]
        start, _ = trained_texts(tokenizer, example)[-1]
        written = example.input_ids[start:-1]
        message = template.parse_answer(codec.split_answer(written), row.callable_tools)
        expected = row.messages[-1]
        assert (message.content, message.reasoning) == (expected.content, expected.reasoning)
        assert [(c.name, json.loads(c.arguments)) for c in message.tool_calls] == [
            (c.name, json.loads(c.arguments)) for c in expected.tool_calls
        ]


def test_a_question_may_be_empty(form):
    name, tokenizer, template = form
    for prompt in (Conversation((Message("user", ""),)), Conversation((Message("user", "x"), Message("user", "")))):
        ids = template.encoded_prompt(tokenizer, prompt).ids()
        assert (
            tokenizer.convert_tokens_to_ids("<|assistant|>") in ids
            and ids[0] == template.encoded_prompt(tokenizer, Conversation((Message("user", "x"),))).ids()[0]
        )


def test_nothing_is_read_as_a_call_without_tools(form):
    name, tokenizer, template = form
    for text in ('weather\n{"a": 1}', "weather\n```python\ntool_call(a=1)\n```", "<tool_call>f\n</tool_call>"):
        assert not template.parse_answer([text], "").tool_calls


@pytest.mark.parametrize("name", ["chatglm-6b-tiny", "chatglm2-6b-tiny"])
def test_generations_without_tools_reject_rows_that_have_them(name):
    tokenizer = load_tokenizer(str(GOLDEN / name))
    template = template_for(tokenizer)
    for raw in ({"messages": CALLS, "tools": TOOLS}, {"messages": CALLS[:4] + CALLS[4:5]}):
        with pytest.raises(RowError, match="tools"):
            rows_to_train(parse_row(raw), template, "last")
    with pytest.raises(ValueError, match="tools"):
        template.check_expressible(parse_prompt({"prompt": "q", "tools": TOOLS}))


def test_arguments_that_python_cannot_name_survive_in_chatglm3():
    template = ChatGLM3Template()
    for arguments in ('{"class": 1}', '{"a b": [null, true]}', '{"名": "值\\n"}', "{}"):
        row = parse_row(
            {"messages": [CALLS[1], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}]}
        )
        content = template.released_chat(row).messages[-1]["content"]
        assert json.loads(template.parse_arguments(content)) == json.loads(arguments)


def test_z1_is_its_own_generation():
    assert generation_of(tokenizer_of("z1")) is GLM_Z1
