"""
python process_belle_1M_data.py

Turns raw rows into JSON Lines of {"input", "target"}, the columns of BELLE's 0.5M file; without flags BELLE's 1M file,
data/belle_open_source_1M.train.json, into data/Belle_1M.train.json, so that

    cat data/Belle.train.json data/Belle_1M.train.json > data/Belle_0_1.train.json

is one valid file. Conversations of several turns become {"messages"}. Or everything in one go:

    python process_belle_1M_data.py --input data/Belle.train.json data/belle_*.json --output data/rows.json \\
        --dedup --shuffle --seed 0 --split 0.98,0.01,0.01

Rows may have any schema that utils/data/row_parser.py knows, in JSON Lines, JSON arrays or Python dicts, gzip or not,
UTF-8 or GB18030. What cannot be read is listed in OUTPUT.rejected.jsonl. An output is replaced once the new one is
complete. Exit code 1 where more than half of the rows cannot be used.
"""

import argparse
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from utils.common.script import run

from utils.common.errors import RowError, RunError, UsageError
from utils.common.files import atomic_writer, check_output_path, scratch_directory
from utils.data.dedup import TURN_END, Deduplicator
from utils.data.json_lines import dump_pair, dump_row
from utils.data.raw_reader import input_paths
from utils.data.rejections import Rejections, check_share
from utils.data.row_parser import check_columns, parse_row, read_rows
from utils.data.row_schema import COLUMNS_HELP, NO_RENAMES, ColumnMap
from utils.data.shuffle_split import parse_split, shuffle_lines, side_of, side_paths
from utils.models.conversation import Conversation

BELLE_1M = "data/belle_open_source_1M.train.json"
DOWNLOAD = f"wget -P data https://huggingface.co/datasets/BelleGroup/generated_train_1M_CN/resolve/main/{BELLE_1M[5:]}"
LINES_AT_ONCE = 64  # in one call of write


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("files").add_argument
    add("--input", nargs="+", default=[BELLE_1M], help=f"files or quoted patterns ({BELLE_1M})")
    add("--output", default="data/Belle_1M.train.json", help="(%(default)s)")
    add("--split", help="shares such as 0.98,0.01,0.01: OUTPUT's name gets .train, .valid and .test (one file)")
    add = parser.add_argument_group("rows").add_argument
    add(
        "--dedup",
        nargs="?",
        const="near",
        choices=("exact", "near"),
        help="drop rows whose prompt came before, or (near, also without a value) a prompt almost like it (all stay)",
    )
    add("--shuffle", action="store_true", help="write the rows in a random order (their own)")
    add("--seed", type=int, default=0, help="of --shuffle (%(default)s)")
    add("--columns", type=ColumnMap.parse, default=NO_RENAMES, help=COLUMNS_HELP)
    add("--max_rows", type=int, help="rows to write at most: the first, or with --shuffle any (all)")
    add("--strict", action="store_true", help="stop with exit code 1 at the first row that cannot be used (list it)")
    args = parser.parse_args()
    if args.max_rows is not None and args.max_rows < 1:
        raise UsageError(f"--max_rows {args.max_rows} must be at least 1")
    return args


def dump_conversation(row: Conversation) -> str:
    """A row as a line of the output."""
    if len(row.messages) == 2 and not row.untrained:
        return dump_pair(row.messages[0].content, row.messages[1].content)
    messages = [message._asdict() for message in row.messages]
    for number in row.untrained:
        messages[number]["loss"] = False
    return dump_row({"messages": messages})


def prompt_of(line: str) -> str:
    """The prompt of a line that `dump_conversation` made, as `Deduplicator` takes it."""
    raw = json.loads(line)
    return raw["input"] if "input" in raw else TURN_END.join(message["content"] for message in raw["messages"][:-1])


def read_lines(paths: list[str], columns: ColumnMap, counts: Counter, rejections: Rejections) -> Iterator[str]:
    """The usable rows as lines of the output; counts what is read."""
    for path, line, row in read_rows(paths, partial(parse_row, columns=columns)):
        counts["read"] += 1
        if isinstance(row, RowError):
            rejections.add(path, line, row)
        else:
            yield dump_conversation(row)


def output_paths(args: argparse.Namespace) -> tuple[list[float], list[str]]:
    """The ends of the shares of --split, and the output of each."""
    ends = parse_split(args.split) if args.split else [1.0]
    return ends, side_paths(args.output, ends) if args.split else [args.output]


def write_lines(lines: Iterator[str], args: argparse.Namespace) -> int:
    """
    Writes the output, or one output a side, all of them at the end; returns how many rows went in.

    Raises:
        RunError: there is no row.
    """
    written = 0
    ends, paths = output_paths(args)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(atomic_writer(path)) for path in paths]
        while chunk := list(itertools.islice(lines, LINES_AT_ONCE)):
            if args.split:
                for line in chunk:
                    files[side_of(prompt_of(line), ends)].write(line)
            else:
                files[0].write("".join(chunk))
            written += len(chunk)
        if not written:
            raise RunError(f"{' '.join(args.input)}: no usable row; {' '.join(paths)} stays as it was")
    return written


def main() -> None:
    args = parse_arguments()
    if args.input == [BELLE_1M] and not Path(BELLE_1M).is_file():
        raise UsageError(f"{BELLE_1M} is not a file: download it with `{DOWNLOAD}`, or name another with --input")
    paths = input_paths(args.input)
    counts, rejections = Counter(read=0), Rejections(args.output, args.strict)
    for path in (*output_paths(args)[1], rejections.path):
        check_output_path(path, paths, "--output")
    check_columns(args.columns, paths)
    with scratch_directory(f"{args.output}.scratch") as scratch:
        lines = read_lines(paths, args.columns, counts, rejections)
        dedup = Deduplicator(scratch, prompt_of, args.dedup == "near")
        if args.dedup:
            lines = dedup(lines)
        if args.shuffle:
            lines = shuffle_lines(lines, scratch / "shuffle", args.seed)
        try:
            written = write_lines(itertools.islice(lines, args.max_rows), args)
            beyond = sum(1 for _ in lines) if args.dedup or args.shuffle else 0
        finally:
            rejections.report()
    skipped = {"duplicate": dedup.exact_dropped, "near_duplicate": dedup.near_dropped, "beyond_max_rows": beyond}
    total = sum(skipped.values())
    print(f"read {counts['read']} = written {written} + rejected {rejections.count} + skipped {total}")
    summary = {"read": counts["read"], "written": written, "rejected": rejections.count, "skipped": total}
    print(json.dumps({**summary, **{name: count for name, count in skipped.items() if count}}), flush=True)
    check_share(rejections.count, counts["read"], f"{' '.join(output_paths(args)[1])} has the others")


if __name__ == "__main__":
    run(main, after_signal="run the same command again: the outputs appear whole or not at all")
