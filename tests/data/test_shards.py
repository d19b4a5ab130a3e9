"""Tokenising at scale: batches, processes, resuming, the cache, loss on every turn, reports, foreign datasets."""

import json
import os
import re
import signal
from collections import Counter

import datasets
import numpy as np
import pytest
from conftest import GOLDEN, TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.errors import RowError, UsageError
from utils.data import shards
from utils.data.arrow_reader import FEATURES, check_origin, load_examples
from utils.data.arrow_writer import SCHEMA, DatasetOrigin, complete_dataset
from utils.data.dataset_report import TokenReport, print_preview
from utils.data.encode import encode_batch, encode_example, encode_rows, rows_to_train
from utils.data.shards import ShardTokenizer, TokenizeOptions, cache_key
from utils.models.conversation import Conversation, Message
from utils.models.templates import template_for
from utils.models.token_spans import IGNORE_INDEX, encode_texts

MODELS = [TINY, *(GOLDEN / name for name in ("chatglm2-6b-tiny", "chatglm3-6b-tiny", "glm-4-9b-chat-tiny"))]
CHAT = Conversation(
    tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(("一问", "一答", "二问", "二答")))
)


@pytest.fixture(scope="module", params=MODELS, ids=lambda path: path.name)
def tokenizer(request):
    return load_tokenizer(str(request.param))


TEXTS = st.lists(
    st.lists(
        st.one_of(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
            st.sampled_from(
                [
                    "<eop>",
                    "<sop>",
                    "[gMASK]",
                    "[MASK]",
                    "sop",
                    "eop",
                    "<|user|>",
                    "<n>",
                    "<|tab|>",
                    "<|blank_3|>",
                    "</s>",
                    "<pad>",
                ]
            ),
            st.sampled_from(["\n", "\t", " ", "  ", " " * 81, "\r\n", "今天天气", "3.14", "café", "😀"]),
        ),
        max_size=8,
    ).map("".join),
    max_size=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=TEXTS)
def test_texts_at_once_are_texts_one_by_one(tokenizer, texts):
    one_by_one = [tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts]
    assert [ids.tolist() for ids in encode_texts(tokenizer, texts)] == one_by_one


@pytest.mark.parametrize("name", ["native", "alpaca"])
def test_rows_at_once_are_rows_one_by_one(tokenizer, name):
    template = template_for(tokenizer, name)
    rows = [
        Conversation((Message("user", "问" * n), Message("assistant", "答  \n" * (n % 7 + 1)))) for n in range(1, 60)
    ]
    rows[10:10] = [CHAT, Conversation(CHAT.messages[:2])]
    for limit in (None, 80, 30):
        for row, encoded in zip(rows, encode_rows(tokenizer, rows, limit, template), strict=True):
            if isinstance(encoded, RowError):
                with pytest.raises(RowError, match="leave no room"):
                    encode_example(tokenizer, row, limit, template)
            else:
                example = encode_example(tokenizer, row, limit, template)
                assert encoded.example() == example
                assert encoded.length == len(example.input_ids) == len(example.labels) <= (limit or 10**6)


@pytest.mark.parametrize("name", ["native", "alpaca"])
@pytest.mark.parametrize("loss_on", ["last", "every"])
def test_flat_arrays_are_the_rows(tokenizer, name, loss_on):
    """Single turns laid out span by span, alone and mixed with other rows, are those of `encode_rows`."""
    template = template_for(tokenizer, name)
    single = [
        Conversation((Message("user", "问" * n), Message("assistant", "答  \n" * (n % 7 + 1)))) for n in range(1, 40)
    ]
    odd = Conversation((Message("user", f"问{template.prompt_ending}"), Message("assistant", "答")))
    for rows in (single, [*single, odd], [CHAT, *single], [single[0]], []):
        for limit in (None, 90, 60, 20, 5):
            to_train = [each for row in rows for each in rows_to_train(row, template, loss_on)]
            batch = encode_batch(tokenizer, to_train, limit, template)
            expected = encode_rows(tokenizer, to_train, limit, template)
            examples = [None if isinstance(row, RowError) else row.example() for row in expected]
            assert {n: str(error) for n, error in batch.errors.items()} == {
                n: str(row) for n, row in enumerate(expected) if isinstance(row, RowError)
            }
            ends = np.cumsum(batch.lengths)
            assert len(batch.lengths) == len(to_train) and (ends[-1] if rows else 0) == len(batch.input_ids)
            for example, start, end, cut in zip(examples, ends - batch.lengths, ends, batch.tokens_cut, strict=True):
                if example:
                    assert batch.input_ids[start:end].tolist() == example.input_ids
                    assert batch.labels[start:end].tolist() == example.labels and cut == example.tokens_cut
                else:
                    assert start == end
            odd_rows = batch.lengths % 2 == 1
            assert batch.select(odd_rows).lengths.tolist() == batch.lengths[odd_rows].tolist()


