"""Datasets of this toolkit and of other tools: their rows are told apart by content."""

import json

from utils.token_dataset import describe_row_change, fingerprint_rows, old_fingerprint_rows

import datasets
import pyarrow as pa

ROWS = [{"input_ids": [5, 6, 7, 8 + i], "labels": [-100, -100, 7, 8 + i]} for i in range(200)]


def dataset_of(rows, dtype="int32"):
    features = {name: datasets.List(datasets.Value(dtype)) for name in ("input_ids", "labels")}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def changed(number, **values):
    return [row | values if i == number else row for i, row in enumerate(ROWS)]


def test_what_is_different_about_rows_is_said_in_words():
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
