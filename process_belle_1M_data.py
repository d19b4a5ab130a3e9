"""
python process_belle_1M_data.py

Converts raw rows to JSON Lines of {"input", "target"}, the columns of BELLE's 0.5M file. Without flags it converts
BELLE's 1M file, data/belle_open_source_1M.train.json, to data/Belle_1M.train.json, so that

    cat data/Belle.train.json data/Belle_1M.train.json > data/Belle_0_1.train.json

is one valid file. Conversations of several turns become {"messages"}, with their tools in {"tools"}. All steps in one
command:

    python process_belle_1M_data.py --input data/Belle.train.json data/belle_*.json --output data/rows.json \\
        --dedup --shuffle --seed 0 --split 0.98,0.01,0.01

Rows may have any schema that utils/data/row_schema.py knows, in JSON Lines, JSON arrays or Python dicts, gzip or not,
UTF-8 or GB18030. Rows that cannot be used are listed in OUTPUT.rejected.jsonl. An output is replaced once the new one
is complete. Exit code 1 if more than half of the rows cannot be used.
"""

import contextlib
import itertools
import json
import shlex
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

from utils.common.script import run

from utils.common.console import Progress, print_facts, print_next
from utils.common.errors import RowError, RunError, UsageError
from utils.common.files import atomic_writer, check_output_path, scratch_directory
from utils.common.flags import FlagParser
from utils.common.numbers import counted
from utils.data.conversation_rows import dump_conversation, prompt_of
from utils.data.dedup import Deduplicator, hash_text
from utils.data.input_facts import MIB, describe_inputs, describe_size, size_of, whole_mib
from utils.data.raw_reader import input_paths, read_blocks
from utils.data.rejections import Rejections, check_share
from utils.data.row_parser import check_columns, parse_row, rows_in_block
from utils.data.row_schema import COLUMNS_HELP, NO_RENAMES, ColumnMap
from utils.data.shuffle_split import parse_split, shuffle_lines, split_of, split_paths
from utils.models.conversation import Conversation

BELLE_1M = "data/belle_open_source_1M.train.json"
DOWNLOAD = f"wget -P data https://huggingface.co/datasets/BelleGroup/generated_train_1M_CN/resolve/main/{BELLE_1M[5:]}"
LINES_PER_WRITE = 64  # fewer calls of write; more gains nothing
LINES_PER_PROGRESS = 4096  # some milliseconds


def parse_arguments() -> Namespace:
    """
    Parse the command line.

    Raises:
        UsageError: a value that cannot be.
    """
    # Not DataclassFlagParser: importing transformers would take longer than many runs.
    parser = FlagParser(description=__doc__)
    add = parser.add_argument_group("files").add_argument
    add(
        "--input",
        "--input_path",
        nargs="+",
        default=[BELLE_1M],
        help=f"files or quoted patterns (default: {BELLE_1M})",
    )
    add("--output", "--output_path", default="data/Belle_1M.train.json", help="output file (default: %(default)s)")
    add(
        "--split",
        help="write 2 or 3 files by shares such as 0.98,0.01,0.01, OUTPUT's name with .train, .valid and .test "
        "(default: one file)",
    )
    add = parser.add_argument_group("rows").add_argument
    add(
        "--dedup",
        nargs="?",
        const="near",
        choices=("exact", "near"),
        help="drop rows whose prompt came before; near, also meant by --dedup alone: or a prompt almost like it "
        "(default: keep all rows)",
    )
    add("--shuffle", action="store_true", help="write the rows in a random order (default: in input order)")
    add("--seed", type=int, default=0, help="seed of --shuffle (default: %(default)s)")
    add("--columns", type=ColumnMap.parse, default=NO_RENAMES, help=COLUMNS_HELP)
    add("--max_rows", type=int, help="write at most this many rows, with --shuffle a random sample (default: all)")
    add("--strict", action="store_true", help="stop with exit code 1 at the first rejected row (default: list it)")
    args = parser.parse_args()
    if args.max_rows is not None and args.max_rows < 1:
        raise UsageError(f"--max_rows {args.max_rows} must be at least 1")
    return args


def read_conversations(
    paths: list[str], columns: ColumnMap, counts: Counter, rejections: Rejections
) -> Iterator[Conversation]:
    """
    Yield the usable rows.

    The number of rows read goes to `counts`, the others to `rejections`.
    """
    parse, bytes_read = partial(parse_row, columns=columns), 0
    with Progress("reading", whole_mib(sum(map(size_of, paths))), "MiB").shown() as progress:
        for block in itertools.chain.from_iterable(map(read_blocks, paths)):
            for path, line, row in rows_in_block(block, parse):
                counts["read"] += 1
                if isinstance(row, RowError):
                    rejections.add(path, line, row)
                else:
                    yield row
            bytes_read += block.raw_bytes
            progress.advance(bytes_read // MIB - progress.done, f"{counts['read']:,} rows")


def show_writing(lines: Iterator[str]) -> Iterator[str]:
    """Yield the lines, with progress from the first on, which comes once all rows are read."""
    first = list(itertools.islice(lines, 1))
    with Progress("writing", None, "rows").shown() as progress:
        while batch := first + list(itertools.islice(lines, LINES_PER_PROGRESS)):
            yield from batch
            progress.advance(len(batch))
            first = []


def write_lines(lines: Iterator[str], paths: Sequence[str], counts: Mapping[str, int]) -> list[int]:
    """
    Write the outputs, which appear together at the end.

    Args:
        lines: of several outputs each begins with one digit, the index of its path.
        paths: one output, or one for each split.
        counts: how many rows were "read", for the message.

    Returns:
        Number of lines written to each output.

    Raises:
        RunError: there is no line; the outputs stay as they were.
    """
    written = [0] * len(paths)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(atomic_writer(path)) for path in paths]
        while batch := list(itertools.islice(lines, LINES_PER_WRITE)):
            if len(files) > 1:
                for line in batch:
                    split = int(line[0])
                    files[split].write(line[1:])
                    written[split] += 1
            else:
                files[0].write("".join(batch))
                written[0] += len(batch)
        if not any(written):
            why = f"none of its {counts['read']:,} rows can be used" if counts["read"] else "it has no rows"
            raise RunError(f"--input: {why}; nothing is written to {' and '.join(paths)}")
    return written


