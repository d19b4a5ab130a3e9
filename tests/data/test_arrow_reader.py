"""
Datasets of this toolkit and of other tools train as their columns mean, or are refused with row and column; rows are
told apart by content; Arrow files with wrong numbers are refused.
"""

import json
import struct

import datasets
import pyarrow as pa
import pytest
from conftest import TINY

from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.errors import UsageError
from utils.data.arrow_reader import (
    check_origin,
    describe_row_change,
    fingerprint_rows,
    load_examples,
    old_fingerprint_rows,
)
from utils.data.dataset_columns import Vocabulary

ROWS = [{"input_ids": [5, 6, 7, 8 + i], "labels": [-100, -100, 7, 8 + i]} for i in range(200)]


def dataset_of(rows, dtype="int32"):
    features = {name: datasets.List(datasets.Value(dtype)) for name in ("input_ids", "labels")}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def changed(number, **values):
    return [row | values if i == number else row for i, row in enumerate(ROWS)]


def test_the_difference_between_rows_is_described():
    now = fingerprint_rows(dataset_of(ROWS))
    for rows, words in (
        (ROWS, None),
        (ROWS[:150], "150 rows (now 200)"),
        (ROWS[::-1], "the same rows in another order"),
        (changed(1, labels=[-100, 6, 7, 9]), "the same rows with loss on other tokens"),  # no row of a sample
        (changed(1, labels=[-100, -100, -100, 9]), "the same rows with loss on other tokens"),
        (
            changed(1, input_ids=[5, 6, 7, 99], labels=[-100, -100, 7, 99]),
            "the same prompts and other targets",
        ),
        (changed(1, input_ids=[6, 5, 7, 9]), "other rows"),
        (changed(1, input_ids=[5, 6, 7, 9, 0], labels=[-100, -100, 7, 9, -100]), "other rows"),
    ):
        then = json.loads(json.dumps(fingerprint_rows(dataset_of(rows))))
        assert describe_row_change(then, now) == words


def test_rows_are_the_same_however_they_are_stored():
    whole = fingerprint_rows(dataset_of(ROWS))
    table = dataset_of(ROWS).data.table
    chunks = pa.concat_tables([table.slice(0, 3), table.slice(3, 90), table.slice(93)])
    assert fingerprint_rows(datasets.Dataset(chunks, fingerprint="chunks")) == whole
    assert fingerprint_rows(dataset_of(ROWS, "int64")) == whole == fingerprint_rows(dataset_of(ROWS, "int16"))
    twice = dataset_of([*ROWS, *ROWS])
    assert fingerprint_rows(twice.select(range(200, 400))) == whole
    assert fingerprint_rows(dataset_of(ROWS[::-1]).select(range(199, -1, -1))) == whole


def test_fingerprints_of_earlier_versions():
    """The value is what the version before made of these rows."""
    now = fingerprint_rows(dataset_of(ROWS))
    assert old_fingerprint_rows(dataset_of(ROWS)) == now["v1"] == "38351722f2866181"
    assert describe_row_change("38351722f2866181", now) is None
    assert describe_row_change("0" * 16, now) == "other rows"
    for strange in (None, 7, [], {}, {"version": 3}):
        assert "cannot compare" in describe_row_change(strange, now)


VOCABULARY = Vocabulary(size=1000, pad_token_id=3)
IDS, LABELS = [[5, 6, 7], [8, 9, 10, 11]], [[-100, 6, 7], [-100, -100, 10, 11]]
LIST, LARGE = pa.list_(pa.int32()), pa.large_list(pa.int64())


def load(path, input_ids=IDS, labels=LABELS, types=(), **columns):
    """The rows that training gets of these columns; None for a column that is not there."""
    columns = {"input_ids": input_ids, "labels": labels, **columns}
    arrays = {name: pa.array(v, dict(types).get(name)) for name, v in columns.items() if v is not None}
    datasets.Dataset(pa.table(arrays)).save_to_disk(str(path))
    return load_examples(str(path), VOCABULARY).to_dict()


