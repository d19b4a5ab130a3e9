"""The released chat templates from GLM-4-9B on: `render_chat` text for text, and what its pieces say."""

import json

import pytest
from conftest import GOLDEN

from utils.models.chat_renderers import RENDERERS, render_pieces
from utils.models.templates import render_chat

FILES = sorted((GOLDEN / "templates").glob("*.json"))
CASES = {path.stem: json.loads(path.read_text(encoding="utf-8"))["conversations"] for path in FILES}
TAGGED = [name for name in RENDERERS if name[:6] >= "glm-4.5" or name.startswith("glm-5")]
USER = {"role": "user", "content": "q"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, None]}}}]}


def test_every_generation_has_its_conversations():
    assert CASES.keys() == RENDERERS.keys() and sum(map(len, CASES.values())) == 663


@pytest.mark.parametrize("name", RENDERERS)
def test_the_text_is_that_of_the_released_template(name):
    for case in CASES[name]:
        arguments = (name, case["messages"], case["tools"], case["add_generation_prompt"])
        if case["text"] is None:
            with pytest.raises(ValueError):
                render_chat(*arguments, **case["options"])
        else:
            assert render_chat(*arguments, **case["options"]) == case["text"]


@pytest.mark.parametrize("name", RENDERERS)
def test_pieces_tell_what_the_model_writes(name):
    """Template, answer, template: an answer is one run, its prompt is how the prompt of inference ends."""
    for case in CASES[name]:
        if case["text"] is None:
            continue
        messages, options = case["messages"], case["options"]
        pieces = render_pieces(name, messages, case["tools"], False, options)
        for number in {piece.message for piece in pieces} - {None}:
            assert messages[number]["role"] == "assistant"
            places = [place for place, piece in enumerate(pieces) if piece.message == number]
            assert places == list(range(places[0], places[-1] + 1))
            before = "".join(piece.text for piece in pieces[: places[0]])
            ends = [
                "".join(piece.text for piece in render_pieces(name, [USER], None, True, {"enable_thinking": thinking}))
                for thinking in (True, False)
            ]
            ends = [end[end.index("<|assistant|>") :] for end in ends]
            if name == "glm-z1-0414":  # no answer of an earlier turn has the prompt's <think>
                ends = ["<|assistant|>"]
            assert before.endswith(tuple(ends))


@pytest.mark.parametrize("name", RENDERERS)
def test_tokens_that_a_message_spells_are_text(name):
    spelled = "<|user|>[gMASK]<think>x</tool_call>"
    messages = [{"role": "system", "content": spelled}, {"role": "user", "content": spelled}]
    plain = render_pieces(name, [message | {"content": "x"} for message in messages])
    assert [piece for piece in render_pieces(name, messages) if piece.is_token] == [
        piece for piece in plain if piece.is_token
    ]


def answer(content, **keys):
    return {"role": "assistant", "content": content, **keys}


@pytest.mark.parametrize(
    ("name", "messages", "text"),
    [
        ("glm-4-0414", [{"role": "user"}], "<|user|>\n<|assistant|>"),  # Jinja prints nothing for a missing key
        ("glm-4-0414", [{"role": "user", "content": True}], "<|user|>\nTrue<|assistant|>"),
        ("glm-4.5", [{"role": "user", "content": {"a": 1}}], "<|user|>\n{'a': 1}<|assistant|>"),
        ("glm-4.7", [{"role": "critic", "content": "x"}], "<sop><|assistant|><think>"),
        ("glm-4.7", [USER, answer("a", thinking="t")], "<think>t</think>a<|assistant|><think>"),
        ("glm-5.1", [USER, CALL], "<arg_key>a</arg_key><arg_value>[1, null]</arg_value></tool_call><|assistant|>"),
        ("glm-5", [{"role": "tool", "content": [{"output": 1}, "x"]}], "<tool_response>1</tool_response><tool_re"),
        ("glm-5.1", [USER, answer("a"), answer("b", reasoning="r"), USER], "<think></think>a<|assistant|><think>r"),
        ("glm-5.1", [USER, answer("a"), USER], "<|assistant|></think>a<|user|>"),
    ],
)  # fmt: skip
def test_kinds_that_the_conversations_above_lack(name, messages, text):
    assert text in render_chat(name, messages, clear_thinking=False)


@pytest.mark.parametrize(
    ("name", "messages", "fault"),
    [
        ("glm-6", [USER], "no chat template"),
        ("glm-4.7", [], "empty"),
        ("glm-4.7", ["q"], "message 1"),
        ("glm-4.7", [USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}], "message 2"),
        ("glm-4.5", [USER, {"role": "assistant", "tool_calls": [{"arguments": {}}]}], "message 2"),
        ("glm-z1-0414", [{"role": "observation", "content": ["x"]}], "message 1"),
    ],
)
def test_errors_name_the_message(name, messages, fault):
    with pytest.raises(ValueError, match=fault):
        render_chat(name, messages)


@pytest.mark.parametrize("name", ["zai-org/GLM-4-32B-0414", "GLM-4-0414", "glm4-0414"])
def test_releases_and_rows_of_the_table_are_known_by_name(name):
    assert render_chat(name, [USER]) == "[gMASK]<sop><|user|>\nq<|assistant|>"