def print_header(args: Namespace, inputs: list[str], outputs: list[str]) -> None:
    """Print what is read and what is done with it."""
    dedup = {"exact": "equal prompts", "near": "equal prompts and those almost alike"}.get(args.dedup)
    facts = {
        "rows": describe_inputs(inputs, args.columns),
        "dedup": dedup and f"of {dedup} the first is kept",
        "order": f"random (--seed {args.seed})" if args.shuffle else None,
        "most rows": args.max_rows and f"{args.max_rows:,}",
        "output": "\n".join(outputs),
    }
    print_facts(Path(__file__).name, facts)


def print_summary(summary: Mapping[str, int], outputs: Mapping[str, int], rejected: Path, seconds: float) -> None:
    """Print what became of the rows, where they are, and how to tokenise them; `outputs` counts rows by file."""
    reasons = ", ".join(
        f"{summary[name]:,} {words}"
        for name, words in (
            ("duplicate", "duplicates"),
            ("near_duplicate", "near-duplicates"),
            ("beyond_max_rows", "beyond --max_rows"),
        )
        if name in summary
    )
    counts = {name: f"{summary[name]:,}" for name in ("read", "written", "rejected", "skipped")}
    facts = {
        "rows": "read {read} = written {written} + rejected {rejected} + skipped {skipped}".format(**counts)
        + (f" ({reasons})" if reasons else ""),
        "output": "\n".join(
            f"{path} ({counted(count, 'row')}, {describe_size(size_of(path))})" for path, count in outputs.items()
        ),
        "rejected": rejected if summary["rejected"] else None,
    }
    print_facts(f"done in {timedelta(seconds=round(seconds))}", facts)
    rows = Path(next(iter(outputs)))
    command = ["python", "tokenize_dataset_rows_belle.py", "--jsonl_path", str(rows)]
    print_next([("tokenise them", shlex.join([*command, "--save_path", str(rows.with_suffix(".tokens"))]))])


def main() -> None:
    started = time.monotonic()
    args = parse_arguments()
    if args.input == [BELLE_1M] and not Path(BELLE_1M).is_file():
        raise UsageError(f"{BELLE_1M} is not a file: download it with `{DOWNLOAD}`, or name another with --input")
    inputs = input_paths(args.input)
    bounds = parse_split(args.split) if args.split else []
    outputs = split_paths(args.output, len(bounds)) if args.split else [args.output]
    counts, rejections = Counter(read=0), Rejections(args.output, args.strict)
    for path in (*outputs, rejections.path):
        check_output_path(path, inputs, "--output")
    check_columns(args.columns, inputs)
    print_header(args, inputs, outputs)
    with scratch_directory(f"{args.output}.scratch") as scratch:
        conversations = read_conversations(inputs, args.columns, counts, rejections)
        dedup = Deduplicator(scratch, args.dedup == "near")
        if args.dedup:
            hashed = dedup((dump_conversation(row), prompt_of(row)) for row in conversations)
        elif args.split:
            hashed = ((dump_conversation(row), hash_text(prompt_of(row))) for row in conversations)
        if args.split:  # a digit in front takes the split through the shuffle's files
            lines = (f"{split_of(prompt_hash, bounds)}{line}" for line, prompt_hash in hashed)
        elif args.dedup:
            lines = (line for line, _ in hashed)
        else:
            lines = map(dump_conversation, conversations)
        if args.shuffle:
            lines = shuffle_lines(lines, scratch / "shuffle", args.seed)
        if args.dedup or args.shuffle:
            lines = show_writing(lines)
        try:
            written = write_lines(itertools.islice(lines, args.max_rows), outputs, counts)
            beyond = sum(1 for _ in lines) if args.dedup or args.shuffle else 0
        finally:
            conversations.close()  # rows beyond --max_rows were not read
            rejections.report()
    skipped = {"duplicate": dedup.exact_dropped, "near_duplicate": dedup.near_dropped, "beyond_max_rows": beyond}
    summary = {"read": counts["read"], "written": sum(written), "rejected": rejections.count}
    summary |= {"skipped": sum(skipped.values()), **{name: count for name, count in skipped.items() if count}}
    by_output = dict(zip(outputs, written, strict=True))
    print_summary(summary, by_output, rejections.path, time.monotonic() - started)
    print(json.dumps(summary), flush=True)
    check_share(rejections.count, counts["read"], f"{' '.join(outputs)} has the others")


if __name__ == "__main__":
    run(main, after_signal="run the same command again: the outputs appear whole or not at all")