def test_loss_on_every_turn(tokenizer):
    """Each turn's tokens and the one that ends it are trained on; prompts stay as in inference."""
    template = template_for(tokenizer)
    rows = rows_to_train(CHAT, template, "every")
    examples = [row.example() for row in encode_rows(tokenizer, rows, None, template)]
    last = encode_example(tokenizer, CHAT, None, template)
    assert examples[-1].input_ids == last.input_ids
    trained = [[token for token in example.labels if token != IGNORE_INDEX] for example in examples]
    answers = [encode_example(tokenizer, row, None, template) for row in (Conversation(CHAT.messages[:2]), CHAT)]
    answers = [[token for token in answer.labels if token != IGNORE_INDEX] for answer in answers]
    if "chatglm3" in type(tokenizer).__name__.lower() or "chatglm4" in type(tokenizer).__name__.lower():
        user = tokenizer.convert_tokens_to_ids("<|user|>")
        assert trained == [[*answers[0][:-1], user, *answers[1]]]
        assert all(
            label in (IGNORE_INDEX, token) for token, label in zip(last.input_ids, examples[0].labels, strict=True)
        )
    else:
        assert trained == answers


def test_loss_on_every_turn_of_a_single_turn_is_that_on_the_last(tokenizer):
    row, template = Conversation(CHAT.messages[:2]), template_for(tokenizer)
    assert rows_to_train(row, template, "every") == rows_to_train(row, template, "last") == [row]
    marked = template.training_rows(row, [1])
    assert [each.example() for each in encode_rows(tokenizer, marked, None, template)] == [
        encode_example(tokenizer, row, None, template)
    ]


@pytest.fixture
def workspace(tmp_path, monkeypatch, run_script):
    """40 rows in a file that makes 5 shards or more; tokenize("--flags") -> (its output, summary, dataset)."""
    monkeypatch.setattr(shards, "BLOCK_BYTES", 600)
    monkeypatch.setattr(shards, "SHARD_BLOCKS", 1)
    rows = [{"input": f"第{n}个问题：" + "问" * (n % 9), "target": "答" * (n % 13 + 1)} for n in range(40)]
    rows[7] = {"input": "没有答案"}
    (tmp_path / "rows.json").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def tokenize(flags="", code=0):
        result = run_script(
            f"tokenize_dataset_rows_belle.py --jsonl_path {tmp_path}/rows.json --save_path {tmp_path}/tokens "
            f"--model_name_or_path {TINY} --num_proc 1 {flags}"
        )
        assert result.code == code, result.err
        if code:
            return result, None, None
        return result, json.loads(result.out.splitlines()[-1]), datasets.load_from_disk(str(tmp_path / "tokens"))

    tokenize.path = tmp_path
    return tokenize


def record_shards(monkeypatch, fail_at=None):
    """A list that gains the number of each shard tokenised from now on; shard `fail_at` is killed half way."""
    numbers, tokenize = [], ShardTokenizer.__call__

    def recorded(self, number, blocks):
        if number == fail_at:
            (self.directory / f"part-{number:05d}.arrow").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        numbers.append(number)
        return tokenize(self, number, blocks)

    monkeypatch.setattr(ShardTokenizer, "__call__", recorded)
    return numbers


def test_processes_make_the_same_dataset(workspace):
    _, summary, one = workspace()
    one = one.to_dict()
    assert (summary["read"], summary["written"], summary["rejected"]) == (40, 39, 1)
    _, again, two = workspace("--num_proc 2 --max_seq_length 383")
    assert two.to_dict() == one and again == summary
    assert len(two.cache_files) >= 5
    assert summary["tokens"] == sum(map(len, one["input_ids"]))
    assert summary["trained_tokens"] == sum(label >= 0 for labels in one["labels"] for label in labels)


