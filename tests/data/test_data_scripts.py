"""process_belle_1M_data.py and tokenize_dataset_rows_belle.py, and the functions that they call."""

import json

import datasets
import pytest
from conftest import TINY

from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.errors import RowError, UsageError
from utils.common.files import atomic_writer
from utils.data.encode import encode_example
from utils.data.raw_reader import read_json_rows
from utils.data.row_parser import parse_prompt, parse_row
from utils.models.conversation import Conversation, Message
from utils.models.templates import encode_prompt, template_for
from utils.models.token_spans import IGNORE_INDEX

CHAT = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(TINY))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def last_json(result):
    return json.loads(result.out.strip().splitlines()[-1])


def row(prompt, target):
    return Conversation((Message("user", prompt), Message("assistant", target)))


@pytest.mark.parametrize(
    "raw, prompt, target",
    [
        ({"instruction": "改写：", "input": "你好", "output": "您好"}, "改写：\n你好", "您好"),
        ({"instruction": "\n问题", "input": "", "output": "答"}, "\n问题", "答"),
        ({"instruction": "问题", "output": "答"}, "问题", "答"),
        ({"input": "问题", "target": "答"}, "问题", "答"),
        ({"context": "Instruction: 问\nAnswer: ", "target": "答"}, "Instruction: 问\nAnswer: ", "答"),
        ({"prompt": "问题", "completion": "答"}, "问题", "答"),
        ({"messages": CHAT}, "你好", "你好！"),
    ],
)
def test_schemas(raw, prompt, target):
    parsed = parse_row(raw)
    assert [message.content for message in parsed.prompt] == [prompt]
    assert parsed.target == target
    assert parse_prompt(raw) == Conversation(parsed.prompt)


