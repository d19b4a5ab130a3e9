"""Columns with a meaning are used, or the row is rejected by name, in processing, tokenising and inference alike."""

import csv
import json

import datasets
import pytest
from conftest import GOLDEN, TINY

from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.errors import RowError, UsageError
from utils.data.encode import encode_rows, rows_to_train
from utils.data.row_parser import parse_prompt, parse_row
from utils.data.row_schema import ColumnMap
from utils.models.conversation import Conversation, Message
from utils.models.templates import encode_prompt, template_for

MODELS = [TINY, *(GOLDEN / name for name in ("chatglm2-6b-tiny", "chatglm3-6b-tiny", "glm-4-9b-chat-tiny"))]
USER, ANSWER = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}
SYSTEM = {"role": "system", "content": "说短些"}
PAIR = {"instruction": "那呢？", "output": "是的。"}


def contents(row):
    return [message.content for message in row.messages]


@pytest.mark.parametrize(
    "history",
    [
        [["问", "答"]],
        [USER, ANSWER],
        [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}],
        json.dumps([["问", "答"]]),
        "[['问', '答']]",  # of a table that pandas wrote
    ],
)
def test_history_is_earlier_turns(history):
    for raw in (
        PAIR | {"history": history},
        {"messages": [USER | {"content": "那呢？"}, ANSWER | {"content": "是的。"}], "history": history},
    ):
        row = parse_row(raw)
        assert contents(row) == ["问", "答", "那呢？", "是的。"] and parse_prompt(raw).messages == row.prompt


@pytest.mark.parametrize("name", ["system", "system_prompt", "meta_instruction"])
def test_system_is_the_first_message(name):
    for raw in (PAIR, {"messages": [USER, ANSWER]}, {"instruction": "Human: 问\nAssistant:", "output": "答"}):
        row = parse_row(raw | {name: "说短些", "history": [["一", "二"]]})
        assert row.messages[:2] == (Message("system", "说短些"), Message("user", "一")) and len(row.messages) == 5


@pytest.mark.parametrize("empty", [None, "", "  ", [], "[]", "null"])
def test_what_is_empty_says_nothing(empty):
    for name in ("history", "tools", "images", "rejected"):
        assert contents(parse_row(PAIR | {name: empty, "system": " "})) == ["那呢？", "是的。"]
    assert contents(parse_row({"messages": [SYSTEM | {"content": empty and " "}, USER, ANSWER]})) == ["问", "答"]
    trained = ANSWER | {"loss": True, "weight": 1, "train": "true", "tool_calls": empty}
    assert parse_row({"messages": [USER | {"loss": False, "weight": 0}, trained]}).messages[0].trained is None


@pytest.mark.parametrize(
    "more, words",
    [
        ({"tools": '[{"description": "get_weather"}]'}, 'tool 1 of "tools" has no "name"'),
        ({"functions": [{}]}, 'tool 1 of "functions"'),
        ({"tool_calls": [{"name": "get_weather"}]}, '"tool_calls" is not empty: calls and results are messages'),
        ({"images": ["a.png"]}, '"images"'),
        ({"history": "从前"}, '"history" is text'),
        ({"history": [["问"]]}, '"history" must be a list of'),
        ({"history": [["问", ""]]}, '"history" is blank'),
        ({"history": [USER]}, "alternate"),
        ({"history": {"问": "答"}}, '"history" must be a list'),
        ({"system": ["x"]}, '"system" is list'),
        ({"system": "a", "system_prompt": "b"}, "different system texts"),
        ({"system": "a", "history": [SYSTEM, USER, ANSWER]}, 'another in "system"'),
        ({"question": "什么？"}, "could each be the prompt"),
    ],
)
def test_what_cannot_be_used_is_named(more, words):
    for parse in (parse_row, parse_prompt):
        with pytest.raises(RowError, match=words.replace("[", r"\[")):
            parse(PAIR | more)


@pytest.mark.parametrize(
    "message, words",
    [
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "call 1 of message 2 .* has no name"),
        *(({"role": role, "content": "x"}, "follows no call") for role in ("tool", "function", "observation")),
        ({"role": "<|observation|>", "content": "x"}, "follows no call"),
        ({"from": "function_call", "value": "x"}, "message 2 of .* is no call: it must be JSON"),
        (ANSWER | {"metadata": "get_weather"}, '"metadata" in message 2'),
        (ANSWER | {"weight": 0.5}, '"weight" .* is 0.5'),
        (ANSWER | {"loss": "half"}, '"loss"'),
        (USER | {"reasoning_content": "嗯"}, '"reasoning_content" in message 2 .* only a message of the assistant'),
        ({"role": "robot", "content": "x"}, "'robot'"),
        (SYSTEM, "one system message, at the start"),
    ],
)
def test_turns_that_cannot_be_used_are_named(message, words):
    for raw in ({"messages": [USER, message, USER, ANSWER]}, PAIR | {"history": [USER, message]}):
        for parse in (parse_row, parse_prompt):
            with pytest.raises(RowError, match=words.replace("|", r"\|")):
                parse(raw)


