"""
The report of tools/evaluate.py: report.md, report.html, two figures, scores.json and answers.jsonl.

In: an `Evaluation`. Out: files in a directory. Rows, answers and names are other people's text: both reports show
them as they are and run none. report.html (evaluation_report.html, filled in by Jinja, which escapes) is one file that
loads nothing; a hash in its policy lets the browser run its own script (evaluation_report.js) alone.
"""

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from tools.scores import Score
from utils.common.files import atomic_writer
from utils.common.terminal import escape_controls, one_line
from utils.data.json_lines import dump_row
from utils.inference.prompt_reader import BASE_NAME
from utils.training.loss_figure import as_text, installed_fonts

SHOWN = {
    "exact_match": "exact match %",
    "bleu4": "BLEU-4",
    "chrf": "chrF",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "stopped": "stopped by itself %",
    "answer_tokens": "tokens an answer",
    "answer_characters": "characters an answer",
    "reference_characters": "characters a reference",
}
HIGHER_IS_BETTER = tuple(SHOWN)[:7]
ROWS_ON_PAGE = 5_000  # of report.html: some 10 MB, which a browser opens within a second or two
NOTE = (
    "Mean or corpus score over the rows, in brackets its 95% interval by bootstrap over rows (1000 resamples). BLEU-4 "
    "(zh) and chrF: sacrebleu, of the corpus. ROUGE: rouge_score on jieba's words, F1."
)
# Characters inside a line that Markdown, or a program that shows it, turns into markup or a link
MARKUP = re.compile(r"[\\`*_\[\]{}<>&@|~$^]|:(?=//)|(?<=/)/|\.(?=[^\W\d])")
PAGE = Path(__file__).with_suffix(".html")


@dataclass(frozen=True)
class Evaluation:
    """
    What an evaluation found.

    Args:
        facts: name -> value: what was evaluated, and when.
        details: name -> value: command, versions, machine.
        targets: of the rows.
        answers: base or adapter -> its answers in the order of `targets`, as `BatchGenerator.run` yields them.
        scores: base or adapter -> its scores by name.
    """

    facts: Mapping[str, str]
    details: Mapping[str, str]
    targets: list[str]
    answers: dict[str, list[dict[str, Any]]]
    scores: dict[str, dict[str, Score]]

    def best(self, metric: str) -> set[str]:
        """Return who has the best value of a metric; nobody if it has no best, or all are equal."""
        values = {name: round(each[metric].value, 2) for name, each in self.scores.items()}
        if metric not in HIGHER_IS_BETTER or len(set(values.values())) < 2:
            return set()
        return {name for name, value in values.items() if value == max(values.values())}

    def samples(self, count: int) -> list[list[str]]:
        """Return a head, and prompt, target and answers of the first `count` rows."""
        prompts = [answer["prompt"] for answer in self.answers[BASE_NAME][:count]]
        texts = [[each[i]["answer"] or "" for each in self.answers.values()] for i in range(len(prompts))]
        rows = [[prompt, self.targets[i], *texts[i]] for i, prompt in enumerate(prompts)]
        return [["prompt", "target", *self.answers], *rows]


def write_report(evaluation: Evaluation, output: Path, samples: int) -> None:
    """Write all files of the report; report.md shows the first `samples` rows."""
    with atomic_writer(output / "report.md") as file:
        file.write(markdown(evaluation, samples))
    (output / "scores.png").write_bytes(draw_scores(evaluation))
    (output / "lengths.png").write_bytes(draw_lengths(evaluation))
    with atomic_writer(output / "report.html") as file:
        file.write(page(evaluation))
    with atomic_writer(output / "answers.jsonl") as file:
        for i, target in enumerate(evaluation.targets):
            for name, answers in evaluation.answers.items():
                file.write(dump_row({"row": i, "system": name, "target": target} | answers[i]))
    with atomic_writer(output / "scores.json") as file:
        scores = {
            name: {key: {"value": score.value, "low": score.low, "high": score.high} for key, score in each.items()}
            for name, each in evaluation.scores.items()
        }
        json.dump(scores, file, indent=1)


def score_lines(evaluation: Evaluation) -> list[str]:
    """Return the table of scores for the console; a star marks the best."""
    width = max(map(len, SHOWN.values()))
    lines = [
        f"  {'(* the best)':<{width}}" + "".join(f"  {escape_controls(name)[:18]:>18}" for name in evaluation.scores)
    ]
    for key in HIGHER_IS_BETTER:
        best = evaluation.best(key)
        cells = [
            f"{scores[key].value:.2f}{'*' if name in best else ' '}" for name, scores in evaluation.scores.items()
        ]
        lines.append(f"  {SHOWN[key]:<{width}}" + "".join(f"  {cell:>18}" for cell in cells))
    return lines


def plain(text: str) -> str:
    """Escape `text` so that Markdown shows it as it is, in a line or a cell."""
    shown = escape_controls(text.replace("\r\n", "\n"))
    return MARKUP.sub(lambda match: f"&#{ord(match[0])};", shown).replace("\n", "<br>")


