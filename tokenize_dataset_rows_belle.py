"""
python tokenize_dataset_rows_belle.py --jsonl_path data/alpaca_data.jsonl --save_path data/alpaca \\
    --max_seq_length 200 --skip_overlength

Turns rows (any file that process_belle_1M_data.py reads) into the Arrow dataset that multi_gpu_fintune_belle.py trains
on: prompt and target in the template of the model's generation, with the loss on the target and its stop token alone.
Rows longer than --max_seq_length are skipped with --skip_overlength and cut without it; a cut takes text, never
special tokens. Run again with nothing changed it keeps the dataset; killed, it goes on where it was. What cannot be
used is listed in SAVE_PATH.rejected.jsonl, and what became of the rows in SAVE_PATH/report.json and report.png. Exit
code 1 where more than half of the rows cannot be used.
"""

import argparse
import contextlib
import json
import os
import shutil
from pathlib import Path

from utils.common.script import run

from transformers import PreTrainedTokenizerBase

from utils.checkpoint.directory import add_model_flags, choose_generation
from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.errors import RowError, RunError, UsageError
from utils.common.files import check_output_path
from utils.data.arrow_writer import DatasetOrigin, check_target, complete_dataset, is_dataset, replace_dataset
from utils.data.dataset_report import REPORT_FILE, TokenReport, import_matplotlib, preview
from utils.data.encode import LOSS_ON, encode_rows, fingerprint, rows_to_train
from utils.data.raw_reader import input_paths
from utils.data.rejections import Rejections, check_share
from utils.data.row_parser import check_columns, read_rows
from utils.data.row_schema import COLUMNS_HELP, NO_RENAMES, ColumnMap
from utils.data.shards import REPORTS, PartMaker, TokenizeOptions, cache_key, make_parts, parts_directory
from utils.models.conversation import Conversation
from utils.models.templates import TEMPLATES, ChatGLMTemplate, template_for


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = (files := parser.add_argument_group("files")).add_argument
    add("--jsonl_path", nargs="+", required=True, help="files of rows, or quoted patterns")
    add("--save_path", required=True, help="directory of the dataset; an older one is replaced")
    add_model_flags(files, "whose tokenizer: a directory or hub id")
    add = parser.add_argument_group("rows").add_argument
    add("--max_seq_length", type=int, default=384, help="tokens of a whole row, at most (%(default)s)")
    add("--skip_overlength", action="store_true", help="skip longer rows (cut them)")
    add(
        "--template",
        choices=TEMPLATES,
        default="native",
        help="form of the prompts: that of the model's own chat, or the first training script's (%(default)s)",
    )
    add("--loss_on", choices=LOSS_ON, default="last", help="assistant turns that are trained on (%(default)s)")
    add("--columns", type=ColumnMap.parse, default=NO_RENAMES, help=COLUMNS_HELP)
    add("--strict", action="store_true", help="stop with exit code 1 at the first row that cannot be used (list it)")
    add = parser.add_argument_group("run").add_argument
    add("--num_proc", type=int, default=len(os.sched_getaffinity(0)), help="processes (one a core: %(default)s)")
    add("--preview", type=int, default=0, metavar="N", help="show N rows, the trained tokens marked (%(default)s)")
    args = parser.parse_args()
    choose_generation(args.model_name_or_path, args.generation)
    for name in ("max_seq_length", "num_proc"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)} must be at least 1")
    return args


def show_preview(
    tokenizer: PreTrainedTokenizerBase, template: ChatGLMTemplate, options: TokenizeOptions, paths: list[str], n: int
) -> None:
    """Prints the first rows of the files as they are trained on."""
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


def kept_report(target: Path, key: str, rejections: Rejections) -> TokenReport | None:
    """The report of the dataset at `target`, if all that decides it is as it was when it was made."""
    path = target / REPORT_FILE
    if not (is_dataset(target) and path.is_file()):
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["key"] != key or (content["rejected"] > 0) != rejections.path.is_file():
        return None
    return TokenReport.load(content)


def make_dataset(
    maker: PartMaker,
    args: argparse.Namespace,
    paths: list[str],
    origin: DatasetOrigin,
    key: str,
    rejections: Rejections,
) -> TokenReport:
    """
    Writes the dataset and its report beside `--save_path` and puts them in its place.

    Raises:
        RunError: there is no row for it.
    """
    report, arrow_files, directory = TokenReport(), [], maker.directory
    if done := len(list((directory / REPORTS).glob("*.json"))):
        print(f"going on after an interrupted run, which finished {done} part{'s' * (done > 1)}")
    try:
        for part in make_parts(maker, paths, args.num_proc, meanwhile=import_matplotlib):
            report.add(part.report)
            for rejection in part.rejections:
                rejections.add(*rejection)
            if part.arrow_file:
                arrow_files.append(part.arrow_file)
    finally:
        rejections.report()
    if not report.written:
        for line in report.lines(args.max_seq_length):
            print(line)
        shutil.rmtree(directory)
        raise RunError("no row is left to write: see the counts above, and mend the file or the length limit")
    complete_dataset(directory, arrow_files, origin, key)
    report.save(directory, args.max_seq_length, key)
    target = Path(args.save_path)
    replace_dataset(directory, target)
    (target / "lock").unlink()
    shutil.rmtree(target / REPORTS)
    return report


def main() -> None:
    args = parse_arguments()
    target = Path(args.save_path)
    paths = input_paths(args.jsonl_path)
    rejections = Rejections(args.save_path, args.strict)
    check_target(target, paths)
    check_output_path(rejections.path, paths, "--save_path")
    check_columns(args.columns, paths)
    tokenizer = load_tokenizer(args.model_name_or_path)
    template = template_for(tokenizer, args.template)
    options = TokenizeOptions(args.template, args.max_seq_length, args.skip_overlength, args.loss_on, args.columns)
    if args.preview:
        show_preview(tokenizer, template, options, paths, args.preview)
    key = cache_key(tokenizer, template, options, paths)
    report = kept_report(target, key, rejections)
    if report and not (args.strict and report.rejected):
        print(f"{target} was made from these rows in this way: it is kept")
    else:
        with parts_directory(target, key) as directory:
            maker = PartMaker(tokenizer, template, options, directory)
            origin = DatasetOrigin(
                args.template,
                fingerprint(tokenizer, template),
                args.model_name_or_path,
                args.loss_on,
                template.system_turns,
            )
            report = make_dataset(maker, args, paths, origin, key, rejections)
    for line in report.lines(args.max_seq_length):
        print(line)
    print(json.dumps(report.counts()), flush=True)
    check_share(report.rejected, report.read, f"{target} has the others")


if __name__ == "__main__":
    run(main)
