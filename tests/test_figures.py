"""Figures of the READMEs, docs/benchmarks.md and the pictures are those of docs/benchmarks.json and of the logs."""

import json
import re

import pytest
from conftest import ROOT

from benchmarks import draw_figures

RESULTS = json.loads(draw_figures.RESULTS.read_text(encoding="utf-8"))
TABLES = RESULTS["tables"]
READMES = ("README.md", "README_zh.md")
# Unit -> what a document says was measured: numbers with a thousands separator, percentages, how many times as fast.
FIGURES = {
    "": re.compile(r"\d{1,3}(?:,\d{3})+"),
    "%": re.compile(r"\d+(?:\.\d+)?(?= ?%)"),
    "times": re.compile(r"\d+(?:\.\d+)?(?= ?(?:times|倍))"),
}
HARDWARE = re.compile(r"\d × H\d00 \d+ GB")


def numbers(value) -> set[float]:
    """Return every number of a JSON value, and those with a thousands separator in its texts."""
    if isinstance(value, dict | list):
        return set().union(*map(numbers, value.values() if isinstance(value, dict) else value))
    return figures(value, "") if isinstance(value, str) else {float(value)}


def figures(text: str, unit: str) -> set[float]:
    """Return the figures of a unit in a text."""
    return {float(figure.replace(",", "")) for figure in FIGURES[unit].findall(text)}


def measured(unit: str) -> set[float]:
    """Return the figures of a unit in docs/benchmarks.json."""
    if not unit:
        return numbers(RESULTS)
    outcomes = {
        float(value) for outcome in RESULTS["outcomes"] for value in outcome["values"] if outcome["unit"] == unit
    }
    rows = [row for table in TABLES.values() for row in table["rows"]]
    if unit == "%":
        return outcomes | {row[key] for row in rows for key in row if key.endswith("_percent")}
    return outcomes | {float(ratio["times"]) for ratio in RESULTS["ratios"]}


def prose(name: str) -> str:
    """Return a document without its code."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```|`[^`\n]*`|\]\([^)]*\)", "", text, flags=re.DOTALL | re.MULTILINE)


def speed_table(name: str) -> list[list[str]]:
    """Return the rows of the README's table whose heading names cards."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if len(HARDWARE.findall(line)) > 1)
    last = next(number for number in range(first, len(lines)) if not lines[number].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first:last]]


@pytest.mark.parametrize("name", [*READMES, "docs/benchmarks.md"])
def test_figures_are_those_of_the_results(name):
    text, checked = prose(name), 0
    for unit in FIGURES:
        written = figures(text, unit)
        unknown = sorted(written - measured(unit))
        assert not unknown, f"not in docs/benchmarks.json: {unknown} {unit}"
        checked += len(written)
    assert checked > 15


@pytest.mark.parametrize("name", READMES)
def test_the_speed_table_has_each_figure_under_its_cards(name):
    heading, _, *rows = speed_table(name)
    checked = 0
    for column in range(1, len(heading)):
        measured = [table["rows"] for table in TABLES.values() if table["hardware"] == heading[column]]
        speeds = {f"{row['tokens_per_second']:,}" for rows in measured for row in rows if "tokens_per_second" in row}
        cells = {row[column] for row in rows} - {""}
        assert cells <= speeds, f"{heading[column]}: {cells - speeds}"
        checked += len(cells)
    assert checked > 12


def test_both_languages_have_the_same_speeds():
    english, chinese = ([row[1:] for row in speed_table(name)] for name in READMES)
    assert english == chinese


def test_ratios_follow_from_their_figures():
    for ratio in RESULTS["ratios"]:
        assert ratio["times"] == int(ratio["of"] / ratio["to"]), ratio["what"]
        assert {ratio["of"], ratio["to"]} <= numbers(TABLES)


def test_each_figure_has_its_line_in_a_log():
    checked = 0
    for table in TABLES.values():
        assert table["hardware"] and table["versions"]
        log = (ROOT / "docs" / "log" / f"{table['log']}.md").read_text(encoding="utf-8")
        entries = dict(entry.split("\n", 1) for entry in log.split("\n## ")[1:])
        for row in table["rows"]:
            for key, value in row.items():
                if key.endswith(("tokens_per_second", "_percent")) or key == "value":
                    figure = draw_figures.cell(key, value)
                    assert figure in entries[row["log"]], f"{figure} is not under {row['log']!r}"
                    checked += 1
    assert checked > 80


def test_page_and_pictures_are_those_of_the_results(tmp_path):
    page = draw_figures.PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- benchmarks.json: ") == len(TABLES)
    assert page == draw_figures.fill_tables(page, TABLES), "run python benchmarks/draw_figures.py"
    for name, draw in (("training", draw_figures.draw_training), ("inference", draw_figures.draw_inference)):
        draw(TABLES, tmp_path / f"{name}.svg")
        drawn = (tmp_path / f"{name}.svg").read_bytes()
        assert drawn == (draw_figures.IMAGES / f"{name}.svg").read_bytes(), "run python benchmarks/draw_figures.py"
