"""
python tools/evaluate.py --input_path data/sample.heldout.json --adapter_path output

Answers held-out rows with the base model and with each adapter, compares the answers with the rows' targets, and
writes report.md, report.html (one file, figures included), scores.json and answers.jsonl to --output_dir. Needs
pip install -r tools/requirements.txt. The last line printed is JSON.
"""

import base64
import html
import io
import json
import re
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.common.script import run

from utils.checkpoint.model import Checkpoint
from utils.common.errors import Faults, RowError, RunError, UsageError
from utils.common.files import atomic_writer, check_output_path
from utils.common.terminal import escape_controls
from utils.data.json_lines import dump_row
from utils.data.row_parser import check_columns, parse_row, read_rows
from utils.data.row_schema import COLUMNS_HELP, ColumnMap
from utils.inference.arguments import ModelFlags, adapter_names, check_minimums, flag, parse_flags, resolve_dtype
from utils.inference.batch_generator import AnswerSettings, BatchGenerator, PromptCodec
from utils.inference.job import check_adapters, open_checkpoint, resolve_template
from utils.inference.placement import dispatch, input_device, prepare_for_decoding
from utils.inference.prompt_reader import BASE_NAME, PromptRow
from utils.lora.multi_lora import add_adapters
from utils.models.conversation import Conversation
from utils.models.templates import encode_prompt

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
OUTPUTS = ("report.md", "report.html", "scores.png", "scores.json", "answers.jsonl")
NOTE = (
    "Mean or corpus score over the rows, in brackets its 95% interval by bootstrap over rows (1000 resamples). BLEU-4 "
    "(zh) and chrF: sacrebleu, of the corpus. ROUGE: rouge_score on jieba's words, F1."
)
# Characters inside a line that Markdown, or a program that shows it, turns into markup or a link
MARKUP = re.compile(r"[\\`*_\[\]{}<>&@|~$^]|:(?=//)|(?<=/)/|\.(?=[^\W\d])")
HTML_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(kw_only=True)
class EvaluationModelFlags(ModelFlags):
    """ModelFlags of an evaluation, whose adapters are compared."""

    _argument_group_name = "model"

    adapter_path: list[str] = flag("adapters to compare with the base model", [], metavar="ADAPTER")


@dataclass(kw_only=True)
class TargetRowFlags:
    """Which rows are answered."""

    _argument_group_name = "rows"

    input_path: str = field(metadata={"help": "rows with targets, in any form that training reads (required)"})
    columns: str | None = flag(COLUMNS_HELP, metavar="ROLE=COLUMN,...")
    max_rows: int = flag("evaluate only the first rows; 0: all", 0)


@dataclass(kw_only=True)
class GreedyAnswerFlags:
    """How they are answered: greedily."""

    _argument_group_name = "answers"

    batch_size: int = flag("sequences decoded together; 0: as many as memory holds", 0)
    max_new_tokens: int = flag("most tokens of an answer", 512)


@dataclass(kw_only=True)
class ReportFlags:
    """What the report shows, and where it goes."""

    _argument_group_name = "report"

    output_dir: str = flag("directory of the report", "output/evaluation")
    samples: int = flag("rows shown side by side", 20)
    seed: int = flag("seed of the bootstrap resamples", 0)


@dataclass(kw_only=True)
class EvaluationArguments(EvaluationModelFlags, TargetRowFlags, GreedyAnswerFlags, ReportFlags):
    """All flags of this tool."""

    def collect_faults(self) -> Faults:
        """Return every mistake in the flags."""
        faults = Faults()
        check_minimums(self, faults, max_rows=0, batch_size=0, max_new_tokens=1, samples=0)
        names = [BASE_NAME, *adapter_names(self.adapter_path)]
        if len(set(names)) < len(names):
            faults.add(f"--adapter_path: the names {', '.join(names)} must differ: rename a directory")
        with faults.collect():
            ColumnMap.parse(self.columns)
        for name in OUTPUTS:
            with faults.collect():
                check_output_path(Path(self.output_dir) / name, [self.input_path], "--output_dir: its")
        return faults