def test_nothing_is_tokenised_again_unless_something_changed(workspace, monkeypatch):
    _, summary, _ = workspace()
    numbers = record_shards(monkeypatch)
    result, same, _ = workspace("--num_proc 2")
    assert numbers == [] and same == summary and "is kept: it was made from these rows" in result.out
    rows = (workspace.path / "rows.json").read_text()
    for flags, change in (("--max_seq_length 20", ""), ("--loss_on every", ""), ("--template alpaca", ""), ("", "x")):
        numbers.clear()
        (workspace.path / "rows.json").write_text(rows.replace("第3个", f"第3{change}个"))
        _, summary, dataset = workspace(flags)
        assert len(numbers) >= 5 and len(dataset) == summary["written"]
    (workspace.path / "tokens.rejected.jsonl").unlink()  # it belongs to the dataset
    numbers.clear()
    workspace(flags)
    assert len(numbers) >= 5 and (workspace.path / "tokens.rejected.jsonl").is_file()


def test_a_killed_run_is_resumed(workspace, monkeypatch):
    _, summary, whole = workspace()
    whole = whole.to_dict()
    workspace("--max_seq_length 20")
    with monkeypatch.context() as patch:
        numbers = record_shards(patch, fail_at=3)
        workspace(code=1)
        assert numbers == [0, 1, 2]
    assert max(map(len, datasets.load_from_disk(str(workspace.path / "tokens"))["input_ids"])) == 20  # the older one
    numbers = record_shards(monkeypatch)
    result, again, dataset = workspace()
    assert "resuming an interrupted run: 3 shards finished" in result.out and numbers[0] == 3
    assert dataset.to_dict() == whole and again == summary
    names = sorted(path.name for path in workspace.path.iterdir())
    assert names == ["rows.json", "tokens", "tokens.rejected.jsonl"]
    assert not {"lock", "reports"} & {path.name for path in (workspace.path / "tokens").iterdir()}


def test_shards_of_another_run_are_not_used(workspace, monkeypatch):
    with monkeypatch.context() as patch:
        record_shards(patch, fail_at=2)
        workspace("--max_seq_length 20", code=1)
    assert len(list(workspace.path.glob(".tokens.*.parts"))) == 1
    numbers = record_shards(monkeypatch)
    workspace()
    assert numbers[0] == 0 and list(workspace.path.glob(".tokens.*.parts")) == []


