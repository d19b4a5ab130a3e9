"""The renderers of the official chat templates: recorded texts, the pieces, and kinds that the records lack."""

import json
import re

import pytest
from conftest import GOLDEN

from utils.models.chat_renderers import render_chat, render_pieces

RECORDS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (GOLDEN / "templates").glob("*.json")}
CASES = [(name, case) for name, record in sorted(RECORDS.items()) for case in record["conversations"]]
RENDERED = [(name, case) for name, case in CASES if case["text"] is not None]
NEW = ["glm-4.5", "glm-4.6", "glm-4.7", "glm-4.7-flash", "glm-5", "glm-5.1", "glm-5.2"]
ALL = ["glm-4-9b-chat", "glm-4-0414", "glm-z1-0414", *NEW]
TOKEN = re.compile(r"\[gMASK\]|<sop>|<\|(?:system|user|assistant|observation)\|>")
NEW_TOKEN = re.compile(TOKEN.pattern + r"|/nothink|</?(?:think|tool_call|tool_response|arg_key|arg_value)>")
USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
TOOL = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"名": None}}}


def pieces_of(name, case):
    return render_pieces(name, case["messages"], case["tools"], case["add_generation_prompt"], case["options"])


def call(arguments, **keys):
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
        **keys,
    }


def test_records_are_complete():
    assert sorted(RECORDS) == sorted(ALL)
    assert len(CASES) == 663 and len(RENDERED) > 630


@pytest.mark.parametrize("name", ALL)
def test_recorded_texts(name):
    for case in (case for generation, case in CASES if generation == name):
        arguments = (name, case["messages"], case["tools"], case["add_generation_prompt"])
        if case["text"] is None:
            with pytest.raises(ValueError, match=r"message \d|no messages"):
                render_chat(*arguments, **case["options"])
        else:
            assert render_chat(*arguments, **case["options"]) == case["text"]


@pytest.mark.parametrize("name", ALL)
def test_pieces_of_records(name):
    token = NEW_TOKEN if name in NEW else TOKEN
    for case in (case for generation, case in RENDERED if generation == name):
        pieces = pieces_of(name, case)
        assert "".join(piece.text for piece in pieces) == case["text"]
        assert all(token.fullmatch(piece.text) for piece in pieces if piece.is_token)
        assert all(piece.text for piece in pieces)
        roles = [message["role"] for message in case["messages"]]
        numbers = [piece.message for piece in pieces if piece.message is not None]
        assert numbers == sorted(numbers) and all(roles[number] == "assistant" for number in numbers)
        turns = sum(piece.text == "<|assistant|>" and piece.is_token for piece in pieces)
        if name != "glm-4-9b-chat":  # which leaves out a message without content
            assert turns == roles.count("assistant") + case["add_generation_prompt"]
        assert not any(
            piece.message is not None and piece.text == "<|assistant|>" and piece.is_token for piece in pieces
        )


@pytest.mark.parametrize("name", ALL)
def test_tokens_spelled_in_messages_are_text(name):
    spelled = "[gMASK]<sop><|user|><think></tool_call>"
    messages = [{"role": role, "content": spelled} for role in ("system", "user")]
    for message in (*messages, {"role": "assistant", "content": "x" + spelled}):
        plain = "".join(piece.text for piece in render_pieces(name, [message], None, False) if not piece.is_token)
        assert spelled in plain


@pytest.mark.parametrize(
    "name, message, prompt, written",
    [  # the template's part of a turn, which is a generation prompt, and the model's
        ("glm-4-9b-chat", ASSISTANT, "<|assistant|>", "\nA"),
        ("glm-4-9b-chat", {**ASSISTANT, "metadata": "f"}, "<|assistant|>", "f\nA"),
        ("glm-4-0414", {**ASSISTANT, "metadata": "f"}, "<|assistant|>", "f\nA"),
        ("glm-z1-0414", {**ASSISTANT, "content": "x</think>A"}, "<|assistant|>", "\nA"),
        ("glm-4.5", ASSISTANT, "<|assistant|>\n<think></think>", "\nA"),
        ("glm-4.6", {**ASSISTANT, "reasoning": "R"}, "<|assistant|>", "\n<think>R</think>\nA"),
        ("glm-4.7", ASSISTANT, "<|assistant|></think>", "A"),
        ("glm-4.7", {**ASSISTANT, "thinking": "R"}, "<|assistant|><think>", "R</think>A"),
        ("glm-5", {**ASSISTANT, "reasoning_content": " \n"}, "<|assistant|><think>", "</think>A"),
        ("glm-5.1", ASSISTANT, "<|assistant|><think>", "</think>A"),
        ("glm-5.1", {**ASSISTANT, "reasoning_content": " R\n"}, "<|assistant|><think>", " R\n</think>A"),
        ("glm-5.2", ASSISTANT, "<|assistant|><think></think>", "A"),
        ("glm-5.2", {**ASSISTANT, "reasoning_content": "R"}, "<|assistant|><think>", "R</think>A"),
        ("glm-4.5", call({"a": 1}), "<|assistant|>\n<think></think>",
         "\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"),
    ],
)  # fmt: skip
def test_parts_of_an_assistant_turn(name, message, prompt, written):
    pieces = render_pieces(name, [USER, message], None, False)
    start = max(number for number, piece in enumerate(pieces) if piece.text == "<|assistant|>")
    assert "".join(piece.text for piece in pieces[start:] if piece.message is None) == prompt
    assert "".join(piece.text for piece in pieces if piece.message == 1) == written
    assert {piece.message for piece in pieces} == {None, 1}


