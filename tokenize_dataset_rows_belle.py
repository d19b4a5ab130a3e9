"""
python tokenize_dataset_rows_belle.py --jsonl_path data/alpaca_data.jsonl --save_path data/alpaca \\
    --max_seq_length 200 --skip_overlength

Tokenises rows (any file that process_belle_1M_data.py reads) into the Arrow dataset that multi_gpu_fintune_belle.py
trains on: prompt and target in the template of the model's generation, with loss only on the target and its stop
token. Rows longer than --max_seq_length are skipped with --skip_overlength and cut without it; a cut takes text, never
special tokens. Run again with nothing changed, it keeps the dataset; run again after a kill, it resumes. Rows that
cannot be used are listed in SAVE_PATH.rejected.jsonl; counts and lengths are in SAVE_PATH/report.json and report.png.
Exit code 1 if more than half of the rows cannot be used.
"""

import contextlib
import itertools
import json
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

from utils.common.script import run

from transformers import PreTrainedTokenizerBase

from utils.checkpoint.directory import DEFAULT_MODEL, GENERATION_FLAGS, GENERATION_HELP, choose_generation
from utils.checkpoint.flag_parser import DataclassFlagParser
from utils.checkpoint.template import template_of_flags
from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.console import Progress, print_facts, print_line, print_next
from utils.common.errors import RowError, RunError, UsageError
from utils.common.files import check_output_path
from utils.data.arrow_writer import DatasetOrigin, check_target, complete_dataset, is_dataset
from utils.data.dataset_report import LENGTHS_FIGURE_FILE, REPORT_FILE, TokenReport, import_matplotlib, print_preview
from utils.data.encode import LOSS_ON, encode_rows, fingerprint, rows_to_train
from utils.data.input_facts import MIB, describe_inputs, describe_size, size_of, whole_mib
from utils.data.raw_reader import input_paths
from utils.data.rejections import Rejections, check_share
from utils.data.row_parser import check_columns, read_rows
from utils.data.row_schema import COLUMNS_HELP, ColumnMap
from utils.data.shards import (
    Shard,
    ShardTokenizer,
    TokenizeOptions,
    cache_key,
    count_finished,
    discard_shards,
    make_shards,
    publish_dataset,
    shards_directory,
)
from utils.models.chat_options import HELP, Switch, chat_options
from utils.models.conversation import Conversation
from utils.models.family import generation_of
from utils.models.templates import TEMPLATES, ChatTemplate, template_for

TEMPLATE_WORDS = {
    "native": "the model's own chat",
    "alpaca": "the first training script's prompts",
    "checkpoint": "the chat_template in the checkpoint's files",
}


@dataclass(kw_only=True)
class TokenizeArguments:
    """The flags of this script."""

    _argument_groups = {
        "files": ("jsonl_path", "save_path"),
        "model": ("model_name_or_path", "generation"),
        "rows": ("max_seq_length", "skip_overlength", "template", "loss_on", "columns", "strict"),
        "chats": ("thinking", "clear_thinking", "reasoning_effort"),
        "run": ("num_proc", "preview"),
    }

    jsonl_path: list[str] = field(
        metadata={"aliases": ["--input_path"], "help": "files of rows, or quoted patterns (required)"}
    )
    save_path: str = field(
        metadata={
            "aliases": ["--output_path"],
            "help": "directory of the dataset, which replaces an older one (required)",
        }
    )
    model_name_or_path: str = field(
        default=DEFAULT_MODEL,
        metadata={"help": "directory or hub id of the model, for its tokenizer (default: %(default)s)"},
    )
    generation: Literal[*GENERATION_FLAGS] | None = field(default=None, metadata={"help": GENERATION_HELP})
    max_seq_length: int = field(default=384, metadata={"help": "most tokens a row (default: %(default)s)"})
    skip_overlength: bool = field(default=False, metadata={"help": "skip longer rows (default: cut them)"})
    template: Literal[*TEMPLATES] = field(
        default="native",
        metadata={
            "help": "form of the prompts: that of the model's own chat, the first training script's, or the "
            "chat_template in the checkpoint's files (default: %(default)s)"
        },
    )
    loss_on: Literal[*LOSS_ON] = field(
        default="last",
        metadata={
            "help": "what is trained on: what the assistant writes after the last question, or all it writes; a "
            "message's own loss comes first (default: %(default)s)"
        },
    )
    thinking: Switch | None = field(default=None, metadata={"help": HELP["thinking"]})
    clear_thinking: Switch | None = field(default=None, metadata={"help": HELP["clear_thinking"]})
    reasoning_effort: str | None = field(default=None, metadata={"help": HELP["reasoning_effort"]})
    columns: str | None = field(default=None, metadata={"help": COLUMNS_HELP})
    strict: bool = field(
        default=False, metadata={"help": "stop with exit code 1 at the first rejected row (default: list it)"}
    )
    num_proc: int = field(
        default_factory=lambda: len(os.sched_getaffinity(0)),
        metadata={"help": "processes (default: %(default)s, one a core)"},
    )
    preview: int = field(
        default=0,
        metadata={
            "metavar": "N",
            "help": "show N rows, the trained tokens marked (default: %(default)s)",
        },
    )

    def options(self) -> TokenizeOptions:
        """
        The flags that decide the tokens.

        Raises:
            UsageError: --columns has no column map.
        """
        columns = ColumnMap.parse(self.columns)
        options = tuple(sorted(chat_options(self).items()))
        return TokenizeOptions(
            self.template, self.max_seq_length, self.skip_overlength, self.loss_on, columns, options
        )


