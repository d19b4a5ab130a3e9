"""
python benchmarks/draw_figures.py

Draws docs/images/training.svg and inference.svg, and writes the tables of docs/benchmarks.md, all from
docs/benchmarks.json. A new measurement is entered there, with the heading of its entry in docs/log; then this script
is run. tests/test_figures.py compares the results, and the figures of both READMEs, with the JSON.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.common.script import run

from utils.common.flags import FlagParser

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "benchmarks.json"
PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "images"
FORMATS = {"mfu": ".3f", "step_ms": ".2f"}  # other floats are printed as they are, integers with commas
TEXT = "#79828d"  # readable on GitHub's white and on its dark background
WIDTH = 8.4  # inches; both figures have it, and one left edge, as no label is beside its bar
COLOURS = {"other": "#9aa4af", "bf16": "#2f81c7", "fp8": "#1a9c85"}


def cell(key: str, value) -> str:
    """Return a table's cell: a figure as the reader sees it."""
    if key == "log":
        return value.split(":")[0]  # the entry's date
    if key == "flags":
        return f"`{value}`" if value.startswith("--") else value
    if key == "command":
        return f"`{value}`"
    if isinstance(value, float):
        return format(value, FORMATS.get(key, ""))
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown(table: dict) -> str:
    """Return a table of docs/benchmarks.json as Markdown."""
    lines = [list(table["columns"]), ["---"] * len(table["columns"])]
    for row in table["rows"]:
        lines.append([cell(key, row[key]) if key in row else "" for key in table["columns"].values()])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def fill_tables(page: str, tables: dict) -> str:
    """Return the page with each table below its comment `<!-- benchmarks.json: NAME -->` written anew."""
    return re.sub(
        r"(<!-- benchmarks.json: (\S+) -->\n)(?:\|.*\n)*", lambda found: found[1] + markdown(tables[found[2]]), page
    )


def bars(axes, title: str, rows: list[tuple[str, str, int]]) -> None:
    """Draw horizontal bars of (label, colour, tokens a second), the first on top, each label above its bar."""
    values = [value for _, _, value in rows]
    drawn = axes.barh(range(len(rows)), values, color=[COLOURS[colour] for _, colour, _ in rows], height=0.42)
    axes.bar_label(drawn, [f"{value:,}" for value in values], padding=6, color=TEXT, fontsize=16, fontweight="bold")
    for place, (label, _, _) in enumerate(rows):
        axes.text(0, place - 0.29, label, color=TEXT, fontsize=16, va="bottom")
    axes.set_title(title, loc="left", color=TEXT, fontsize=17, fontweight="bold")
    axes.set_xlim(0, max(values) * 1.18)
    axes.set_ylim(len(rows) - 0.7, -0.85)
    axes.set_axis_off()


def save(figure, path: Path) -> None:
    """Write an SVG, the same bytes for the same figures."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "figures"}):
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


def draw_training(tables: dict, path: Path) -> None:
    """Draw training on one H100 beside plain transformers and PEFT."""
    from matplotlib.figure import Figure

    older = {row["what"]: row["tokens_per_second"] for row in tables["training-h100-older"]["rows"]}
    now = {row["what"]: row["tokens_per_second"] for row in tables["training-h100"]["rows"]}
    rows = [
        ("transformers + PEFT, 8 padded rows", "other", older[next(key for key in older if "plain" in key)]),
        ("here, 8 padded rows ordered by length", "bf16", older[next(key for key in older if "by length" in key)]),
        ("here, packed, bf16", "bf16", now["ChatGLM3-6B, bf16"]),
        ("here, packed, FP8", "fp8", now["ChatGLM3-6B, FP8"]),
    ]
    figure = Figure(figsize=(WIDTH, 0.62 * len(rows) + 0.5), layout="constrained")
    bars(figure.subplots(), "Training ChatGLM3-6B on one H100, tokens/s", rows)
    save(figure, path)


def draw_inference(tables: dict, path: Path) -> None:
    """Draw batch inference: on one H100 beside `generate`, on one H200 beside vLLM."""
    from matplotlib.figure import Figure

    batch = {row["what"]: row.get("tokens_per_second") for row in tables["inference-h100"]["rows"]}
    job = {row["what"]: row["tokens_per_second"] for row in tables["job-h200"]["rows"] if row["sequences"] > 64}
    best_of_peer = [row for row in tables["vllm-job-h200"]["rows"] if row["sequences"] == 1024]
    peer = {row["what"].split(", ")[-1]: row["vllm_tokens_per_second"] for row in best_of_peer}
    first = [
        ("transformers' generate", "other", batch["transformers' `generate`, ChatGLM2/3-6B"]),
        ("here, bf16", "bf16", batch["ChatGLM2/3-6B, bf16"]),
        ("here, FP8", "fp8", batch["ChatGLM2/3-6B, FP8"]),
    ]
    second = [
        ("vLLM 0.26.0 at its best, bf16", "other", peer["bf16"]),
        ("here, bf16", "bf16", job["bf16"]),
        ("vLLM 0.26.0 at its best, FP8", "other", peer["FP8"]),
        ("here, FP8", "fp8", job["FP8"]),
    ]
    figure = Figure(figsize=(WIDTH, 0.62 * len(first + second) + 1.2), layout="constrained")
    figure.get_layout_engine().set(hspace=0.08)
    top, bottom = figure.subplots(2, height_ratios=(len(first), len(second)))
    bars(top, "64 rows, 128 + 128 tokens, one H100, new tokens/s", first)
    bars(bottom, "A job of 2,000 rows on one H200, new tokens/s", second)
    save(figure, path)


def main() -> None:
    """Write both figures and the page's tables."""
    FlagParser(description=__doc__).parse_args()
    tables = json.loads(RESULTS.read_text(encoding="utf-8"))["tables"]
    IMAGES.mkdir(exist_ok=True)
    draw_training(tables, IMAGES / "training.svg")
    draw_inference(tables, IMAGES / "inference.svg")
    PAGE.write_text(fill_tables(PAGE.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    run(main)
