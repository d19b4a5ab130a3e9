"""Tiny models of the generations with tools, overfitted on ten calls and ten rows with reasoning, answer so."""

import json

import pytest
import torch
from conftest import GOLDEN

from utils.checkpoint.model import load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.data.collators import PaddingCollator
from utils.data.encode import encode_rows, rows_to_train
from utils.data.row_parser import parse_row
from utils.inference.batch_generator import AnswerSettings, BatchGenerator, PromptCodec
from utils.inference.placement import prepare_for_decoding
from utils.inference.prompt_reader import PromptForm, encode_row
from utils.models.family import GLM_Z1, record_generation
from utils.models.templates import template_for

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
WORDS = ["sea", "sky", "sun", "river", "mill", "boat", "door", "book", "rain", "snow"]
STEPS, LEARNING_RATE = 100, 5e-3


def call(number):
    arguments = {"n": 1, "t": WORDS[number]}
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": arguments}}]}


CALLS = [
    {"messages": [{"role": "user", "content": WORDS[number]}, call(number)], "tools": TOOLS} for number in range(10)
]


def reasoned(number, has_form):
    reasoning, answer = f"see {WORDS[number]}", f"it is {WORDS[number]}"
    message = {"role": "assistant", "content": answer, "reasoning_content": reasoning}
    if not has_form:  # the generation learns it as text
        message = {"role": "assistant", "content": f"<think>{reasoning}</think>{answer}"}
    return {"messages": [{"role": "user", "content": f"add {WORDS[number]}"}, message]}


@pytest.mark.parametrize("name", ["chatglm3-6b-tiny", "glm-4-9b-chat-tiny", "glm4-9b-0414-tiny", "z1"])
def test_it_calls_the_tool_and_stops_by_itself(name):
    path = str(GOLDEN / (name if name != "z1" else "glm4-9b-0414-tiny"))
    tokenizer, model = load_tokenizer(path), load_model(path)
    if name == "z1":
        record_generation(tokenizer, GLM_Z1)
    template = template_for(tokenizer)
    raws = [*CALLS, *(reasoned(number, template.has_reasoning) for number in range(10))]
    rows = [each for raw in raws for each in rows_to_train(parse_row(raw), template, "last")]
    batch = PaddingCollator(tokenizer.pad_token_id)(
        [vars(encoded.example()) for encoded in encode_rows(tokenizer, rows, None, template)]
    )
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.1)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    for _ in range(STEPS):
        hidden_states = model.model(**inputs, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden_states.flatten(0, 1)[batch["target_positions"]])
        torch.nn.functional.cross_entropy(logits, batch["target_ids"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    prepare_for_decoding(model)
    prompts = []
    for index, raw in enumerate(raws):
        prompt = {**raw, "messages": raw["messages"][:-1]}
        prompts.append(encode_row(index, PromptForm().parse(prompt), tokenizer, template))
    settings = AnswerSettings(max_new_tokens=64)
    generator = BatchGenerator(model, PromptCodec(tokenizer, template), settings, torch.device("cpu"))
    answers = sorted(generator.run(prompts), key=lambda answer: answer["index"])
    assert [answer["finish_reason"] for answer in answers] == ["stop"] * 20
    for number, answer in enumerate(answers[:10]):
        (made,) = answer["tool_calls"]
        expected = CALLS[number]["messages"][1]["tool_calls"][0]["function"]
        assert made["type"] == "function" and made["function"]["name"] == "look"
        assert json.loads(made["function"]["arguments"]) == expected["arguments"] and answer["answer"] == ""
    for number, answer in enumerate(answers[10:]):
        message = raws[10 + number]["messages"][1]
        assert answer["answer"] == message["content"] and "tool_calls" not in answer
        assert answer.get("reasoning_content") == message.get("reasoning_content")
