"""Chats with tools, reasoning, loss and options: what each form becomes, alone, through processing and as a prompt."""

import json

import pytest
from chat_faults import FAULTS
from chat_rows import ARGUMENTS, ASK, QUESTION, ROWS, SAY, WEATHER, calls_message, openai_call
from conftest import ROOT
from documents import blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.common.errors import RowError
from utils.data.conversation_rows import dump_conversation, prompt_of
from utils.data.row_parser import parse_prompt, parse_row
from utils.data.row_schema import ColumnMap
from utils.inference.prompt_reader import PromptForm
from utils.models.conversation import Conversation, Message, ToolCall

quick = settings(derandomize=True, deadline=None, max_examples=200)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_its_conversation(name):
    raw, expected = ROWS[name]
    assert parse_row(raw) == expected
    assert parse_row(json.loads(dump_conversation(expected))) == expected
    prompt = expected._replace(messages=expected.messages[:-1])
    assert parse_prompt(raw) == prompt == PromptForm().parse(raw).conversation


@pytest.mark.parametrize("name", ROWS)
def test_a_prompt_without_its_answer_is_the_same_prompt(name):
    """The row of a conversation whose last message is the question or a tool's result."""
    prompt = parse_prompt(ROWS[name][0])
    raw = json.loads(dump_conversation(prompt))
    assert parse_prompt(raw) == prompt
    with pytest.raises(RowError, match="must end with the assistant's answer or calls"):
        parse_row(raw)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name):
    raw, words = FAULTS[name]
    with pytest.raises(RowError) as error:
        parse_row(raw)
    assert words in str(error.value)