@pytest.mark.parametrize(
    "more, words",
    [
        ({"rejected": "不"}, "preferences"),
        ({"label": False}, "not wanted"),
        ({"weight": 0.5}, "count more or less"),
        ({"answer": "不"}, "could each be the target"),
    ],
)
def test_what_speaks_of_the_target_is_nothing_to_a_prompt(more, words):
    with pytest.raises(RowError, match=words):
        parse_row(PAIR | more)
    assert contents(parse_prompt(PAIR | more)) == ["那呢？"]


@pytest.mark.parametrize(
    "prompt, answer",
    [
        ("prompt", "response"),
        ("query", "response"),
        ("question", "answer"),
        ("content", "summary"),
        ("input", "output"),
    ],
)
def test_columns_of_other_names(prompt, answer):
    assert contents(parse_row({prompt: "问", answer: "答", "id": 3})) == ["问", "答"]
    assert contents(parse_row({"prompt": "问", "query": "题", "response": "答"})) == ["问\n题", "答"]
    assert contents(parse_row({"instruction": "问", "context": "题", "response": "答"})) == ["问\n题", "答"]


def test_a_map_of_columns():
    columns = ColumnMap.parse("prompt=q, response=a,history=before")
    raw = {"q": "问", "a": "答", "input": "x", "output": "y", "before": [["一", "二"]]}
    assert contents(parse_row(raw, columns)) == ["一", "二", "问", "答"]
    assert contents(
        parse_row({"q": "问", "i": "题", "a": "答"}, ColumnMap.parse("instruction=q,input=i,output=a"))
    ) == [
        "问\n题",
        "答",
    ]
    assert contents(parse_row({"talk": [USER, ANSWER], "prompt": "x"}, ColumnMap.parse("messages=talk"))) == [
        "问",
        "答",
    ]
    for bad, words in (
        ("q", "ROLE=COLUMN"),
        ("promt=q", "no role promt; the roles are prompt"),
        ("prompt=a,prompt=b", "two"),
    ):
        with pytest.raises(UsageError, match=words):
            ColumnMap.parse(bad)


@pytest.fixture(scope="module", params=MODELS, ids=lambda path: path.name)
def tokenizer(request):
    return load_tokenizer(str(request.param))


def test_a_system_message_as_the_released_code_has_it(tokenizer):
    """ChatGLM3 and GLM-4 have a turn for it; in older generations its text precedes the first question."""
    template, messages = template_for(tokenizer), (Message("system", "说短些"), Message("user", "你好"))
    ids = encode_prompt(tokenizer, messages)
    if template.has_system_role:
        token = tokenizer.convert_tokens_to_ids
        newline, system, user = (tokenizer.encode(text, add_special_tokens=False) for text in ("\n", "说短些", "你好"))
        prefix = token(list(template.opening_tokens))
        turns = [token("<|system|>"), *newline, *system, token("<|user|>"), *newline, *user, token("<|assistant|>")]
        assert ids == [*prefix, *turns]
    else:
        assert ids == encode_prompt(tokenizer, (Message("user", "说短些\n你好"),))
    alpaca = template_for(tokenizer, "alpaca")
    assert alpaca.render(Conversation(messages)) == alpaca.render(Conversation((Message("user", "说短些\n你好"),)))


def test_a_turn_that_is_not_trained_on(tokenizer):
    template = template_for(tokenizer)
    chat = [SYSTEM, USER, ANSWER, USER, ANSWER | {"content": "二", "loss": False}, USER, ANSWER | {"content": "三"}]
    for answers, trained in ((chat, "答三"), ([*chat[:-1], ANSWER | {"content": "三", "weight": 0}], "答")):
        row = parse_row({"messages": answers})
        encoded = encode_rows(tokenizer, rows_to_train(row, template, "every"), None, template)
        ids = [label for encoded_row in encoded for label in encoded_row.example().labels if label >= 0]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert [sign for sign in text if sign in "说短些问答二三"] == list(trained)
        if trained == "答":
            with pytest.raises(RowError, match="last answer is not to be trained on"):
                rows_to_train(row, template, "last")
        else:
            last = rows_to_train(row, template, "last")
            assert [each.trained_messages("last") for each in last] == [[len(row.messages) - 1]]
    whole = Conversation(row.messages)
    assert encode_rows(tokenizer, [whole])[0].example() == encode_rows(tokenizer, [row])[0].example()


