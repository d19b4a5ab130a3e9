"""
python tools/evaluate.py --input_path data/sample.heldout.json --adapter_path output

Answers held-out rows with the base model and with each adapter, compares the answers with the rows' targets, and
writes --output_dir/report.md, report.html (one file, figures in it), scores.json and answers.jsonl. Needs
pip install -r tools/requirements.txt. The last line is JSON.
"""

import argparse
import base64
import html
import io
import json
import re
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.common.script import run

from utils.checkpoint.directory import add_model_flags, choose_generation
from utils.checkpoint.model import Checkpoint
from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.errors import Faults, RowError, RunError, UsageError
from utils.common.files import atomic_writer, check_output_path
from utils.common.terminal import escape_controls
from utils.data.json_lines import dump_row
from utils.data.row_parser import check_columns, parse_row, read_rows
from utils.data.row_schema import COLUMNS_HELP, NO_RENAMES, ColumnMap
from utils.inference.arguments import adapter_names, resolve_dtype
from utils.inference.batch_generator import AnswerSettings, BatchGenerator, PromptCodec
from utils.inference.job import check_adapters, resolve_template
from utils.inference.placement import dispatch, input_device, prepare_for_decoding
from utils.inference.prompt_reader import BASE, PromptRow
from utils.layers.quantization import BITS
from utils.lora.multi_lora import add_adapters
from utils.models.conversation import Conversation
from utils.models.templates import TEMPLATES, encode_prompt

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
# What Markdown, or a program that shows it, makes markup or a link of in the middle of a line
MARKUP = re.compile(r"[\\`*_\[\]{}<>&@|~$^]|:(?=//)|(?<=/)/|\.(?=[^\W\d])")
HTML_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    add_model_flags(model)
    model.add_argument("--adapter_path", nargs="+", default=[], metavar="ADAPTER", help="adapters to compare (none)")
    model.add_argument("--any_base", action="store_true", help="take adapters that were trained on other weights")
    model.add_argument("--lora_alpha", type=int, help="of a chatglm-lora.pt, which does not record it (32)")
    model.add_argument("--quantize", choices=BITS, help="hold the weights in 8 or 4 bits")
    model.add_argument("--fp16", action="store_true", help="float16 weights: the default on a GPU")
    model.add_argument("--bf16", action="store_true", help="bfloat16 weights")
    model.add_argument("--fp32", action="store_true", help="float32 weights: the default without a GPU")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--input_path", required=True, help="rows with targets, in any form that training reads")
    rows.add_argument("--columns", type=ColumnMap.parse, default=NO_RENAMES, help=COLUMNS_HELP)
    rows.add_argument("--max_rows", type=int, default=0, help="the first so many rows (0: all)")
    rows.add_argument("--template", choices=TEMPLATES, help="form of the prompts (the adapters', else native)")
    answers = parser.add_argument_group("answers")
    answers.add_argument("--batch_size", type=int, default=0, help="rows at once (0: as many as fit)")
    answers.add_argument("--max_new_tokens", type=int, default=512, help="tokens of an answer, at most (%(default)s)")
    report = parser.add_argument_group("report")
    report.add_argument("--output_dir", default="output/evaluation", help="(%(default)s)")
    report.add_argument("--samples", type=int, default=20, help="rows shown side by side (%(default)s)")
    report.add_argument("--seed", type=int, default=0, help="of the resamples (%(default)s)")
    args = parser.parse_args()
    choose_generation(args.model_name_or_path, args.generation)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """
    Raises:
        UsageError: with every fault.
    """
    faults = Faults()
    for name, least in (("max_rows", 0), ("batch_size", 0), ("max_new_tokens", 1), ("samples", 0)):
        if getattr(args, name) < least:
            faults.add(f"--{name} {getattr(args, name)} must be at least {least}")
    names = [BASE, *adapter_names(args.adapter_path)]
    if len(set(names)) < len(names):
        faults.add(f"--adapter_path: the names {', '.join(names)} must differ: rename a directory")
    for name in OUTPUTS:
        with faults.collect():
            check_output_path(Path(args.output_dir) / name, [args.input_path], "--output_dir: its")
    faults.report()
    check_adapters(args)


def read_targets(path: str, columns: ColumnMap, most: int) -> list[Conversation]:
    """
    Raises:
        UsageError: no such file, or a row without a prompt or a target.
    """
    check_columns(columns, [path])
    found = []
    for _, number, row in read_rows(path, partial(parse_row, columns=columns)):
        if isinstance(row, RowError):
            raise UsageError(f"--input_path {path}:{number}: {row}; every row needs a prompt and a target")
        found.append(row)
        if len(found) == most:
            break
    if not found:
        raise UsageError(f"--input_path {path} has no rows")
    return found