def test_rows_through_processing(run_script, tmp_path):
    """All forms in one file; then the output again, which stays as it is."""
    raws = [raw for raw, _ in ROWS.values()] + [raw for raw, _ in FAULTS.values()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(raw) + "\n" for raw in raws), encoding="utf-8")
    for source, output in (("rows.jsonl", "once.jsonl"), ("once.jsonl", "twice.jsonl")):
        run_script(f"process_belle_1M_data.py --input {source} --output {output}", cwd=tmp_path).check()
    rows = [json.loads(line) for line in (tmp_path / "once.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [parse_row(row) for row in rows] == [expected for _, expected in ROWS.values()]
    assert (tmp_path / "once.jsonl").read_bytes() == (tmp_path / "twice.jsonl").read_bytes()
    rejected = (tmp_path / "once.jsonl.rejected.jsonl").read_text(encoding="utf-8").splitlines()
    reasons = [json.loads(line)["reason"] for line in rejected]
    assert all(words in reason for reason, (_, words) in zip(reasons, FAULTS.values(), strict=True))


CALLS = calls_message(openai_call("get_weather", ARGUMENTS))
RESULT = {"role": "tool", "content": "3 度，晴，微风，空气很好"}
BEFORE = [ASK, CALLS, RESULT]
LIKE_IT = QUESTION + "？！"  # a near-duplicate of QUESTION


@pytest.mark.parametrize(
    "other",
    [
        {"messages": [ASK, SAY]},
        {"messages": [*BEFORE, SAY], "tools": [WEATHER]},
        {"messages": [*BEFORE, SAY], "enable_thinking": False},
        {"messages": [ASK, CALLS | {"reasoning_content": "查。"}, RESULT, SAY]},
        {"messages": [ASK, calls_message(openai_call("get_weather", '{"city": "上海"}')), RESULT, SAY]},
        {"messages": [ASK, CALLS, RESULT | {"content": RESULT["content"] + "。"}, SAY]},
        {"messages": [ASK | {"content": LIKE_IT}, CALLS, RESULT, SAY]},
    ],
)
def test_what_differs_before_the_answer_is_another_prompt(run_script, tmp_path, other):
    row = {"messages": [*BEFORE, SAY]}
    same = {"messages": [*BEFORE, SAY | {"content": "另一个回答", "loss": True}]}
    assert prompt_of(parse_row(row)) == prompt_of(parse_row(same)) != prompt_of(parse_row(other))
    (tmp_path / "rows").write_text("".join(json.dumps(raw) + "\n" for raw in (row, other, same)))
    result = run_script("process_belle_1M_data.py --input rows --output out --dedup", cwd=tmp_path).check()
    summary = json.loads(result.out.splitlines()[-1])
    assert (summary["written"], summary["duplicate"]) == (2, 1)


def test_near_duplicates_of_the_last_question(run_script, tmp_path):
    """With tools, a question like an earlier one is a repeat only if the tools are the same."""
    rows = [
        {"messages": [ASK, SAY], "tools": tools} | {"messages": [ASK | {"content": text}, SAY]}
        for tools in ([WEATHER], [{"name": "now"}])
        for text in (QUESTION, LIKE_IT)
    ]
    (tmp_path / "rows").write_text("".join(json.dumps(raw) + "\n" for raw in rows))
    result = run_script("process_belle_1M_data.py --input rows --output out --dedup", cwd=tmp_path).check()
    summary = json.loads(result.out.splitlines()[-1])
    assert (summary["written"], summary["near_duplicate"]) == (2, 2)


def test_plain_prompts_are_split_as_they_were():
    """Their text for the hash of --split did not change with tools, so that rows keep their side."""
    chat = {"messages": [{"role": "system", "content": "短"}, ASK, SAY | {"loss": False}, ASK, SAY]}
    assert prompt_of(parse_row(chat)) == "\x1e".join(["短", QUESTION, SAY["content"], QUESTION])
    assert prompt_of(parse_row({"prompt": QUESTION, "response": "x"})) == QUESTION


def test_a_column_of_tools_by_another_name():
    columns = ColumnMap.parse("messages=talk,tools=apis")
    raw = {"talk": [ASK, SAY], "apis": json.dumps([WEATHER]), "tools": "not these"}
    assert parse_row(raw, columns) == parse_row({"messages": [ASK, SAY], "tools": [WEATHER]})


def test_tools_and_options_of_a_question_made_by_a_flag():
    raw = {
        "text": "北京",
        "tools": json.dumps([WEATHER]),
        "enable_thinking": "false",
        "history": json.dumps(BEFORE + [SAY]),
    }
    for form in (PromptForm(template="{text}天气？"), PromptForm(column="text")):
        prompt = form.parse(raw).conversation
        assert json.loads(prompt.tools) == [WEATHER] and prompt.options == (("enable_thinking", False),)
        assert [message.role for message in prompt.messages] == ["user", "assistant", "tool", "assistant", "user"]
    assert not PromptForm(template="{tools}").parse(raw).conversation.tools


def test_tools_as_a_table_has_them():
    for value in (json.dumps([WEATHER]), str([WEATHER]), [json.dumps(WEATHER)], json.dumps([json.dumps(WEATHER)])):
        assert json.loads(parse_prompt({"prompt": "问", "tools": value}).tools) == [WEATHER]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
FILLED = TEXT.filter(str.strip)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 1 << 70) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(TEXT, VALUES, max_size=3)
LAYOUTS = st.sampled_from(
    [{}, {"ensure_ascii": False}, {"indent": 1}, {"separators": (",", ":")}, {"sort_keys": True}]
)
CALL = st.builds(lambda name, value, layout: ToolCall(name, json.dumps(value, **layout)), FILLED, OBJECTS, LAYOUTS)
TRAINED = st.sampled_from([None, None, True, False])
REASONING = st.just("") | FILLED.filter(lambda text: text.strip() not in ("[]", "{}", "null", "None"))
TOOL = st.builds(lambda name, value: {"type": "function", "function": {**value, "name": name}}, FILLED, OBJECTS)
OPTIONS = st.dictionaries(st.sampled_from(["clear_thinking", "enable_thinking"]), st.booleans())


@st.composite
def conversations(draw):
    """Conversations as rows can hold them, with calls, results, reasoning, tools and options."""
    messages = [Message("system", draw(FILLED.filter(lambda t: t.strip() not in ("[]", "{}", "null", "None"))))]
    messages = messages if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(FILLED)))
        for _ in range(draw(st.integers(0, 2))):
            calls = tuple(draw(st.lists(CALL, min_size=1, max_size=3)))
            messages.append(Message("assistant", draw(TEXT), draw(REASONING), calls, draw(TRAINED)))
            messages += [Message("tool", draw(TEXT)) for _ in range(draw(st.integers(1, len(calls))))]
        messages.append(Message("assistant", draw(FILLED), draw(REASONING), trained=draw(TRAINED)))
    if draw(st.booleans()):
        messages[-1] = Message("assistant", draw(TEXT), draw(REASONING), (draw(CALL),))
    if not Conversation(tuple(messages)).trained_messages("every"):
        messages[-1] = messages[-1]._replace(trained=True)
    tools = draw(st.lists(TOOL, max_size=3))
    text = json.dumps(tools, ensure_ascii=False) if tools else ""
    return Conversation(tuple(messages), text, tuple(sorted(draw(OPTIONS).items())))


