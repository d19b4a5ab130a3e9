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
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from utils.common.script import run

from transformers import PreTrainedTokenizerBase

from utils.checkpoint.directory import DEFAULT_MODEL, GENERATION_FLAGS, GENERATION_HELP, choose_generation
from utils.checkpoint.flag_parser import DataclassFlagParser
from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.errors import RowError, RunError, UsageError
from utils.common.files import check_output_path
from utils.data.arrow_writer import DatasetOrigin, check_target, complete_dataset, is_dataset
from utils.data.dataset_report import REPORT_FILE, TokenReport, import_matplotlib, preview
from utils.data.encode import LOSS_ON, encode_rows, fingerprint, rows_to_train
from utils.data.raw_reader import input_paths
from utils.data.rejections import Rejections, check_share
from utils.data.row_parser import check_columns, read_rows
from utils.data.row_schema import COLUMNS_HELP, ColumnMap
from utils.data.shards import (
    ShardTokenizer,
    TokenizeOptions,
    cache_key,
    count_finished,
    discard_shards,
    make_shards,
    publish_dataset,
    shards_directory,
)
from utils.models.conversation import Conversation
from utils.models.templates import TEMPLATES, ChatTemplate, template_for


@dataclass(kw_only=True)
class TokenizeArguments:
    """The flags of this script."""

    _argument_groups = {
        "files": ("jsonl_path", "save_path"),
        "model": ("model_name_or_path", "generation"),
        "rows": ("max_seq_length", "skip_overlength", "template", "loss_on", "columns", "strict"),
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
            "help": "form of the prompts: that of the model's own chat, or the first training script's "
            "(default: %(default)s)"
        },
    )
    loss_on: Literal[*LOSS_ON] = field(
        default="last", metadata={"help": "assistant turns that are trained on (default: %(default)s)"}
    )
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
        return TokenizeOptions(self.template, self.max_seq_length, self.skip_overlength, self.loss_on, columns)


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
    encoded = encode_rows(tokenizer, rows, options.max_seq_length, template, options.loss_on)
    for line in preview(tokenizer, (row.example() for row in encoded if not isinstance(row, RowError))):
        print(line)


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
    if finished := count_finished(shard_tokenizer.directory):
        print(f"resuming an interrupted run: {finished} shard{'s' * (finished > 1)} finished")
    try:
        for shard in make_shards(shard_tokenizer, paths, num_proc, meanwhile=import_matplotlib):
            report.add(shard.report)
            for rejection in shard.rejections:
                rejections.add(*rejection)
            if shard.arrow_file:
                arrow_files.append(shard.arrow_file)
    finally:
        rejections.report()
    if not report.written:
        for line in report.lines(shard_tokenizer.options.max_seq_length):
            print(line)
        discard_shards(shard_tokenizer.directory)
        raise RunError("no row is left to write: see the counts above, and fix the file or raise --max_seq_length")
    return report, arrow_files


def main() -> None:
    args, options = parse_arguments()
    target = Path(args.save_path)
    paths = input_paths(args.jsonl_path)
    rejections = Rejections(args.save_path, args.strict)
    check_target(target, paths)
    check_output_path(rejections.path, paths, "--save_path")
    check_columns(options.columns, paths)
    tokenizer = load_tokenizer(args.model_name_or_path)
    template = template_for(tokenizer, args.template)
    if args.preview:
        show_preview(tokenizer, template, options, paths, args.preview)
    key = cache_key(tokenizer, template, options, paths)
    report = load_report(target, key, rejections)
    if report and not (args.strict and report.rejected):
        print(f"{target} is kept: it was made from these rows with these options")
    else:
        with shards_directory(target, key) as directory:
            shard_tokenizer = ShardTokenizer(tokenizer, template, options, directory)
            report, arrow_files = tokenize_rows(shard_tokenizer, paths, args.num_proc, rejections)
            origin = DatasetOrigin(
                template=args.template,
                tokenizer=fingerprint(tokenizer, template),
                model_name_or_path=args.model_name_or_path,
                loss_on=args.loss_on,
                system_turns=template.has_system_role,
            )
            complete_dataset(directory, arrow_files, origin, key)
            report.save(directory, args.max_seq_length, key)
            publish_dataset(directory, target)
    for line in report.lines(args.max_seq_length):
        print(line)
    print(json.dumps(report.counts()), flush=True)
    check_share(report.rejected, report.read, f"{target} has the others")


if __name__ == "__main__":
    run(main)