def answer_all(args: argparse.Namespace, rows: list[Conversation]) -> dict[str, list[dict[str, Any]]]:
    """Name of base or adapter -> answers in the order of `rows`; all in one pass, side by side in the batches."""
    tokenizer = load_tokenizer(args.model_name_or_path)
    template = resolve_template(args, tokenizer)
    checkpoint = Checkpoint.open(args.model_name_or_path, quantize=args.quantize)
    model = dispatch(checkpoint, resolve_dtype(args))
    names = adapter_names(args.adapter_path)
    if names:
        add_adapters(model, dict(zip(names, args.adapter_path, strict=True)), args.lora_alpha)
    prepare_for_decoding(model)
    systems = [BASE, *names]
    requests = []
    for number, row in enumerate(rows):
        input_ids, text = encode_prompt(tokenizer, row.prompt, template), template.render(row.prompt)
        for place, name in enumerate(systems):
            requests.append(PromptRow(number * len(systems) + place, text, input_ids, None, name if names else None))
    settings = AnswerSettings(args.max_new_tokens, adapters=tuple(names))
    generator = BatchGenerator(model, PromptCodec(tokenizer, template), settings, input_device(model))
    found = {}
    for answer in generator.run(requests, args.batch_size):
        found[answer["index"]] = answer
        if len(found) % 100 == 0:
            print(f"{len(found)}/{len(requests)} answers", flush=True)
    return {
        name: [found[number * len(systems) + place] for number in range(len(rows))]
        for place, name in enumerate(systems)
    }


def check_failures(answers: dict[str, list[dict[str, Any]]]) -> None:
    """
    Raises:
        RunError: of base or an adapter, more than half of the rows have no answer.
    """
    for name, of in answers.items():
        failed = [answer["error"] for answer in of if answer["finish_reason"] == "error"]
        if 2 * len(failed) > len(of):
            raise RunError(f"{len(failed)} of {len(of)} rows have no answer of {name}, the first: {failed[0]}")


def table(scores: dict[str, dict[str, Any]]) -> list[list[str]]:
    return [["", *scores]] + [[label, *(str(of[key]) for of in scores.values())] for key, label in SHOWN.items()]


def plot(scores: dict[str, dict[str, Any]], answers: dict[str, list[dict[str, Any]]]) -> bytes:
    """Scores with their intervals, and how long answers are; a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    keys = list(SHOWN)[:7]
    width = 0.8 / len(scores)
    for place, (name, of) in enumerate(scores.items()):
        label = f" {escape_controls(name)}".replace("$", r"\$")  # "_a" would have no legend, "$a$" would be a formula
        values = [of[key].value for key in keys]
        errors = [[max(of[k].value - of[k].low, 0) for k in keys], [max(of[k].high - of[k].value, 0) for k in keys]]
        left.bar([i + place * width for i in range(len(keys))], values, width, yerr=errors, capsize=2, label=label)
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
    """`text` as Markdown that shows it in a line or a table's cell, without markup, links or pictures of its own."""
    shown = escape_controls(text.replace("\r\n", "\n"))
    return MARKUP.sub(lambda found: f"&#{ord(found[0])};", shown).replace("\n", "<br>")


def markdown(head: str, scores, samples: list[list[str]], figure_name: str) -> str:
    def rows(cells: list[list[str]]) -> str:
        lines = [f"| {' | '.join(row)} |" for row in cells]
        return "\n".join([lines[0], "|" + " --- |" * len(cells[0]), *lines[1:]])

    numbers = rows(table({plain(name): of for name, of in scores.items()}))
    texts = rows([[plain(text) for text in row] for row in samples])
    return f"# Evaluation\n\n{plain(head)}\n\n{numbers}\n\n{NOTE}\n\n![scores and lengths]({figure_name})\n\n" + (
        f"## Side by side\n\n{texts}\n" if len(samples) > 1 else ""
    )


def page(head: str, scores, samples: list[list[str]], figure: bytes) -> str:
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


def main() -> None:
    args = parse_arguments()
    from tools.scores import score_answers  # says so before a model loads where a package is missing

    check_arguments(args)
    rows = read_targets(args.input_path, args.columns, args.max_rows)
    answers = answer_all(args, rows)
    targets = [row.target for row in rows]
    scores = {name: score_answers(of, targets, args.seed) for name, of in answers.items()}
    head = f"{len(rows)} rows of {args.input_path}, {args.model_name_or_path}"
    samples = [["prompt", "target", *answers]] + [
        [answers[BASE][i]["prompt"], targets[i], *(of[i]["answer"] or "" for of in answers.values())]
        for i in range(min(args.samples, len(rows)))
    ]
    figure = plot(scores, answers)
    output = Path(args.output_dir)
    with atomic_writer(output / "report.md") as file:
        file.write(markdown(head, scores, samples, "scores.png"))
    (output / "scores.png").write_bytes(figure)
    with atomic_writer(output / "report.html") as file:
        file.write(page(head, scores, samples, figure))
    with atomic_writer(output / "answers.jsonl") as file:
        for i, target in enumerate(targets):
            file.writelines(
                dump_row({"row": i, "system": name, "target": target} | of[i]) for name, of in answers.items()
            )
    values = {name: {key: asdict(score) for key, score in of.items()} for name, of in scores.items()}
    with atomic_writer(output / "scores.json") as file:
        json.dump(values, file, indent=1)
    summary = {name: {key: round(score.value, 2) for key, score in of.items()} for name, of in scores.items()}
    print(json.dumps({"output_dir": args.output_dir, "rows": len(rows), "scores": summary}))
    check_failures(answers)


if __name__ == "__main__":
    run(main)