@pytest.mark.parametrize(
    "raw, reason",
    [
        ([], "object"),
        ({"q": "问"}, "known columns"),
        ({"question": "问"}, "no target"),
        ({"input": "问"}, "no target"),
        ({"input": "  ", "target": "答"}, "blank"),
        ({"input": "问", "target": ""}, "blank"),
        ({"input": 3, "target": "答"}, "int"),
        ({"messages": []}, "at least one"),
        ({"messages": CHAT[1:]}, "user first|user's message"),
        ({"messages": CHAT[:1]}, "assistant's answer"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
    ],
)
def test_bad_rows_say_why(raw, reason):
    with pytest.raises(RowError, match=reason):
        parse_row(raw)


def test_reading_lines_arrays_and_joined_values(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes('\ufeff{"a": 1}\r\n\n{"a": 2}{"a": 3}\nbroken\n'.encode())
    rows = list(read_json_rows(path))
    assert rows[:3] == [(1, {"a": 1}), (3, {"a": 2}), (3, {"a": 3})]
    assert rows[3][0] == 4 and isinstance(rows[3][1], RowError) and len(rows) == 4
    path.write_text('\n [{"a": 1},\n {"a": 2}]')
    assert list(read_json_rows(path)) == [(2, {"a": 1}), (3, {"a": 2})]
    with pytest.raises(UsageError, match="is not a file"):
        list(read_json_rows(tmp_path / "nowhere"))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_writer(path) as file:
        file.write("new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_chat_prompt_is_the_released_one(tokenizer):
    render = template_for(tokenizer).render
    messages = [Message(*pair) for pair in (("user", "你好"), ("assistant", "你好！"), ("user", "再见"))]
    assert render(Conversation((messages[0],))) == "你好"
    assert render(Conversation(tuple(messages))) == "[Round 0]\n问：你好\n答：你好！\n[Round 1]\n问：再见\n答："


def test_example_layout(tokenizer):
    example = encode_example(tokenizer, row("找出句子里的地点:\n老师昨天在图书馆看书", "图书馆"))
    prompt = tokenizer.encode("找出句子里的地点:\n老师昨天在图书馆看书")
    target = tokenizer.encode("图书馆", add_special_tokens=False) + [tokenizer.eos_token_id]
    assert prompt[-2:] == [tokenizer.gmask_token_id, tokenizer.bos_token_id]
    assert example.input_ids == prompt + target
    assert example.labels == [IGNORE_INDEX] * len(prompt) + target
    assert example.tokens_cut == 0


def test_special_tokens_spelled_out_are_text(tokenizer):
    example = encode_example(tokenizer, row("a<sop>b[MASK]", "c<eop>d<pad>"))
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert example.input_ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.pad_token_id not in example.input_ids
    assert tokenizer.mask_token_id not in encode_prompt(tokenizer, [Message("user", "[MASK]")])


@pytest.mark.parametrize("prompt_size, target_size", [(50, 50), (200, 5), (5, 200), (200, 200), (10, 7)])
@pytest.mark.parametrize("limit", [5, 6, 20, 21, 64])
def test_truncation_takes_text_only(tokenizer, prompt_size, target_size, limit):
    prompt, target = "公园" * prompt_size, "学校" * target_size
    whole = encode_example(tokenizer, row(prompt, target))
    example = encode_example(tokenizer, row(prompt, target), limit)
    assert len(example.input_ids) == min(limit, len(whole.input_ids))
    assert example.tokens_cut == len(whole.input_ids) - len(example.input_ids)
    assert example.input_ids[-1] == tokenizer.eos_token_id
    start = example.input_ids.index(tokenizer.gmask_token_id)
    assert example.input_ids[start + 1] == tokenizer.bos_token_id
    assert whole.input_ids[:start] == example.input_ids[:start]
    kept = example.input_ids[start + 2 : -1]
    whole_target = whole.input_ids[whole.input_ids.index(tokenizer.bos_token_id) + 1 :]
    assert kept == whole_target[: len(kept)]
    room = limit - 3
    assert len(kept) >= min(len(whole_target) - 1, room // 2)


def test_process_then_cat_is_one_valid_file(run_script, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "Belle.train.json").write_text('{"input": "一", "target": "二"}')  # no newline at the end
    rows = [
        {"instruction": "翻译：", "input": "苹果", "output": "apple"},
        {"input": "问", "target": "答"},
        {"instruction": "没有答案", "input": "", "output": ""},
    ]
    write_lines(data / "belle_open_source_1M.train.json", rows)
    for _ in range(2):  # running it again replaces
        result = run_script("process_belle_1M_data.py", cwd=tmp_path).check()
        assert last_json(result) == {"read": 3, "written": 2, "rejected": 1, "skipped": 0}
        assert "belle_open_source_1M.train.json:3" in result.err
        lines = (data / "Belle_1M.train.json").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [
            {"input": "翻译：\n苹果", "target": "apple"},
            {"input": "问", "target": "答"},
        ]
    joined = data / "Belle_0_1.train.json"
    joined.write_bytes((data / "Belle.train.json").read_bytes() + (data / "Belle_1M.train.json").read_bytes())
    assert len([parse_row(raw) for _, raw in read_json_rows(joined)]) == 3


def test_input_path_and_output_path_are_flags_of_both_scripts(run_script, tmp_path):
    write_lines(tmp_path / "raw.json", [{"instruction": "问", "output": "答"}])
    for flags, name in (("--input raw.json --output", "one"), ("--input_path raw.json --output_path", "two")):
        run_script(f"process_belle_1M_data.py {flags} {name}.json", cwd=tmp_path).check()
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    tokenize = f"tokenize_dataset_rows_belle.py --model_name_or_path {TINY} --num_proc 1"
    for flags in ("--jsonl_path one.json --save_path one", "--input_path one.json --output_path two"):
        run_script(f"{tokenize} {flags}", cwd=tmp_path).check()
    one, two = (datasets.load_from_disk(str(tmp_path / name)).to_dict() for name in ("one", "two"))
    assert one == two and len(one["input_ids"]) == 1


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--jsonl_path rows --save_path t --unknown 3", "--unknown is unknown"),
        ("--jsonl_path rows --save_path t --loss_on first", "--loss_on first is unknown: give"),
        ("--jsonl_path rows --save_path t --columns q", "write ROLE=COLUMN"),
        ("--jsonl_path rows --save_path t --max_seq_length 0", "--max_seq_length 0 must be at least 1"),
        ("--save_path t", "--jsonl_path is required"),
    ],
)
def test_wrong_flags_of_tokenising_end_with_code_2(run_script, tmp_path, flags, words):
    result = run_script(f"tokenize_dataset_rows_belle.py {flags}", cwd=tmp_path)
    assert result.code == 2 and words in result.err and "Traceback" not in result.err


def test_process_without_its_input(run_script, tmp_path):
    result = run_script("process_belle_1M_data.py", cwd=tmp_path)
    assert result.code == 2
    assert len(result.err.strip().splitlines()) == 1 and "wget" in result.err


def test_tokenize_counts_what_it_skips_and_cuts(run_script, tmp_path, tokenizer):
    rows = [
        {"input": "公园", "target": "学校"},
        {"input": "公园" * 300, "target": "学校"},
        {"input": "", "target": "x"},
    ]
    source = write_lines(tmp_path / "rows.jsonl", rows)
    command = (
        f"tokenize_dataset_rows_belle.py --jsonl_path {source} --save_path {tmp_path}/tokens "
        f"--max_seq_length 200 --model_name_or_path {TINY}"
    )
    summary = last_json(run_script(command + " --skip_overlength").check())
    assert (summary["read"], summary["written"], summary["skipped_overlength"]) == (3, 1, 1)
    assert (summary["cut"], summary["rejected"]) == (0, 1)
    summary = last_json(run_script(command).check())  # replaces the first
    assert (summary["written"], summary["skipped_overlength"], summary["cut"]) == (2, 0, 1)
    dataset = datasets.load_from_disk(str(tmp_path / "tokens"))
    assert dataset.column_names == ["input_ids", "labels"] and len(dataset) == 2
    assert [len(ids) for ids in dataset["input_ids"]][1] == 200
    assert all(ids[-1] == tokenizer.eos_token_id for ids in dataset["input_ids"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "tokens", "tokens.rejected.jsonl"]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--jsonl_path nowhere.jsonl", "nowhere.jsonl"),
        ("--jsonl_path data/alpaca_data.jsonl --model_name_or_path /nowhere", "--model_name_or_path"),
        ("--jsonl_path data/alpaca_data.jsonl --model_name_or_path tests", "config.json"),
    ],
)
def test_tokenize_refuses_in_one_line(run_script, tmp_path, flags, words):
    model = "" if "--model_name_or_path" in flags else f"--model_name_or_path {TINY}"
    result = run_script(f"tokenize_dataset_rows_belle.py --save_path {tmp_path}/t {flags} {model}")
    assert result.code == 2
    assert words in result.err.strip().splitlines()[-1] and "Traceback" not in result.err


@pytest.mark.parametrize("good, code", [(0, 1), (2, 1), (3, 0), (4, 0)])
def test_most_rows_rejected_is_a_failure(run_script, tmp_path, good, code):
    """Exit code 1 above half, also if the dataset is kept; usable rows are written all the same."""
    rows = [{"input": f"问{number}", "target": "答" if number < good else ""} for number in range(6)]
    write_lines(tmp_path / "rows", rows)
    tokenize = f"tokenize_dataset_rows_belle.py --model_name_or_path {TINY} --save_path tokens --jsonl_path rows"
    for command in ("process_belle_1M_data.py --input rows --output out", tokenize, tokenize):
        result = run_script(command, cwd=tmp_path)
        assert result.code == code and "Traceback" not in result.err, result.err
        if good:
            assert ("rows could not be used, more than half" in result.err) == bool(code)
        else:  # one reason, said once
            assert result.err.count("is blank") == 1 and result.err.splitlines()[-1].count(" 6 ") == 1
    assert (tmp_path / "out").is_file() == (tmp_path / "tokens").is_dir() == bool(good)
    assert not good or len((tmp_path / "out").read_text().splitlines()) == good


def test_all_rows_too_long_is_a_failure(run_script, tmp_path):
    command = f"tokenize_dataset_rows_belle.py --model_name_or_path {TINY} --jsonl_path data/alpaca_data.jsonl"
    for flags in ("--max_seq_length 4", "--max_seq_length 7 --skip_overlength"):
        result = run_script(f"{command} --save_path {tmp_path}/tokens {flags}")
        assert result.code == 1 and "no row is left to write" in result.err and not (tmp_path / "tokens").exists()


def test_tokenize_does_not_replace_what_is_no_dataset(run_script, tmp_path):
    (tmp_path / "precious").write_text("mine")
    result = run_script(
        f"tokenize_dataset_rows_belle.py --jsonl_path data/alpaca_data.jsonl --save_path {tmp_path} "
        f"--model_name_or_path {TINY}"
    )
    assert result.code == 2 and (tmp_path / "precious").read_text() == "mine"


def test_flags_may_be_abbreviated(run_script, tmp_path):
    """As argparse allows, although transformers' parser gives every flag a second spelling."""
    flags = f"--jsonl data/sample.train.json --save {tmp_path}/tokens --model {TINY} --max 64"
    run_script(f"tokenize_dataset_rows_belle.py {flags}").check()