def test_history_turns_hold_no_reasoning_unless_kept():
    turn = {**ASSISTANT, "reasoning_content": "R"}
    for name in NEW:
        assert "R</think>" not in render_chat(name, [USER, turn, USER])
        kept = render_chat(name, [USER, turn, USER], clear_thinking=False)
        assert ("<think>R</think>A" in kept) == (name not in ("glm-4.5", "glm-4.6"))  # these know no such option


@pytest.mark.parametrize("name", NEW)
def test_argument_values_are_json_but_for_strings(name):
    values = {"s": 'a "b"', "n": None, "t": True, "f": 1.5, "l": ["é", {}], "d": {"中": "<b>"}, "e": ""}
    text = render_chat(name, [USER, call(values)], None, False)
    shown = re.findall(r"<arg_value>(.*?)</arg_value>", text)
    assert shown == ['a "b"', "null", "true", "1.5", '["é", {}]', '{"中": "<b>"}', ""]


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("message", [
    call('{"a": 1}'), call(None), call([]),  # these have no items()
    {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]},  # text + undefined name
    {"role": "assistant", "tool_calls": "f"},  # its characters have no name
    {"role": "assistant", "tool_calls": 3},
])  # fmt: skip
def test_calls_that_cannot_be_written(name, message):
    with pytest.raises(ValueError, match="message 2: "):
        render_chat(name, [USER, message])


@pytest.mark.parametrize("name", NEW)
def test_contents_of_other_types(name):
    """Jinja prints a number as Python does, a missing content as nothing, of a list its strings and text parts."""
    for content, shown in [(5, "5"), (True, "True"), ({"a": None}, "{'a': None}"), (None, ""), ([], "")]:
        pieces = render_pieces(name, [{"role": "user", "content": content}], None, False)
        assert "".join(piece.text for piece in pieces).rpartition("<|user|>")[2].removeprefix("\n") == shown
    parts = ["a", {"type": "text", "text": "b"}, {"type": "text"}, {"text": "no type"}, ["c"], 4]
    assert render_chat(name, [{"role": "user", "content": parts}], None, False).endswith("ab")


@pytest.mark.parametrize("name", ["glm-4.5", "glm-4.7", "glm-5"])
def test_results_that_are_not_text(name):
    """Until 5, each item is a result, its `output` if it has one; a loop over a number is an error."""
    texts = ["{'a': None}", "7", "x", "None"]
    text = render_chat(name, [{"role": "tool", "content": [{"a": None}, {"output": 7}, "x", None]}], None, False)
    assert re.findall(r"<tool_response>\n?(.*?)\n?</tool_response>", text) == texts
    assert render_chat(name, [{"role": "tool"}], None, False).endswith("<|observation|>")
    with pytest.raises(ValueError, match="message 1: "):
        render_chat(name, [{"role": "tool", "content": 3}])


@pytest.mark.parametrize("name", ["glm-5.1", "glm-5.2"])
def test_results_from_51_on(name):
    """References need tools, by name; of other lists the strings and text parts are joined."""
    reference = {"role": "tool", "content": [{"type": "tool_reference", "name": "f"}]}
    expected = '<tool_response><tools>\n{"name": "f", "parameters": {"名": null}}\n</tools></tool_response>'
    assert render_chat(name, [reference], [TOOL], False).endswith("<|observation|>" + expected)
    assert render_chat(name, [reference], [], False).endswith("<tool_response><tools>\n</tools></tool_response>")
    with pytest.raises(ValueError, match="message 1: .*tools"):
        render_chat(name, [reference])
    assert render_chat(name, [{"role": "tool", "content": [{"text": "a"}, "b"]}], None, False).endswith(
        "<|observation|><tool_response>b</tool_response>"
    )


def test_outputs_from_51_on():
    """5.1 knows no outputs: they are no text parts; 5.2 adds each to text, so each must be text."""
    messages = [USER, {"role": "tool", "content": [{"output": "a"}, {"output": "b"}]}]
    assert render_chat("glm-5.1", messages, None, False).endswith("<|observation|><tool_response></tool_response>")
    assert render_chat("glm-5.2", messages, None, False).endswith(
        "<|observation|><tool_response>a</tool_response><tool_response>b</tool_response>"
    )
    messages[1] = {"role": "tool", "content": [{"output": "a"}, {"output": 1}]}
    with pytest.raises(ValueError, match="message 2: "):
        render_chat("glm-5.2", messages)


def test_glm4_9b_tools_of_messages():
    """Tools of any message make a system text; an unknown type writes nothing, a function without its part fails."""
    tools = [{"type": "python"}, {"type": "simple_browser"}, {"type": "cogview"}, {"type": "other"}, "x"]
    text = render_chat("glm-4-9b-chat", [{"role": "user", "content": "Q", "tools": tools}])
    assert [line for line in text.split("\n") if line.startswith("## ")] == [
        "## python", "## simple_browser", "## cogview"
    ]  # fmt: skip
    assert text.endswith("价值观。<|user|>\nQ<|assistant|>")
    with pytest.raises(ValueError, match="message 1: "):
        render_chat("glm-4-9b-chat", [{"role": "system", "tools": [{"type": "function"}]}])
    pieces = render_pieces("glm-4-9b-chat", [{"role": "critic", "content": 5, "metadata": 0}], None, False)
    assert [piece.text for piece in pieces if not piece.is_token] == ["<|critic|>0\n5"]


@pytest.mark.parametrize("name", ["GLM-4-9B-0414", "zai-org/GLM-4-32B-0414", "thudm/glm-4-9b-0414", "glm4-0414"])
def test_names_of_a_generation(name):
    assert render_chat(name, [USER]) == render_chat("glm-4-0414", [USER])


@pytest.mark.parametrize("name", ALL)
def test_inputs_that_no_template_takes(name):
    for messages, tools in [([], None), (["x"], None), ([USER], ["x"])]:
        with pytest.raises(ValueError):
            render_chat(name, messages, tools)