def parse_arguments() -> tuple[TokenizeArguments, TokenizeOptions]:
    """
    Parse the command line.

    Raises:
        UsageError: a value that cannot be.
    """
    usage = "%(prog)s --jsonl_path FILE --save_path DIR [--FLAG VALUE ...]"
    parser = DataclassFlagParser(TokenizeArguments, usage=usage, description=__doc__)
    args = TokenizeArguments(**vars(parser.parse_args()))
    options = args.options()
    choose_generation(args.model_name_or_path, args.generation)
    for name in ("max_seq_length", "num_proc"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)} must be at least 1")
    return args, options


def show_preview(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, options: TokenizeOptions, paths: list[str], n: int
) -> None:
    """Print the first `n` usable rows as they are trained on."""
    rows = []
    for _, _, row in read_rows(paths, options.parse):
        with contextlib.suppress(RowError):  # which the run lists
            rows += rows_to_train(row, template, options.loss_on) if isinstance(row, Conversation) else []
        if len(rows) >= n:
            break
    rows = rows[:n]
    encoded = encode_rows(tokenizer, rows, options.max_seq_length, template)
    print_preview(tokenizer, (row.example() for row in encoded if not isinstance(row, RowError)))


def load_report(target: Path, key: str, rejections: Rejections) -> TokenReport | None:
    """
    The report of the dataset at `target` if it is up to date.

    It is if it is complete and was made from what `key` hashes.
    """
    path = target / REPORT_FILE
    if not (is_dataset(target) and path.is_file()):
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["key"] != key or (content["rejected"] > 0) != rejections.path.is_file():
        return None
    return TokenReport.load(content)


