"""process_belle_1M_data.py's options: which rows come out, in which order, in which split, and what a kill leaves."""

import json
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT

from utils.common.errors import UsageError
from utils.data.dedup import Deduplicator, find_repeats, hash_text, jaccard, near_keys, shingle_set
from utils.data.shuffle_split import parse_split, shuffle_lines, split_of

SENTENCE = "请根据下面这段文字的内容，写出一篇大约三百字的读后感，要求语句通顺，观点鲜明，并且联系自己的生活实际"


def pairs(*prompts):
    return [{"input": prompt, "target": f"答{number}"} for number, prompt in enumerate(prompts)]


@pytest.fixture
def process(run_script, tmp_path):
    """process(rows, "--flags") -> (summary, rows of the output, exit code)."""

    def run(rows, flags="", output="out.json", code=0):
        (tmp_path / "in.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        command = f"process_belle_1M_data.py --input {tmp_path}/in.json --output {tmp_path}/{output} {flags}"
        result = run_script(command)
        assert result.code == code, result.err
        summary = json.loads(result.out.splitlines()[-1]) if code == 0 else result.err
        path = tmp_path / output
        return summary, [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else None

    return run


def test_conversations_are_written_as_messages(process):
    chat = {"conversations": [{"from": w, "value": v} for w, v in zip(("human", "gpt") * 2, "一二三四", strict=True)]}
    summary, rows = process([chat, *pairs("问")])
    assert summary["written"] == 2 and rows[1:] == pairs("问")
    assert [message["content"] for message in rows[0]["messages"]] == list("一二三四")


def test_exact_and_near_duplicates(process):
    prompts = [
        SENTENCE,
        SENTENCE + "。",  # punctuation
        SENTENCE.replace("三百字", "五百字"),  # one word
        SENTENCE.replace("大约三百字", "300字"),
        SENTENCE.replace("大约三百字", "500字"),  # another number, another task
        SENTENCE,
        "3+5=?",
        "3-5=?",
        "？",
        "！",
        "另外一个问题",
    ]
    summary, rows = process(pairs(*prompts), "--dedup exact")
    assert (summary["written"], summary["skipped"], summary["duplicate"]) == (10, 1, 1)
    summary, rows = process(pairs(*prompts), "--dedup")
    assert [row["target"] for row in rows] == [f"答{number}" for number in (0, 3, 4, 6, 7, 8, 9, 10)]
    assert (summary["read"], summary["written"], summary["skipped"], summary["near_duplicate"]) == (11, 8, 3, 2)


def test_near_keys_meet_where_texts_are_alike():
    draw = random.Random(0)
    texts = ["".join(chr(draw.randrange(0x4E00, 0x9FA6)) for _ in range(100)) for _ in range(300)]
    changed = [text[:60] + "变" + text[61:] for text in texts]
    assert min(jaccard(shingle_set(a), shingle_set(b)) for a, b in zip(texts, changed, strict=True)) > 0.9
    one, other = near_keys(texts), near_keys(changed)
    assert (one[:, 0] == other[:, 0]).all()
    assert (one[:, 1:] == other[:, 1:]).any(axis=1).mean() > 0.97
    assert len(np.unique(one[:, 1:])) == one[:, 1:].size  # and those of different texts do not
    assert (near_keys(texts[:7]) == one[:7]).all()  # a text's keys are its own


def test_repeats_are_found_in_partitions():
    keys = np.random.default_rng(0).integers(0, 60, 600).astype(np.uint64)
    firsts = {}
    expected = {(row, firsts[key]) for row, key in enumerate(keys.tolist()) if firsts.setdefault(key, row) != row}
    for sort_rows in (10000, 100, 7):
        pairs_of_rows = []
        for repeats, first in find_repeats(keys, np.zeros(600, np.uint8), sort_rows):
            pairs_of_rows += zip(repeats.tolist(), first.tolist(), strict=True)
        assert len(pairs_of_rows) == len(expected) and set(pairs_of_rows) == expected


def test_dedup_over_several_chunks(tmp_path):
    draw = random.Random(1)
    prompts = [str(draw.randrange(150)) for _ in range(1000)]
    dedup = Deduplicator(tmp_path, near=True, chunk_rows=16)
    kept = list(dedup((f"{prompt}\n", prompt) for prompt in prompts))
    assert kept == [(f"{prompt}\n", hash_text(prompt)) for prompt in dict.fromkeys(prompts)]
    assert dedup.exact_dropped == 1000 - len(kept) and dedup.near_dropped == 0


def test_near_duplicates_over_several_chunks(tmp_path):
    """Questions are compared as they were stored, of any length in bytes, and only after the same earlier turns."""
    questions = [f"{'é' * (n % 5)}{number}，{SENTENCE[n:]}" for n, number in enumerate("abcdefghijklmnop")]
    prompts = [*questions, *(f"一问\x1e{question}" for question in questions), *(f"{q}！" for q in questions)]
    dedup = Deduplicator(tmp_path, near=True, chunk_rows=7)
    kept = [line for line, _ in dedup((f"{n}\n", prompt) for n, prompt in enumerate(prompts))]
    fewer = Deduplicator(tmp_path, near=True)
    assert kept == [line for line, _ in fewer((f"{n}\n", prompt) for n, prompt in enumerate(prompts))]
    numbers = [int(line) for line in kept]
    assert 0 in numbers and 16 in numbers and max(numbers) < 32 and dedup.near_dropped == 48 - len(kept) > 16


def test_shuffle_is_a_seeded_permutation(process, tmp_path):
    rows = pairs(*map(str, range(300)))
    orders = [process(rows, f"--shuffle --seed {seed}")[1] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2] and orders[0] != rows
    assert sorted(orders[0], key=lambda row: int(row["input"])) == rows
    lines = [f"{number}\n" for number in range(300)]
    assert sorted(shuffle_lines(lines, tmp_path / "deep", 0, bucket_bytes=40)) == sorted(lines)  # buckets of buckets
    firsts = Counter(next(shuffle_lines(lines[:4], tmp_path / f"s{seed}", seed)) for seed in range(60))
    assert set(firsts) == set(lines[:4]) and max(firsts.values()) < 35


def test_max_rows_counts_what_it_leaves(process):
    rows = pairs(*map(str, range(20)))
    summary, written = process(rows, "--max_rows 5")
    assert written == rows[:5] and summary == {"read": 5, "written": 5, "rejected": 0, "skipped": 0}
    summary, written = process(rows, "--max_rows 5 --shuffle")
    assert len(written) == 5 and (summary["read"], summary["skipped"], summary["beyond_max_rows"]) == (20, 15, 15)


def test_a_row_keeps_its_split_when_data_grows(process, tmp_path):
    rows = pairs(*(f"问题{number}" for number in range(400)))

    def splits(rows, flags=""):
        summary, train = process(rows, f"--split 0.8,0.1,0.1 {flags}", output="all.train.json")
        files = [(tmp_path / f"all.{split}.json").read_text().splitlines() for split in ("train", "valid", "test")]
        assert len(train) == len(files[0])
        assert sum(map(len, files)) == summary["written"] == len(rows)
        return [{json.loads(line)["input"] for line in lines} for lines in files]

    few, many = splits(rows[:200]), splits(rows, "--shuffle")
    assert many == splits(rows, "--dedup exact")
    assert all(small <= large for small, large in zip(few, many, strict=True))
    assert 280 < len(many[0]) < 360 and min(map(len, many)) > 20
    bounds = parse_split("0.8,0.1,0.1")
    for split, prompts in enumerate(many):
        assert {split_of(hash_text(prompt), bounds) for prompt in prompts} == {split}


@pytest.mark.parametrize("split", ["1", "0.5,0.6", "0.5,-0.1,0.6", "a,b", "0.25,0.25,0.25,0.25", "1,0"])
def test_split_must_add_up(split):
    with pytest.raises(UsageError, match="--split"):
        parse_split(split)


def test_rejected_rows_are_listed_and_strict_stops(process, tmp_path):
    rows = [*pairs("问"), {"input": "无"}, {"q": "?"}, *pairs("再问")]
    summary, written = process(rows)
    listed = [json.loads(line) for line in (tmp_path / "out.json.rejected.jsonl").read_text().splitlines()]
    assert [(item["file"], item["line"]) for item in listed] == [(f"{tmp_path}/in.json", line) for line in (2, 3)]
    assert "no target" in listed[0]["reason"] and "no known columns" in listed[1]["reason"]
    assert (summary["read"], summary["written"], summary["rejected"]) == (4, 2, 2)
    error, kept = process(rows[1:], "--strict", code=1)
    assert "--strict" in error and "in.json:1: no target" in error and kept == written  # the old output stays
    process(pairs("问"))
    assert not (tmp_path / "out.json.rejected.jsonl").exists()  # no row, no file


@pytest.mark.parametrize(
    "flags, words",
    [("--max_rows 0", "--max_rows"), ("--split 0.5", "--split"), ("--input nowhere*.json", "nowhere")],
)
def test_wrong_requests(process, flags, words):
    error, written = process(pairs("问"), flags, code=2)
    assert words in error and len(error.strip().splitlines()) == 1 and written is None


def test_a_killed_run_leaves_the_old_file_and_the_next_tidies_up(process, tmp_path):
    (tmp_path / "out.json").write_text("old")
    code = (
        "import os, sys; from utils.common.files import atomic_writer, scratch_directory\n"
        "with atomic_writer(sys.argv[1]) as file, scratch_directory(sys.argv[1] + '.scratch') as scratch:\n"
        "    (scratch / 'lines').write_text('x'); file.write('new'); file.flush(); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "out.json"], cwd=ROOT)
    assert killed.returncode == -9 and (tmp_path / "out.json").read_text() == "old"
    assert len(list(tmp_path.glob(".out.json.*.tmp"))) == 2
    process(pairs("问"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.json", "out.json"]