def read_targets(path: str, columns: ColumnMap, max_rows: int) -> list[Conversation]:
    """
    Return the conversations of the first `max_rows` rows of a file; 0: all.

    Raises:
        UsageError: no such file, or a row without a prompt or a target.
    """
    check_columns(columns, [path])
    conversations = []
    for _, number, row in read_rows(path, partial(parse_row, columns=columns)):
        if isinstance(row, RowError):
            raise UsageError(f"--input_path {path}:{number}: {row}; every row needs a prompt and a target")
        conversations.append(row)
        if len(conversations) == max_rows:
            break
    if not conversations:
        raise UsageError(f"--input_path {path} has no rows")
    return conversations


def answer_all(
    args: EvaluationArguments, checkpoint: Checkpoint, rows: list[Conversation]
) -> dict[str, list[dict[str, Any]]]:
    """
    Answer all rows with base and adapters, together in one pass.

    Returns:
        Name of base or adapter -> its answers in the order of `rows`, as `BatchGenerator.run` yields them.
    """
    tokenizer = checkpoint.load_tokenizer()
    template = resolve_template(args, tokenizer)
    model = dispatch(checkpoint, resolve_dtype(args), quantize=args.quantize)
    names = adapter_names(args.adapter_path)
    if names:
        add_adapters(model, dict(zip(names, args.adapter_path, strict=True)), args.lora_alpha)
    prepare_for_decoding(model)
    systems = [BASE_NAME, *names]
    prompts = []
    for row in rows:
        input_ids, text = encode_prompt(tokenizer, row.prompt, template), template.render(row.prompt)
        for name in systems:
            prompts.append(PromptRow(len(prompts), text, input_ids, adapter=name if names else None))
    settings = AnswerSettings(args.max_new_tokens, adapters=tuple(names))
    answers: list[dict[str, Any]] = []
    generator = BatchGenerator(model, PromptCodec(tokenizer, template), settings, input_device(model))
    for answer in generator.run(prompts, args.batch_size):
        answers.append(answer)
        if len(answers) % 100 == 0:
            print(f"{len(answers)}/{len(prompts)} answers", flush=True)
    answers.sort(key=lambda answer: answer["index"])
    return {name: answers[i :: len(systems)] for i, name in enumerate(systems)}


def check_failures(answers: dict[str, list[dict[str, Any]]]) -> None:
    """
    Raises:
        RunError: more than half of the rows have no answer of the base or of an adapter.
    """
    for name, system_answers in answers.items():
        errors = [answer["error"] for answer in system_answers if answer["finish_reason"] == "error"]
        if 2 * len(errors) > len(system_answers):
            raise RunError(
                f"{len(errors)} of {len(system_answers)} rows have no answer of {name}, the first: {errors[0]}"
            )