@pytest.mark.parametrize(
    "columns",
    [
        {"types": {"input_ids": LARGE, "labels": LARGE}},
        {"types": {"input_ids": pa.list_(pa.uint16()), "labels": pa.list_(pa.int8())}},
        {"attention_mask": [[True] * 3, [True] * 4]},
        {
            "input_ids": [[3, 3, 3, 5, 6, 7], [3, 3, 8, 9, 10, 11]],
            "labels": [[-100, -100, -100, -100, 6, 7], [-100, -100, -100, -100, 10, 11]],
            "attention_mask": [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]],
            "position_ids": [[1, 1, 1, 0, 1, 2], [1, 1, 0, 1, 2, 3]],
        },
        {
            "input_ids": [[5, 6, 7, 3, 3], [8, 9, 10, 11, 3]],
            "labels": [[-100, 6, 7, -100, -100], [-100, -100, 10, 11, 3]],
            "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]],
            "types": dict.fromkeys(("input_ids", "labels", "attention_mask"), pa.list_(pa.int32(), 5)),
        },
        {
            "input_ids": [[5, -1, 6, 7], [8, 9, 3, 3, 10, 11]],
            "labels": [[-100, -1, 6, 7], [-100, -100, -100, -100, 10, 11]],
            "attention_mask": [[1, 0, 1, 1], [1, 1, 0, 0, 1, 1]],
        },
        {"labels": None, "seq_len": [1, 2]},
        {"labels": None, "completion_mask": [[0, 1, 1], [0, 0, 1, 1]]},
        {"labels": IDS, "assistant_masks": [[0, 1, 1], [0, 0, 1, 1]]},
        {"labels": IDS, "loss_mask": [[0, 1, 1], [0, 1, 1, 1]], "completion_mask": [[1] * 3, [0, 0, 1, 1]]},
        {"token_type_ids": [[0] * 3, [0] * 4], "position_ids": [[0, 1, 2], [0, 1, 2, 3]], "weight": [1.0, 1.0]},
        {"text": ["a", "b"], "length": [3, 4], "seq_len": [3, 4]},
    ],
)
def test_columns_of_other_tools(tmp_path, columns):
    """Whatever columns hold the rows, they train as the plain ones."""
    assert load(tmp_path / "rows", **columns) == {"input_ids": IDS, "labels": LABELS}


def test_masked_tokens_and_ignored_columns_are_printed(tmp_path, capsys):
    load(tmp_path / "rows", attention_mask=[[0, 1, 1], [1] * 4], text=["a", "b"])
    printed = capsys.readouterr().out
    assert "attention_mask leaves 1 of 7 tokens out" in printed and "columns that are not read: 'text'" in printed


