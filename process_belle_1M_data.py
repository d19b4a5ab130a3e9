"""
python process_belle_1M_data.py

Turns BELLE's 1M file, data/belle_open_source_1M.train.json, into data/Belle_1M.train.json: JSON Lines of
{"input", "target"}, the columns of the 0.5M file, so that

    cat data/Belle.train.json data/Belle_1M.train.json > data/Belle_0_1.train.json

is one valid file. Rows may be instruction/input/output or input/target. Running it again replaces the output.
"""

import argparse
import json
from pathlib import Path

from utils.errors import UsageError, run
from utils.jsonl import atomic_writer, dump_row
from utils.rows import Rejections, RowError, parse_row, read_rows

DOWNLOAD = (
    "wget -P data https://huggingface.co/datasets/BelleGroup/generated_train_1M_CN/resolve/main/"
    "belle_open_source_1M.train.json"
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", default="data/belle_open_source_1M.train.json", help="default: %(default)s")
    parser.add_argument("--output", default="data/Belle_1M.train.json", help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if not Path(args.input).is_file():
        raise UsageError(f"{args.input} is not a file: download it with `{DOWNLOAD}`, or name another with --input")
    written, rejections = 0, Rejections(args.input)
    with atomic_writer(args.output) as output:
        for number, row in read_rows(args.input, parse_row):
            if isinstance(row, RowError):
                rejections.add(number, row)
            elif len(row.prompt) > 1:
                rejections.add(number, "a conversation of several turns has no input/target form")
            else:
                output.write(dump_row({"input": row.prompt[0].content, "target": row.target}))
                written += 1
        rejections.report()
        if not written:
            raise UsageError(f"{args.input} holds no usable row; {args.output} is left as it was")
    print(json.dumps({"read": written + rejections.count, "written": written, "rejected": rejections.count}))


if __name__ == "__main__":
    run(main)
