"""
python tools/evaluate.py --input_path data/sample.heldout.json --adapter_path output

Answers held-out rows with the base model and with each adapter, compares the answers with the rows' targets, and
writes report.html (one file: scores, figures, and every row, to filter and sort), report.md, scores.json and
answers.jsonl to --output_dir. Needs pip install -r tools/requirements.txt. The last line printed is JSON.
"""

import json
import shlex
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.common.script import run

from utils.checkpoint.model import Checkpoint
from utils.common.console import Progress, print_facts, print_line, print_next
from utils.common.errors import Faults, RowError, RunError, UsageError
from utils.common.files import check_output_path
from utils.data.raw_reader import input_paths
from utils.data.row_parser import check_columns, parse_row, read_rows
from utils.data.row_schema import COLUMNS_HELP, ColumnMap
from utils.inference.arguments import ModelFlags, adapter_names, check_minimums, choose_dtype, flag, parse_flags
from utils.inference.batch_generator import AnswerSettings, BatchGenerator, PromptCodec
from utils.inference.job import check_adapters, choose_template, open_checkpoint
from utils.inference.placement import dispatch, input_device, prepare_for_decoding
from utils.inference.prompt_reader import BASE_NAME, PromptRow
from utils.lora.multi_lora import add_adapters
from utils.models.conversation import Conversation
from utils.training.run_log import describe_environment, shown_command

OUTPUTS = ("report.html", "report.md", "scores.png", "lengths.png", "scores.json", "answers.jsonl")


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
    samples: int = flag("rows shown in report.md; report.html has all", 20)
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
    check_columns(columns, input_paths([path]))
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
    args: EvaluationArguments, checkpoint: Checkpoint, codec: PromptCodec, rows: list[Conversation]
) -> dict[str, list[dict[str, Any]]]:
    """
    Answer all rows with base and adapters, together in one pass.

    Returns:
        Name of base or adapter -> its answers in the order of `rows`, as `BatchGenerator.run` yields them.
    """
    tokenizer, template = codec.tokenizer, codec.template
    model = dispatch(checkpoint, choose_dtype(args)[0], quantize=args.quantize)
    names = adapter_names(args.adapter_path)
    if names:
        add_adapters(model, dict(zip(names, args.adapter_path, strict=True)), args.lora_alpha)
    prepare_for_decoding(model)
    systems = [BASE_NAME, *names]
    prompts = []
    for row in rows:
        prompt = row._replace(messages=row.prompt)
        input_ids, text = template.encoded_prompt(tokenizer, prompt).ids(), template.render(prompt)
        for name in systems:
            adapter = name if names else None
            prompts.append(PromptRow(len(prompts), text, input_ids, adapter=adapter, tools=row.callable_tools))
    settings = AnswerSettings(args.max_new_tokens, adapters=tuple(names))
    answers: list[dict[str, Any]] = []
    generator = BatchGenerator(model, codec, settings, input_device(model))
    with Progress("answering", len(prompts), "answers").shown() as progress:
        for answer in generator.run(prompts, args.batch_size):
            answers.append(answer)
            progress.advance()
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


def facts_of(args: EvaluationArguments, checkpoint: Checkpoint, rows: int) -> dict[str, str]:
    """Return what is evaluated, for the console and the report."""
    limit = f"the first {rows:,} rows" if args.max_rows else f"{rows:,} rows"
    return {
        "model": f"{args.model_name_or_path} ({checkpoint.generation.name})",
        "adapters": ", ".join(args.adapter_path) or "none: the base alone",
        "weights": choose_dtype(args)[1],
        "rows": f"{args.input_path}: {limit}",
        "answers": f"greedy, at most {args.max_new_tokens} tokens{f', {args.quantize}' if args.quantize else ''}",
    }


def details_of_run() -> dict[str, str]:
    """Return command, versions and machine, for the report."""
    environment = describe_environment()
    versions = [f"{name} {number}" for name, number in environment["versions"].items() if number]
    return {
        "command": f"python {shown_command()}",
        "versions": ", ".join(versions),
        "commit": environment["git"]["commit"] or "unknown",
        "devices": ", ".join(environment["devices"]) or "CPU",
    }


def print_summary(args: EvaluationArguments, lines: list[str], seconds: float) -> None:
    """Print the scores, where the report lies, and commands to type next."""
    print_line()
    for line in lines:
        print_line(line.rstrip())
    output = Path(args.output_dir)
    print_facts(
        f"done in {timedelta(seconds=round(seconds))}",
        {"report": output / "report.html", "as Markdown": output / "report.md", "answers": output / "answers.jsonl"},
    )
    if args.adapter_path:
        flags = shlex.join(["--model_name_or_path", args.model_name_or_path, "--adapter_path", args.adapter_path[-1]])
        print_next([("talk to it", f"python tools/chat.py {flags}")])


def main() -> None:
    args = parse_flags(EvaluationArguments, __doc__, "%(prog)s --input_path FILE [--FLAG VALUE ...]")
    # fail here, before a model loads, if a package is missing
    from tools.evaluation_report import Evaluation, score_lines, write_report
    from tools.scores import score_answers

    args.collect_faults().report()
    began, started = time.monotonic(), datetime.now().astimezone()
    rows = read_targets(args.input_path, ColumnMap.parse(args.columns), args.max_rows)
    checkpoint = open_checkpoint(args)
    check_adapters(args, checkpoint)
    tokenizer = checkpoint.load_tokenizer()
    template, why = choose_template(args, tokenizer)
    facts = facts_of(args, checkpoint, len(rows)) | {"template": f"{template.name} ({why})"}
    print_facts("evaluate.py", facts)
    facts["date"] = started.isoformat(sep=" ", timespec="minutes")
    answers = answer_all(args, checkpoint, PromptCodec(tokenizer, template), rows)
    print_line("scoring")
    targets = [row.target for row in rows]
    scores = {name: score_answers(each, targets, args.seed) for name, each in answers.items()}
    evaluation = Evaluation(facts, details_of_run(), targets, answers, scores)
    write_report(evaluation, Path(args.output_dir), args.samples)
    print_summary(args, score_lines(evaluation), time.monotonic() - began)
    summary = {name: {key: round(score.value, 2) for key, score in each.items()} for name, each in scores.items()}
    print(json.dumps({"output_dir": args.output_dir, "rows": len(rows), "scores": summary}))
    check_failures(answers)


if __name__ == "__main__":
    run(main, "nothing was written; run the same command again")
