"""
python tokenize_dataset_rows_belle.py --jsonl_path data/alpaca_data.jsonl --save_path data/alpaca \\
    --max_seq_length 200 --skip_overlength

Turns rows (JSON Lines or a JSON array) into the Arrow dataset that multi_gpu_fintune_belle.py trains on: prompt and
target in the template of the model's generation, with the loss on the target and its stop token alone. Rows longer
than --max_seq_length are skipped with --skip_overlength and cut without it; a cut takes text, never special tokens.
A row may have the columns instruction/input/output, input/target, context/target or prompt/completion, or be a chat
in messages.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator

from utils.checkpoint import DEFAULT_MODEL, load_tokenizer
from utils.errors import run
from utils.prompts import TEMPLATES, ChatGLMTemplate, Example, encode_example, fingerprint, template_for
from utils.rejections import Rejections
from utils.rows import RowError, parse_row, read_rows
from utils.token_dataset import Origin, save_examples

from transformers import PreTrainedTokenizerBase


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jsonl_path", required=True, help="rows to tokenise")
    parser.add_argument("--save_path", required=True, help="directory of the dataset; an older one is replaced")
    parser.add_argument("--max_seq_length", type=int, default=384, help="tokens of a whole row (default: %(default)s)")
    parser.add_argument("--skip_overlength", action="store_true", help="skip longer rows rather than cut them")
    parser.add_argument(
        "--model_name_or_path", default=DEFAULT_MODEL, help="whose tokenizer: a directory or hub id (%(default)s)"
    )
    parser.add_argument(
        "--template",
        choices=TEMPLATES,
        default="native",
        help="prompts as the model's own chat has them (native), or not",
    )
    return parser.parse_args()


def tokenize_rows(
    args: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatGLMTemplate,
    counts: Counter,
    rejections: Rejections,
) -> Iterator[Example]:
    """Yields the examples to write, and counts what became of every row."""
    for path, number, row in read_rows(args.jsonl_path, parse_row):
        counts["read"] += 1
        if isinstance(row, RowError):
            rejections.add(path, number, row)
            continue
        try:
            example = encode_example(tokenizer, row, args.max_seq_length, template)
        except RowError as error:
            rejections.add(path, number, f"--max_seq_length: {error}")
            continue
        if example.tokens_cut and args.skip_overlength:
            counts["skipped_overlength"] += 1
            continue
        counts["cut"] += bool(example.tokens_cut)
        counts["tokens"] += len(example.input_ids)
        counts["trained_tokens"] += sum(label >= 0 for label in example.labels)
        counts["written"] += 1
        yield example


def main() -> None:
    args = parse_arguments()
    tokenizer = load_tokenizer(args.model_name_or_path)
    template = template_for(tokenizer, args.template)
    rejections = Rejections(args.save_path)
    counts = Counter(dict.fromkeys(("read", "written", "skipped_overlength", "cut", "tokens", "trained_tokens"), 0))
    try:
        examples = tokenize_rows(args, tokenizer, template, counts, rejections)
        origin = Origin(args.template, fingerprint(tokenizer, template), args.model_name_or_path)
        save_examples(examples, args.save_path, origin)
    finally:
        rejections.report()
        if counts["read"]:
            print(json.dumps({**counts, "rejected": rejections.count}))


if __name__ == "__main__":
    run(main)
