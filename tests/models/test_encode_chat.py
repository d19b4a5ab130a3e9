"""`encode_chat`: chats as dicts -> the ids of the released templates, for every generation."""

import json

import pytest
from conftest import GOLDEN

from utils.checkpoint.tokenizer import load_tokenizer
from utils.data.encode import encode_example
from utils.models.conversation import Conversation, Message
from utils.models.templates import encode_chat, encode_prompt, template_for

FREE_ORDER = ("chatglm3-6b-tiny", "glm-4-9b-chat-tiny")  # generations that take any order of roles
MODELS = {name: GOLDEN / name for name in ("chatglm-6b-tiny", "chatglm2-6b-tiny", *FREE_ORDER)}
SYSTEM = {"role": "system", "content": "你是客服。"}
QUESTION = {"role": "user", "content": "今天天气怎么样？"}
ANSWER = {"role": "assistant", "content": "今天是晴天。"}


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(name):
    return load_tokenizer(str(MODELS[name]))


def released_chats(name: str) -> list[tuple[list[dict], bool, list[int]]]:
    """Messages, `add_generation_prompt` and ids of the golden chats that consist of roles and texts alone."""
    chats = []
    for case in json.loads((MODELS[name] / "golden.json").read_text(encoding="utf-8"))["chat"]:
        if "messages" in case:
            messages = case["messages"]
        elif "history" in case:
            history = case["history"]
            if history and isinstance(history[0], list):
                texts = [text for turn in history for text in turn]
                history = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
            messages = [*history, {"role": case.get("role", "user"), "content": case["query"]}]
        plain = all(message["role"] in ("system", "user", "assistant") and message["content"] for message in messages)
        if plain and not any(message.get("tools") or message.get("metadata") for message in messages):
            chats.append((messages, case.get("add_generation_prompt", True), case["ids"]))
    return chats


def test_released_chats_have_the_ids_of_the_release(name, tokenizer):
    chats = released_chats(name)
    assert len(chats) >= 2 and any(len(messages) > 1 for messages, _, _ in chats)
    for messages, add_generation_prompt, ids in chats:
        assert encode_chat(tokenizer, messages, add_generation_prompt) == ids


@pytest.mark.parametrize("chat", [[QUESTION], [SYSTEM, QUESTION], [SYSTEM, QUESTION, ANSWER, QUESTION]])
def test_generation_starts_from_the_prompt_of_the_scripts(tokenizer, chat):
    expected = encode_prompt(tokenizer, [Message(message["role"], message["content"]) for message in chat])
    assert encode_chat(tokenizer, chat) == expected


@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_an_answered_chat_is_the_training_example_without_its_end(tokenizer, system):
    chat = [*system, QUESTION, ANSWER, QUESTION, ANSWER]
    row = Conversation(tuple(Message(message["role"], message["content"]) for message in chat))
    example = encode_example(tokenizer, row).input_ids
    assert example[-1] == template_for(tokenizer).stop_ids(tokenizer)[0]
    ids = encode_chat(tokenizer, chat, add_generation_prompt=False)
    assert ids == example[:-1]
    prompt = encode_chat(tokenizer, chat[:-1])
    assert ids[: len(prompt)] == prompt and len(ids) > len(prompt)


def test_only_role_tokens_separate_a_question_from_its_prompt(name, tokenizer):
    prompt, chat = (encode_chat(tokenizer, [SYSTEM, QUESTION], added) for added in (True, False))
    if name in FREE_ORDER:
        assert prompt == [*chat, tokenizer.convert_tokens_to_ids("<|assistant|>")]
    else:
        assert prompt == chat


def test_orders_that_a_generation_has_no_form_for_are_refused(name, tokenizer):
    """ChatGLM-6B and ChatGLM2-6B number rounds of a question and an answer; the others have role tokens."""
    orders = (
        ([ANSWER, QUESTION], False, "message 1"),
        ([QUESTION, QUESTION], False, "message 2"),
        ([QUESTION, ANSWER, SYSTEM, QUESTION], False, "message 3"),
        ([SYSTEM], False, "message 1"),
        ([QUESTION, ANSWER], True, "message 2"),
    )
    for chat, add_generation_prompt, place in orders:
        if name in FREE_ORDER:
            assert encode_chat(tokenizer, chat, add_generation_prompt)
        else:
            with pytest.raises(ValueError, match=place):
                encode_chat(tokenizer, chat, add_generation_prompt)


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"role": "critic", "content": "?"}, "role"),
        ({"role": ["user"], "content": "?"}, "role"),
        ({"role": "user"}, "content"),
        ({"content": "?"}, "role"),
        ({"role": "user", "content": None}, "content"),
        ({"role": "user", "content": [{"type": "text", "text": "?"}]}, "content"),
        ({"role": "user", "content": "?", "tools": [{}]}, "tools"),
        ("?", "dict"),
    ],
)
def test_a_bad_message_is_named_by_its_number(tokenizer, message, fault):
    for added in (True, False):
        with pytest.raises(ValueError, match=f"message 3: .*{fault}"):
            encode_chat(tokenizer, [QUESTION, ANSWER, message], added)
    with pytest.raises(ValueError, match="empty"):
        encode_chat(tokenizer, [])