def show_shards(shards: Iterator[Shard], paths: list[str], finished: int) -> Iterator[Shard]:
    """
    Yield the shards, with the progress through the raw files.

    The first `finished` shards are an earlier run's. Progress is shown once the first shard is there: by then the
    worker processes are forked, which would otherwise copy the threads and locks of a progress bar.
    """
    first = list(itertools.islice(shards, finished + 1))
    raw_bytes, rows = sum(shard.raw_bytes for shard in first), sum(shard.report.read for shard in first)
    total = whole_mib(sum(map(size_of, paths)))
    with Progress("tokenising", total, "MiB", min(raw_bytes // MIB, total)).shown() as progress:
        yield from first
        for shard in shards:
            raw_bytes, rows = raw_bytes + shard.raw_bytes, rows + shard.report.read
            progress.advance(raw_bytes // MIB - progress.done, f"{rows:,} rows")
            yield shard


def tokenize_rows(
    shard_tokenizer: ShardTokenizer, paths: list[str], num_proc: int, rejections: Rejections
) -> tuple[TokenReport, list[str]]:
    """
    Tokenise all rows into the shards directory.

    Returns:
        Counts over all rows, and the names of the Arrow files in order.

    Raises:
        RunError: no row is left; or a worker process was killed.
    """
    report, arrow_files = TokenReport(), []
    finished = count_finished(shard_tokenizer.directory)
    if finished:
        print_line(f"resuming an interrupted run: {finished} shard{'s' * (finished > 1)} finished")
    try:
        # no name for the generator: it must end with the loop, and its processes with it
        for shard in show_shards(
            make_shards(shard_tokenizer, paths, num_proc, meanwhile=import_matplotlib), paths, finished
        ):
            report.add(shard.report)
            for rejection in shard.rejections:
                rejections.add(*rejection)
            if shard.arrow_file:
                arrow_files.append(shard.arrow_file)
    finally:
        rejections.report()
    if not report.written:
        discard_shards(shard_tokenizer.directory)
        if not report.read:
            raise RunError(f"--jsonl_path {' '.join(paths)} has no rows")
        why = f"{report.rejected:,} were rejected, see {rejections.path}" if report.rejected else ""
        if report.skipped_overlength:
            limit = f"--max_seq_length {shard_tokenizer.options.max_seq_length}"
            too_long = f"{report.skipped_overlength:,} are longer than {limit}: raise it"
            why = f"{why}; {too_long}" if why else too_long
        raise RunError(f"no row is left to write of {report.read:,}: {why}")
    return report, arrow_files


def print_header(args: TokenizeArguments, paths: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print what is read, and how it becomes tokens."""
    longer, cores = "skipped" if args.skip_overlength else "cut", len(os.sched_getaffinity(0))
    facts = {
        "rows": describe_inputs(paths, ColumnMap.parse(args.columns)),
        "tokenizer": f"{args.model_name_or_path} ({generation_of(tokenizer).name})",
        "template": f"{args.template} ({TEMPLATE_WORDS[args.template]})",
        "loss on": {"last": "what answers a row's last question", "every": "every answer of a row"}[args.loss_on],
        "length": f"at most {args.max_seq_length:,} tokens; longer rows are {longer} (--max_seq_length)",
        "processes": f"{args.num_proc:,}{f', on {cores} cores' if args.num_proc > cores else ''}",
        "dataset": f"{args.save_path}{', in place of the older one' if is_dataset(Path(args.save_path)) else ''}",
    }
    print_facts(Path(__file__).name, facts)


def print_summary(args: TokenizeArguments, report: TokenReport, rejected: Path, seconds: float) -> None:
    """Print what became of the rows, where the dataset is, and how to train on it."""
    counts = report.facts(args.max_seq_length)
    target = Path(args.save_path)
    dataset = f"{target} ({describe_size(size_of(target))}); lengths in {target / LENGTHS_FIGURE_FILE}"
    listed = rejected if report.rejected else None
    print_facts(f"done in {timedelta(seconds=round(seconds))}", counts | {"dataset": dataset, "rejected": listed})
    model = [] if args.model_name_or_path == DEFAULT_MODEL else ["--model_name_or_path", args.model_name_or_path]
    command = ["python", "multi_gpu_fintune_belle.py", "--dataset_path", args.save_path]
    print_next([("train on it", shlex.join([*command, *model, "--output_dir", "output"]))])


def main() -> None:
    started = time.monotonic()
    args, options = parse_arguments()
    target = Path(args.save_path)
    paths = input_paths(args.jsonl_path)
    rejections = Rejections(args.save_path, args.strict)
    check_target(target, paths)
    check_output_path(rejections.path, paths, "--save_path")
    check_columns(options.columns, paths)
    tokenizer = load_tokenizer(args.model_name_or_path)
    template = template_of_flags(tokenizer, args.template, dict(options.chat_options))
    print_header(args, paths, tokenizer)
    if args.preview:
        show_preview(tokenizer, template, options, paths, args.preview)
    try:
        key = cache_key(tokenizer, template, options, paths)
    except RowError as error:  # of the probes that it encodes
        raise UsageError(f"--template {args.template}: {error}") from None
    report = load_report(target, key, rejections)
    if report and not (args.strict and report.rejected):
        print_line(f"{target} is kept: it was made from these rows with these options")
    else:
        with shards_directory(target, key) as directory:
            shard_tokenizer = ShardTokenizer(tokenizer, template, options, directory)
            report, arrow_files = tokenize_rows(shard_tokenizer, paths, args.num_proc, rejections)
            origin = DatasetOrigin(
                template=args.template,
                tokenizer=fingerprint(tokenizer, template_for(tokenizer, args.template)),
                model_name_or_path=args.model_name_or_path,
                loss_on=args.loss_on,
                system_turns=template.has_system_role,
            )
            complete_dataset(directory, arrow_files, origin, key)
            report.save(directory, args.max_seq_length, key)
            publish_dataset(directory, target)
    print_summary(args, report, rejections.path, time.monotonic() - started)
    print(json.dumps(report.counts()), flush=True)
    check_share(report.rejected, report.read, f"{target} has the others")


if __name__ == "__main__":
    run(main)