@pytest.mark.parametrize(
    "words, columns",
    [
        ("row 1: labels has 3 values and input_ids has 4: .*-100", {"labels": [[-100, 6, 7], [-100, 10, 11]]}),
        ("row 1: attention_mask has 5 values and input_ids has 4", {"attention_mask": [[1] * 3, [1] * 5]}),
        ("row 0: attention_mask holds 2, .* neither 0 nor 1", {"attention_mask": [[1, 2, 1], [1] * 4]}),
        ("row 0: completion_mask holds -1", {"completion_mask": [[1, -1, 1], [1] * 4]}),
        ("row 1: input_ids holds 1000, .* tokens 0 to 999", {"input_ids": [[5, 6, 7], [8, 9, 1000, 11]]}),
        ("row 0: input_ids holds -1", {"input_ids": [[5, -1, 7], [8, 9, 10, 11]]}),
        ("row 1: labels holds -5, which is not -100", {"labels": [[-100, 6, 7], [-100, -100, 10, -5]]}),
        ("row 1: labels holds 2000", {"labels": [[-100, 6, 7], [-100, -100, 10, 2000]]}),
        ("row 0: labels holds a null: give -100", {"labels": [[None, 6, 7], [-100, -100, 10, 11]]}),
        ("row 1: input_ids is null", {"input_ids": [[5, 6, 7], None]}),
        ("row 0: seq_len is 4, and the row has 3", {"labels": None, "seq_len": [4, 1]}),
        ("row 1: seq_len is -1", {"labels": None, "seq_len": [1, -1]}),
        ("row 1: seq_len is null", {"labels": None, "seq_len": [1, None]}),
        ("column seq_len holds double, not integers", {"labels": None, "seq_len": [1.0, 1.0]}),
        ("column input_ids holds list<.*double>, not lists", {"input_ids": [[5.0, 6.0, 7.0], [1.0] * 4]}),
        ("column labels holds list<.*bool>", {"labels": [[True] * 3, [True] * 4]}),
        ("column input_ids holds string", {"input_ids": ["5 6 7", "8 9 10 11"]}),
        ("column labels holds int64", {"labels": [1, 2]}),
        ("column input_ids holds list<.*list<", {"input_ids": [[[5, 6, 7]], [[8, 9, 10, 11]]]}),
        ("row 0: input_ids begins with padding", {"input_ids": [[3, 3, 7], [8, 9, 10, 11]]}),
        ("row 1: column position_ids is not supported", {"position_ids": [[0, 1, 2], [0, 1, 0, 1]]}),
        ("column position_ids is not supported", {"position_ids": [[[0, 1, 2]] * 2, [[0, 1, 2, 3]] * 2]}),
        ("column token_type_ids is not supported", {"token_type_ids": [[0, 0, 1], [0] * 4]}),
        ("column weight is not supported", {"weight": [1.0, 0.5]}),
        ("column pixel_values is not supported", {"pixel_values": [[0.0], [1.0]]}),
        ("lacks the columns input_ids and labels", {"labels": None}),
    ],
)
def test_impossible_rows(tmp_path, words, columns):
    with pytest.raises(UsageError, match=words) as error:
        load(tmp_path / "rows", **columns)
    assert len(error.value.args) == 1 and str(error.value).startswith(f"--dataset_path {tmp_path}/rows")


def test_a_row_is_counted_over_all_files(tmp_path):
    rows = [{"input_ids": [5, 6], "labels": [5, 6]} for _ in range(40_000)]
    rows[39_999] = {"input_ids": [5, 6], "labels": [5, -7]}
    dataset_of(rows).save_to_disk(str(tmp_path / "rows"), num_shards=3)
    with pytest.raises(UsageError, match="row 39999: labels holds -7"):
        load_examples(str(tmp_path / "rows"), VOCABULARY)


def test_what_is_no_dataset(tmp_path):
    splits = datasets.DatasetDict({"train": dataset_of(ROWS), "test": dataset_of(ROWS)})
    splits.save_to_disk(str(tmp_path / "splits"))
    dataset_of(ROWS).to_parquet(str(tmp_path / "files" / "a.parquet"))
    (tmp_path / "rows.jsonl").write_text("{}")
    for name, words in (
        ("splits", f"holds the datasets test, train: give one of them, {tmp_path}/splits/test"),
        ("files", r"holds a parquet file: .*load_dataset\('parquet'"),
        ("rows.jsonl", rf"--jsonl_path {tmp_path}/rows.jsonl --save_path {tmp_path}/rows.tokens and give"),
        ("nowhere", "does not exist; make it with"),
    ):
        with pytest.raises(UsageError, match=words):
            load_examples(str(tmp_path / name))


@pytest.fixture
def damaged(tmp_path):
    """damaged(change) -> the rows of a dataset after `change` of its Arrow file, a bytearray."""
    columns = {"input_ids": pa.array(IDS, LIST), "labels": pa.array(LABELS, LIST), "text": pa.nulls(2)}
    datasets.Dataset(pa.table(columns)).save_to_disk(str(tmp_path / "rows"))
    (file,) = (tmp_path / "rows").glob("*.arrow")
    content = file.read_bytes()

    def load_changed(change):
        changed = bytearray(content)
        file.write_bytes(change(changed) or changed)
        return load_examples(str(tmp_path / "rows"), VOCABULARY).to_dict()

    load_changed.content = content
    return load_changed