ROWS = [
    PAIR | {"history": [["你知道法国吗？", "知道。"]]},
    PAIR | {"history": [["你知道德国吗？", "知道。"]]},
    PAIR | {"system": "用英文回答"},
    PAIR | {"system": "用中文回答"},
    PAIR | {"system": "用中文回答"},
    PAIR,
    {"messages": [USER, ANSWER | {"loss": False}, USER, ANSWER]},
]
IMAGES = PAIR | {"images": ["a.png"]}


@pytest.mark.parametrize("dedup", ["exact", "near"])
def test_rows_of_another_history_are_no_repeats(run_script, tmp_path, dedup):
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, IMAGES]))
    result = run_script(f"process_belle_1M_data.py --input rows.json --output out.json --dedup {dedup}", cwd=tmp_path)
    summary = json.loads(result.check().out.splitlines()[-1])
    assert (summary["written"], summary["rejected"], summary["skipped"]) == (6, 1, 1)
    assert 'rows.json:8: "images" is not empty' in result.err
    written = [json.loads(line) for line in (tmp_path / "out.json").read_text().splitlines()]
    assert [parse_row(raw) for raw in written] == [parse_row(raw) for raw in (*ROWS[:4], *ROWS[5:])]


def test_raw_and_processed_rows_make_the_same_tokens(run_script, tmp_path):
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, IMAGES]))
    run_script("process_belle_1M_data.py --input rows.json --output out.json", cwd=tmp_path).check()
    tokens = []
    for name in ("rows", "out"):
        command = f"tokenize_dataset_rows_belle.py --jsonl_path {name}.json --save_path {name}"
        run_script(f"{command} --loss_on every --num_proc 1 --model_name_or_path {MODELS[2]}", cwd=tmp_path).check()
        tokens.append(datasets.load_from_disk(str(tmp_path / name))[:])
    assert tokens[0] == tokens[1] and len(tokens[0]["input_ids"]) == len(ROWS)


def test_mapped_columns_in_every_script(run_script, tmp_path):
    (tmp_path / "rows.json").write_text('{"q": "问", "a": "答"}\n')
    (tmp_path / "rows.csv").write_text("q,a\n问,答\n")
    tokenize = f"tokenize_dataset_rows_belle.py --save_path tokens --model_name_or_path {TINY} --jsonl_path"
    answer = f"chatglm_milti_gpu_inference.py --model_name_or_path {TINY} --output_path answers --max_new_tokens 1"
    evaluate = f"tools/evaluate.py --model_name_or_path {TINY} --max_new_tokens 1 --output_dir report --input_path"
    commands = [
        "process_belle_1M_data.py --output out --input rows.json",
        f"{tokenize} rows.json",
        f"{answer} --overwrite --input_path rows.json",
        f"{answer} --overwrite --input_path rows.csv",
        f"{evaluate} rows.json",
    ]
    for command in commands:
        run_script(f"{command} --columns prompt=q,response=a", cwd=tmp_path).check()
        for columns, words in (("prompt=x,response=a", "has no column x, but q, a"), ("frage=q", "no role frage")):
            result = run_script(f"{command} --columns {columns}", cwd=tmp_path)
            assert result.code == 2 and words in result.err and len(result.err.splitlines()) == 1, (
                command,
                result.err,
            )


def test_prompts_with_system_and_history(run_script, tmp_path):
    """In JSON and in a table, also if a flag names the prompt; a row that cannot be used is an error row."""
    cells = {"text": "那呢？", "system": "说短些", "history": '[["问", "答"]]', "images": "[]"}
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(cells))
        writer.writeheader()
        writer.writerows([cells, cells | {"images": "[{}]"}])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (cells, cells | {"images": [{}]})))
    answer = (
        f"chatglm_milti_gpu_inference.py --model_name_or_path {MODELS[2]} --max_new_tokens 1 --output_path answers"
    )
    for name in ("rows.csv", "rows.jsonl"):
        for flags in ("--prompt_column text", "--prompt_template {text}", "--columns prompt=text"):
            run_script(f"{answer} --overwrite --input_path {name} {flags}", cwd=tmp_path)
            good, bad = map(json.loads, (tmp_path / "answers").read_text().splitlines())
            assert good["prompt"] == "<|system|>\n说短些<|user|>\n问<|assistant|>\n答<|user|>\n那呢？<|assistant|>"
            assert '"images" is not empty' in bad["error"]