def table(scores: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the cells of the table of scores: a head, then a row for each of SHOWN."""
    rows = [[label, *(str(values[key]) for values in scores.values())] for key, label in SHOWN.items()]
    return [["", *scores], *rows]


def plot(scores: dict[str, dict[str, Any]], answers: dict[str, list[dict[str, Any]]]) -> bytes:
    """Return a PNG of the scores with their intervals, and of the answers' lengths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    keys = list(SHOWN)[:7]
    width = 0.8 / len(scores)
    for index, (name, values) in enumerate(scores.items()):
        label = f" {escape_controls(name)}".replace("$", r"\$")  # "_a" would have no legend, "$a$" would be a formula
        means = [values[key] for key in keys]
        below, above = [max(s.value - s.low, 0) for s in means], [max(s.high - s.value, 0) for s in means]
        x = [i + index * width for i in range(len(keys))]
        left.bar(x, [s.value for s in means], width, yerr=[below, above], capsize=2, label=label)
        right.hist([a.get("answer_tokens", 0) for a in answers[name]], bins=30, histtype="step", label=label)
    left.set_xticks([i + 0.4 - width / 2 for i in range(len(keys))], [SHOWN[key] for key in keys], rotation=30)
    left.legend()
    right.set_xlabel("tokens an answer")
    right.set_ylabel("answers")
    right.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def plain(text: str) -> str:
    """Escape `text` so that Markdown shows it as it is, in a line or a cell."""
    shown = escape_controls(text.replace("\r\n", "\n"))
    return MARKUP.sub(lambda match: f"&#{ord(match[0])};", shown).replace("\n", "<br>")


def markdown(head: str, scores, samples: list[list[str]], figure_name: str) -> str:
    """Return report.md; `samples` are rows of cells, the first one their head."""

    def rows(cells: list[list[str]]) -> str:
        lines = [f"| {' | '.join(row)} |" for row in cells]
        return "\n".join([lines[0], "|" + " --- |" * len(cells[0]), *lines[1:]])

    numbers = rows(table({plain(name): values for name, values in scores.items()}))
    texts = rows([[plain(text) for text in row] for row in samples])
    return f"# Evaluation\n\n{plain(head)}\n\n{numbers}\n\n{NOTE}\n\n![scores and lengths]({figure_name})\n\n" + (
        f"## Side by side\n\n{texts}\n" if len(samples) > 1 else ""
    )


def page(head: str, scores, samples: list[list[str]], figure: bytes) -> str:
    """Return report.html, with the figure in it and without scripts; see `markdown`."""

    def rows(cells: list[list[str]]) -> str:
        kinds = ["th"] + ["td"] * (len(cells) - 1)
        return "\n".join(
            "<tr>" + "".join(f"<{kind}>{html.escape(escape_controls(text))}</{kind}>" for text in row) + "</tr>"
            for kind, row in zip(kinds, cells, strict=True)
        )

    style = (
        "body{font:15px sans-serif;margin:2em;max-width:1200px}table{border-collapse:collapse}img{max-width:100%}"
        "td,th{border:1px solid #ccc;padding:.3em .6em;vertical-align:top;white-space:pre-wrap;text-align:left}"
    )
    picture = base64.b64encode(figure).decode()
    return (
        f'<!doctype html><html lang="zh"><meta charset="utf-8"><title>Evaluation</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{HTML_POLICY}"><style>{style}</style>'
        f"<h1>Evaluation</h1><p>{html.escape(escape_controls(head))}</p><table>{rows(table(scores))}</table><p>{NOTE}</p>"
        f'<img alt="scores and lengths" src="data:image/png;base64,{picture}">'
        f"<h2>Side by side</h2><table>{rows(samples)}</table></html>\n"
    )


def write_report(args: EvaluationArguments, targets: list[str], answers: dict[str, list[dict]], scores: dict) -> None:
    """Write OUTPUTS; `answers` and `scores` are by the name of base or adapter."""
    head = f"{len(targets)} rows of {args.input_path}, {args.model_name_or_path}"
    samples = [["prompt", "target", *answers]]
    for i, target in enumerate(targets[: args.samples]):
        prompt, texts = answers[BASE_NAME][i]["prompt"], [each[i]["answer"] or "" for each in answers.values()]
        samples.append([prompt, target, *texts])
    figure = plot(scores, answers)
    output = Path(args.output_dir)
    with atomic_writer(output / "report.md") as file:
        file.write(markdown(head, scores, samples, "scores.png"))
    (output / "scores.png").write_bytes(figure)
    with atomic_writer(output / "report.html") as file:
        file.write(page(head, scores, samples, figure))
    with atomic_writer(output / "answers.jsonl") as file:
        for i, target in enumerate(targets):
            for name, system_answers in answers.items():
                file.write(dump_row({"row": i, "system": name, "target": target} | system_answers[i]))
    with atomic_writer(output / "scores.json") as file:
        json.dump(
            {name: {key: asdict(score) for key, score in each.items()} for name, each in scores.items()},
            file,
            indent=1,
        )


def main() -> None:
    args = parse_flags(EvaluationArguments, __doc__, "%(prog)s --input_path FILE [--FLAG VALUE ...]")
    from tools.scores import score_answers  # fails here, before a model loads, if a package is missing

    args.collect_faults().report()
    rows = read_targets(args.input_path, ColumnMap.parse(args.columns), args.max_rows)
    checkpoint = open_checkpoint(args)
    check_adapters(args, checkpoint)
    answers = answer_all(args, checkpoint, rows)
    targets = [row.target for row in rows]
    scores = {name: score_answers(each, targets, args.seed) for name, each in answers.items()}
    write_report(args, targets, answers, scores)
    summary = {name: {key: round(score.value, 2) for key, score in each.items()} for name, each in scores.items()}
    print(json.dumps({"output_dir": args.output_dir, "rows": len(rows), "scores": summary}))
    check_failures(answers)


if __name__ == "__main__":
    run(main)