@quick
@given(conversations())
def test_a_written_conversation_is_parsed_to_the_same(conversation):
    line = dump_conversation(conversation)
    assert parse_row(json.loads(line)) == conversation and line.count("\n") == 1
    assert dump_conversation(parse_row(json.loads(line))) == line


@quick
@given(conversations(), st.sampled_from(["tool_calls", "turns"]), st.randoms(use_true_random=False))
def test_other_forms_of_a_conversation_are_parsed_to_the_same(conversation, form, random):
    """Calls as texts or fields, results in any order by their ids, ShareGPT's names of roles."""
    raw, results = [], 0
    for message in conversation.messages:
        calls = [openai_call(call.name, call.arguments, f"id {n}") for n, call in enumerate(message.tool_calls)]
        fields = {"loss": message.trained, "reasoning": message.reasoning}
        if message.role == "tool":
            raw.append({"role": "observation", "tool_call_id": f"id {results}", "content": message.content})
            results += 1
        elif calls and form == "turns" and not message.content and not message.reasoning:
            raw += [{"from": "tool_call", "value": json.dumps(call), **fields} for call in calls]
        else:
            raw.append({"from": message.role, "value": message.content, **fields})
            if calls:
                raw[-1]["tool_calls"] = json.dumps(calls)
        results = results if message.role == "tool" else 0
    start = 0
    while start < len(raw):  # each run of results in another order
        end = start
        while end < len(raw) and raw[end].get("role") == "observation":
            end += 1
        raw[start:end] = random.sample(raw[start:end], end - start)
        start = end + 1
    row = {"conversations": raw, "chat_template_kwargs": dict(conversation.options), "tools": conversation.tools}
    assert parse_row(json.loads(json.dumps(row))) == conversation


def places(value, path=()):
    """The paths of all values inside a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def with_value(value, path, new):
    """The value with another one at a path; without it where `new` is ..."""
    if not path:
        return new
    copy = value.copy()
    if new is ... and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = with_value(value[path[0]], path[1:], new)
    return copy


ODD_TEXTS = ["", " ", "[]", "null", "{", "[1]", '{"name": 1}', '"a"', "好的\n", "now\n{}", "[" * 3000]
ODD = st.just(...) | st.sampled_from([*ODD_TEXTS, 10**400, -1.5, float("nan"), float("inf")])


@settings(quick, max_examples=1500)
@given(st.data())
def test_any_change_of_a_row_is_a_conversation_or_a_fault(data):
    """No other error; and what is a conversation is the same one after writing."""
    raw, _ = data.draw(st.sampled_from(list(ROWS.values())))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(raw)[1:] or [()]))
        raw = with_value(raw, path, data.draw(ODD | VALUES)) if path else raw
    for parse in (parse_row, parse_prompt):
        try:
            conversation = parse(raw)
        except RowError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert parse(json.loads(dump_conversation(conversation))) == conversation
            prompt_of(conversation)


def test_the_rows_of_the_documents_are_parsed():
    rows = []
    for name in ("docs/data_formats.md", "docs/zh/data_formats.md"):
        block = next(block for block in blocks(ROOT / name, "json") if "tool_calls" in block.text)
        rows.append([parse_row(json.loads(line)) for line in block.text.splitlines()])
    assert rows[0] == rows[1] and len(rows[0]) == 7
    assert sum(bool(row.tools) for row in rows[0]) == 5