def markdown(evaluation: Evaluation, samples: int) -> str:
    """Return report.md; the best of each metric is bold."""

    def table(cells: list[list[str]]) -> str:
        lines = [f"| {' | '.join(row)} |" for row in cells]
        return "\n".join([lines[0], "|" + " --- |" * len(cells[0]), *lines[1:]])

    numbers = [["", *map(plain, evaluation.scores)]]
    for key, label in SHOWN.items():
        best = evaluation.best(key)
        cells = {name: str(scores[key]) for name, scores in evaluation.scores.items()}
        numbers.append([label, *(f"**{cell}**" if name in best else cell for name, cell in cells.items())])
    facts = {**evaluation.facts, **evaluation.details}
    command = one_line(facts.pop("command"))  # in a block it can be copied
    listed = "\n".join(f"- {name}: {plain(value)}" for name, value in facts.items())
    report = (
        f"# Evaluation\n\n{listed}\n\n```\n{command}\n```\n\n{table(numbers)}\n\n{NOTE} Bold: the best.\n\n"
        "![scores](scores.png)\n\n![lengths](lengths.png)\n"
    )
    if samples:
        texts = [[plain(text) for text in row] for row in evaluation.samples(samples)]
        report += f"\n## Side by side\n\n{table(texts)}\n"
    return report


def page(evaluation: Evaluation) -> str:
    """Return report.html."""
    script = PAGE.with_suffix(".js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(PAGE.read_text(encoding="utf-8")).render(
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        script=Markup(script),
        facts={name: escape_controls(value) for name, value in evaluation.facts.items()},
        details={name: escape_controls(value) for name, value in evaluation.details.items()},
        names=[escape_controls(name) for name in evaluation.scores],
        scores=[
            (label, [(scores[key], name in evaluation.best(key)) for name, scores in evaluation.scores.items()])
            for key, label in SHOWN.items()
        ],
        note=NOTE,
        figures=[
            (name, *(base64.b64encode(draw(evaluation, is_dark)).decode() for is_dark in (False, True)))
            for name, draw in (("scores", draw_scores), ("lengths", draw_lengths))
        ],
        shown=min(len(evaluation.targets), ROWS_ON_PAGE),
        total=len(evaluation.targets),
        rows=Markup(rows_as_json(evaluation)),
    )


def rows_as_json(evaluation: Evaluation) -> str:
    """
    Return the page's rows as JSON that cannot end a <script> element.

    A row is [prompt, target, [[answer, ROUGE-L, is the target, tokens] of each base or adapter]].
    """

    def texts(text: str) -> str:
        return escape_controls(text.replace("\r\n", "\n"))

    rows = []
    for i, target in enumerate(evaluation.targets[:ROWS_ON_PAGE]):
        cells = []
        for name, answers in evaluation.answers.items():
            scores, answer = evaluation.scores[name], answers[i]
            text = f"({answer['error']})" if answer.get("error") else answer["answer"] or ""
            is_target = scores["exact_match"].rows[i] > 0
            cells.append([texts(text), round(scores["rougeL"].rows[i], 1), is_target, answer.get("answer_tokens", 0)])
        rows.append([texts(evaluation.answers[BASE_NAME][i].get("prompt", "")), texts(target), cells])
    return json.dumps(rows, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


def draw_scores(evaluation: Evaluation, is_dark: bool = False) -> bytes:
    """Return a PNG of the scores with their intervals; a dark one has no background of its own."""
    with _style(is_dark):
        figure = _figure(4)
        axes = figure.subplots()
        width = 0.8 / len(evaluation.scores)
        for index, (name, scores) in enumerate(evaluation.scores.items()):
            shown = [scores[key] for key in HIGHER_IS_BETTER]
            below, above = [max(s.value - s.low, 0) for s in shown], [max(s.high - s.value, 0) for s in shown]
            x = [i + index * width for i in range(len(shown))]
            label = f" {as_text(name)}"  # with the blank, because "_a" would have no legend
            axes.bar(x, [s.value for s in shown], width, yerr=[below, above], capsize=2, label=label, ecolor="#888888")
        labels = [SHOWN[key].removesuffix(" %") for key in HIGHER_IS_BETTER]
        axes.set_xticks([i + 0.4 - width / 2 for i in range(len(labels))], labels, rotation=30, ha="right")
        axes.set_ylim(0, 100)
        axes.set_ylabel("%")
        axes.grid(axis="y", alpha=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper left", ncols=min(len(evaluation.scores), 4), frameon=False)
        return _as_png(figure, is_dark)


def draw_lengths(evaluation: Evaluation, is_dark: bool = False) -> bytes:
    """Return a PNG of the lengths of targets and answers: histograms with the same bins and axes."""
    lengths = {"targets": [len(target) for target in evaluation.targets]}
    for name, answers in evaluation.answers.items():
        lengths[f"answers of {as_text(name)}"] = [len(answer["answer"] or "") for answer in answers]
    bins = np.histogram_bin_edges(np.concatenate(list(lengths.values())), bins=30)
    with _style(is_dark):
        figure = _figure(0.8 + 1.1 * len(lengths))
        panels = figure.subplots(len(lengths), 1, sharex=True, sharey=True)
        for index, (axes, (name, values)) in enumerate(zip(panels, lengths.items(), strict=True)):
            axes.hist(values, bins=bins, color="#888888" if index == 0 else f"C{index - 1}")
            axes.set_title(f"{name}: median {np.median(values):,.0f}", loc="left", fontsize=10)
            axes.grid(axis="y", alpha=0.15)
            axes.spines[["top", "right"]].set_visible(False)
        panels[-1].set_xlabel("characters")
        figure.supylabel("rows", fontsize=10)
        return _as_png(figure, is_dark)


def _style(is_dark: bool):
    from matplotlib import style

    fonts = {"font.family": ["DejaVu Sans", *installed_fonts()]}
    colours = {"axes.prop_cycle": "cycler('color', ['5b9bd5', 'ed8936', '48a868', 'c75d9b', '9b7fd1', 'b8a13a'])"}
    return style.context([*(["dark_background"] if is_dark else []), fonts | colours])


def _figure(height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(6.5, height), layout="constrained")


def _as_png(figure, is_dark: bool) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, transparent=is_dark)
    return file.getvalue()
