"""Any row that goes in comes out with the same text; any damage to a file ends in a report."""

import gzip
import json

import fuzz
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from utils.common.errors import RowError
from utils.data.row_parser import parse_row, read_rows

quick = settings(
    derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
PHRASES = ("今天天气怎么样", "请写一首关于春天的诗", "把句子翻译成英文", "人工智能的未来", "3.11\t答案是42", "“好”\n")
CHINESE = st.lists(st.sampled_from(PHRASES), min_size=2, max_size=6).map("Python".join)


def columns(prompt, target):
    return st.sampled_from(
        [
            {"instruction": prompt, "input": "", "output": target},
            {"instruction": "", "input": prompt, "output": target, "id": 7},
            {"input": prompt, "target": target},
            {"context": prompt, "target": target},
            {"prompt": prompt, "completion": target},
            {"instruction": prompt, "instances": [{"input": "", "output": target}]},
            {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": target}]},
            {"id": "1", "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": target}]},
        ]
    )


def tables(texts, max_size=8):
    """Lists of (prompt, target, a raw row of them)."""
    pair = st.tuples(texts, texts)
    return st.lists(pair.flatmap(lambda p: columns(*p).map(lambda raw: (*p, raw))), min_size=1, max_size=max_size)


LAYOUTS = {
    "lines": lambda raws: "".join(json.dumps(raw, ensure_ascii=False) + "\n" for raw in raws),
    "ascii": lambda raws: "".join(json.dumps(raw) + "\n" for raw in raws),
    "crlf": lambda raws: "\r\n".join(json.dumps(raw, ensure_ascii=False) for raw in raws),
    "joined": lambda raws: "".join(json.dumps(raw, ensure_ascii=False) for raw in raws),
    "array": lambda raws: json.dumps(raws, ensure_ascii=False, indent=2),
    "compact": lambda raws: json.dumps(raws, ensure_ascii=False),
    "dicts": lambda raws: "".join(f"{raw}\n" for raw in raws),
    "mixed": lambda raws: "".join(str(raw) if i % 2 else json.dumps(raw) for i, raw in enumerate(raws)),
}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "rows"


def pairs_of(file):
    """The rows of a file as (prompt, target), and its errors."""
    rows = [row for _, _, row in read_rows(str(file), parse_row)]
    good = [(row.messages[0].content, row.target) for row in rows if not isinstance(row, RowError)]
    return good, [str(row) for row in rows if isinstance(row, RowError)]


@settings(quick, max_examples=150)
@given(table=tables(ANY_TEXT), layout=st.sampled_from(sorted(LAYOUTS)), packed=st.booleans(), bom=st.booleans())
def test_rows_come_out_as_they_went_in(file, table, layout, packed, bom):
    data = LAYOUTS[layout]([raw for *_, raw in table]).encode("utf-8-sig" if bom else "utf-8")
    file.write_bytes(gzip.compress(data, 1) if packed else data)
    assert pairs_of(file) == ([(prompt, target) for prompt, target, _ in table], [])


@settings(quick, max_examples=60)
@given(table=tables(CHINESE), layout=st.sampled_from(sorted(set(LAYOUTS) - {"ascii", "mixed"})))
def test_gb18030_comes_out_as_it_went_in(file, table, layout):
    file.write_bytes(LAYOUTS[layout]([raw for *_, raw in table]).encode("gb18030"))
    assert pairs_of(file) == ([(prompt, target) for prompt, target, _ in table], [])


@settings(quick, max_examples=30)
@given(table=tables(ANY_TEXT))
def test_processing_keeps_the_text(file, run_script, table):
    file.write_text(LAYOUTS["lines"]([raw for *_, raw in table]), encoding="utf-8", newline="")
    run_script(f"process_belle_1M_data.py --input {file} --output {file}.out").check()
    assert pairs_of(f"{file}.out") == ([(prompt, target) for prompt, target, _ in table], [])


@settings(quick, max_examples=120)
@given(table=tables(CHINESE), layout=st.sampled_from(sorted(LAYOUTS)), data=st.data())
def test_a_cut_file_gives_rows_that_were_in_it(file, table, layout, data):
    """The rows before the cut, and nothing that was no row."""
    whole = LAYOUTS[layout]([raw for *_, raw in table]).encode()
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    good, bad = pairs_of(file)
    assert good == [(prompt, target) for prompt, target, _ in table][: len(good)] and len(bad) <= 2


QUOTED = "“好”\nPython“好”\n"  # mostly quotes, whose bytes in UTF-8 are no Chinese character's


@settings(quick, max_examples=80)
@example(table=[(t, t, {"prompt": t, "completion": t}) for t in ("今天天气怎么样" * 2, QUOTED)], choices=[3] + [0] * 7)
@given(table=tables(CHINESE), choices=st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_joined_and_recoded_lines_are_the_same_rows_or_reported(file, table, choices):
    with open(file, "wb") as out:
        for (*_, raw), choice in zip(table, choices, strict=False):
            line = json.dumps(raw, ensure_ascii=False).encode("gb18030" if choice % 2 else "utf-8")
            out.write(line + (b"" if choice > 1 else b"\n"))
    good, bad = pairs_of(file)
    originals = iter([(prompt, target) for prompt, target, _ in table])
    assert all(pair in originals for pair in good)  # in order, none twice, none changed
    lines = file.read_bytes().count(b"\n") + 1
    assert len(bad) <= lines and (bad or len(good) == len(table))


@settings(quick, max_examples=100)
@given(
    table=tables(CHINESE, 5),
    layout=st.sampled_from(sorted(LAYOUTS)),
    packed=st.booleans(),
    wounds=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), st.binary(max_size=4)), min_size=1, max_size=4),
)
def test_damage_ends_in_a_report(file, run_script, table, layout, packed, wounds):
    """Bytes lost and put in anywhere: the script counts every row, and never ends in a traceback."""
    data = LAYOUTS[layout]([raw for *_, raw in table]).encode()
    data = gzip.compress(data, 1) if packed else data
    for place, lost, added in wounds:
        at = int(place * len(data))
        data = data[:at] + added + data[at + lost :]
    file.write_bytes(data)
    result = run_script(f"process_belle_1M_data.py --input {file} --output {file}.out")
    assert result.code in (0, 1, 2) and "Traceback" not in result.err
    *_, last = ["", *result.out.splitlines()]
    assert result.code or last.startswith("{")  # the counts; nothing is written where no row can be used
    if last.startswith("{"):
        counts = json.loads(last)
        written = len((file.parent / "rows.out").read_text(encoding="utf-8").split("\n")) - 1
        rejected = file.parent / "rows.out.rejected.jsonl"
        listed = len(rejected.read_text(encoding="utf-8").splitlines()) if rejected.is_file() else 0
        assert counts["written"] == written and counts["rejected"] == listed
        assert counts["read"] == written + listed + counts["skipped"]


def test_the_kept_cases_of_the_fuzz_harness(tmp_path):
    for name, (_, check) in fuzz.targets(tmp_path).items():
        assert fuzz.seeds(name), name
        for case in fuzz.seeds(name):
            check(case)