def set_offsets(*offsets):
    def change(content):
        start = content.index(struct.pack("<3i", 0, 3, 7))
        content[start : start + 12] = struct.pack("<3i", *offsets)

    return change


def write_stream(table, **options):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def rows_of_nothing(content):
    """2 to the power of 40 rows that need no byte."""
    batch = write_stream(pa.table({"input_ids": pa.nulls(7), "labels": pa.nulls(7)}))
    return batch.replace(struct.pack("<q", 7), struct.pack("<q", 1 << 40))


def bomb(codec):
    zeros = pa.array([[0] * (1 << 20)], LIST)
    return lambda content: write_stream(pa.table({"input_ids": zeros, "labels": zeros}), compression=codec)


TWICE = pa.Table.from_arrays([pa.array(IDS, LIST)] * 3, ["input_ids", "labels", "labels"])


@pytest.mark.parametrize(
    "words, change",
    [
        ("is damaged", set_offsets(0, 3, 1 << 30)),  # outside the file
        ("is damaged", set_offsets(0, 7, 3)),
        ("is damaged", set_offsets(-4, 3, 7)),
        ("claims 1,099,511,627,776 rows", rows_of_nothing),
        ("compressed", bomb("zstd")),
        ("compressed", bomb("lz4")),
        ("is cut", lambda content: content[:-100]),
        ("is cut", lambda content: content[:-8]),  # where Arrow sees a whole file
        ("is cut, or not an Arrow stream", lambda content: b"x" * 100),
        ("is cut", lambda content: content.clear()),
        ("two columns labels", lambda content: write_stream(TWICE)),
    ],
)
def test_arrow_files_with_wrong_numbers(damaged, words, change):
    with pytest.raises(UsageError, match=words):
        damaged(change)


@pytest.mark.parametrize("value", (1 << 60, (1 << 31) - 1, -1, -(1 << 63)))
def test_an_arrow_file_with_any_number_changed(damaged, value):
    """Each 8 bytes in turn: the file is refused, or its rows are whole."""
    refused = 0
    for place in range(0, len(damaged.content) - 7, 8):

        def change(content, place=place):
            content[place : place + 8] = struct.pack("<q", value)

        try:
            rows = damaged(change)
            assert list(map(len, rows["input_ids"])) == list(map(len, rows["labels"])) and len(rows["labels"]) <= 2
        except UsageError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    "state, words",
    [
        ("{", "state.json is not JSON"),
        ("[]", "state.json holds list"),
        ("{}", "state.json has no '_data_files'"),
        ('{"_data_files": {}}', "'_data_files' is dict, not list"),
        ('{"_data_files": []}', "has no rows"),
        ('{"_data_files": [7]}', "names a file in another directory, None"),
        ('{"_data_files": [{"filename": "../x"}]}', "names a file in another directory, ../x"),
        ('{"_data_files": [{"filename": "absent.arrow"}]}', "absent.arrow does not exist"),
        ('{"_data_files": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_wrong_state(damaged, tmp_path, state, words):
    damaged(lambda content: content)
    (tmp_path / "rows" / "dataset_info.json").write_text("[" * 100_000)  # which is not read
    (tmp_path / "rows" / "state.json").write_text(state)
    with pytest.raises(UsageError, match=words):
        load_examples(str(tmp_path / "rows"))


@pytest.mark.parametrize(
    "origin, words",
    [
        ("[]", "origin.json holds list"),
        ('{"template": "native"}', "origin.json has no 'tokenizer'"),
        ('{"template": "x", "tokenizer": "", "model_name_or_path": ""}', "there is no template 'x'"),
    ],
)
def test_a_wrong_origin(tmp_path, origin, words):
    dataset_of(ROWS).save_to_disk(str(tmp_path))
    (tmp_path / "origin.json").write_text(origin)
    with pytest.raises(UsageError, match=words):
        check_origin(str(tmp_path), load_tokenizer(str(TINY)), str(TINY))