def test_a_killed_worker_is_reported(workspace, monkeypatch):
    monkeypatch.setattr(ShardTokenizer, "encode_block", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    result, _, _ = workspace("--num_proc 2", code=1)
    assert "a worker process was killed" in result.err and "Traceback" not in result.err


def test_strict_stops_at_the_first_bad_row(workspace):
    result, _, _ = workspace("--strict", code=1)
    assert "rows.json:8: no target" in result.err and not (workspace.path / "tokens").exists()
    workspace()
    assert workspace("--strict", code=1)[0].err.count("--strict") == 1  # also where the dataset is there already


def test_report(workspace):
    result, summary, dataset = workspace("--max_seq_length 20 --preview 2")
    lengths = [len(encode_example(load_tokenizer(str(TINY)), row(n)).input_ids) for n in range(40) if n != 7]
    report = json.loads((workspace.path / "tokens" / "report.json").read_text())
    assert report["lengths"] == sorted([list(item) for item in Counter(lengths).items()])
    assert report["cut"] == summary["cut"] == sum(length > 20 for length in lengths) > 0
    assert report["max_seq_length_for_99_percent"] == max(lengths)
    assert f"--max_seq_length {max(lengths)} would keep 99%" in report["advice"]
    assert "35 of 39 rows (89.7 %) are longer than --max_seq_length 20 and were cut\n" in result.out
    assert "--max_seq_length 256 would cut none" in result.out
    assert (workspace.path / "tokens" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "read 40 = written 39 + rejected 1 + skipped 0" in result.out
    assert "第0个问题:⟦答⟧" in result.out.replace(" ", "") and result.out.count("--- row") == 2


def row(number):
    return Conversation(
        (Message("user", f"第{number}个问题：" + "问" * (number % 9)), Message("assistant", "答" * (number % 13 + 1)))
    )


def test_the_rows_that_a_limit_costs_are_one_line():
    report = TokenReport(skipped_overlength=31, lengths=Counter({100: 69, 300: 28, 3000: 3}))
    longer = "31 of 100 rows (31 %) are longer than --max_seq_length 200 and were"
    sentence = report.describe_overlength(200)
    assert sentence == f"{longer} left out; --max_seq_length 384 would leave out 3 %"
    report.skipped_overlength, report.cut = 0, 31
    assert report.describe_overlength(200) == f"{longer} cut; --max_seq_length 384 would cut 3 %"
    report.cut = 3
    sentence = report.describe_overlength(384)
    assert sentence == "3 of 100 rows (3 %) are longer than --max_seq_length 384 and were cut"
    report.cut = 0
    assert report.describe_overlength(4096) == "" and report.facts(4096)["lengths"].endswith("already")


def test_advice():
    report = TokenReport(lengths=Counter({100: 980, 300: 15, 1000: 5}))
    assert report.length_for(0.99) == 300 and report.length_for(1) == 1000
    assert "98.0%" in report.advice(200) and "--max_seq_length 300 would keep 99%" in report.advice(200)
    assert "300 already" in report.advice(512) and ";" not in report.advice(320)
    assert TokenReport.load(report.dump(200)) == report


def test_preview_marks_what_is_trained_on(capsys, monkeypatch):
    tokenizer = load_tokenizer(str(MODELS[2]))
    template = template_for(tokenizer)
    example = encode_rows(tokenizer, rows_to_train(CHAT, template, "every"), None, template)[0].example()
    print_preview(tokenizer, [example])
    plain = capsys.readouterr().out
    text = plain.partition("\n")[2]
    assert text.count("⟦") == 2 and text.index("一问") < text.index("⟦") < text.index("一答") < text.index("⟧")
    monkeypatch.setattr("utils.common.console.is_terminal", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_preview(tokenizer, [example])
    coloured = capsys.readouterr().out
    assert coloured.count("\x1b[32m⟦") == 2 and re.sub("\x1b\\[[0-9]+m", "", coloured) == plain


def test_key_reads_the_files_not_their_dates(tmp_path):
    tokenizer = load_tokenizer(str(TINY))
    template, options = template_for(tokenizer), TokenizeOptions("native", 384, False, "last")
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    keys = []
    for a, b in (("x", "y"), ("x", "y"), ("xy", ""), ("x", "z")):
        (tmp_path / "a").write_text(a)
        (tmp_path / "b").write_text(b)
        keys.append(cache_key(tokenizer, template, options, paths))
    assert keys[0] == keys[1] and len(set(keys)) == 3


def save_foreign(path, rows):
    """Save a dataset as ChatGLM-Tuning's script writes it: input_ids of int64, seq_len."""
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


def test_datasets_of_chatglm_tuning_are_trained_on(tmp_path):
    tokenizer = load_tokenizer(str(TINY))
    example = encode_example(tokenizer, row(3))
    prompt = tokenizer.encode(row(3).messages[0].content)
    path = save_foreign(tmp_path / "foreign", [{"input_ids": example.input_ids, "seq_len": len(prompt)}] * 3)
    dataset = load_examples(path)
    assert dataset.to_dict() == {"input_ids": [example.input_ids] * 3, "labels": [example.labels] * 3}
    assert check_origin(path, tokenizer, str(TINY)) == "native"
    for model in MODELS[1:]:
        with pytest.raises(UsageError, match="tokenise the rows again"):
            check_origin(path, load_tokenizer(str(model)), str(model))
    assert json.loads(json.dumps(dataset[0]["labels"]))[: len(prompt)] == [IGNORE_INDEX] * len(prompt)


def test_dataset_is_what_the_datasets_library_writes(tmp_path):
    assert SCHEMA.equals(FEATURES.arrow_schema, check_metadata=True)
    complete_dataset(tmp_path, [], DatasetOrigin("native", "", ""), "")
    ours = (tmp_path / "dataset_info.json").read_text()
    datasets.DatasetInfo(features=FEATURES).write_to_directory(str(tmp_path))
    assert ours == (tmp_path / "dataset_info.json").read_text()
