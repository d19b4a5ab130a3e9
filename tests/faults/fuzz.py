"""
python tests/faults/fuzz.py --minutes 10

Random input to what reads files from outside: row readers, tokenizer (round trip, and parity with SentencePiece),
model configurations, weight indexes, DeepSpeed files. Whatever comes in, a reader gives values or the error that
explains, never another. Cases that failed stay in tests/faults/seeds and run first. The last line is JSON.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from utils.chatglm.tokenization_chatglm import ChatGLMTokenizer
from utils.checkpoint import Checkpoint, load_tokenizer
from utils.deepspeed_config import read_deepspeed_config
from utils.errors import RowError, UsageError
from utils.rows import Row, parse_row, read_rows
from utils.weight_files import read_index

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from sentencepiece import SentencePieceProcessor

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "data" / "chatglm-tiny"
CHATGLM3 = ROOT / "tests" / "golden" / "chatglm3-6b-tiny"
SEEDS = ROOT / "tests" / "faults" / "seeds"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
SPOILED = st.binary(max_size=200) | VALUE.map(lambda value: json.dumps(value).encode())


def changes_of(file: Path) -> st.SearchStrategy[bytes]:
    """A JSON object with some values replaced, as text, or anything else."""
    values = json.loads(file.read_text(encoding="utf-8"))
    changed = st.dictionaries(st.sampled_from(sorted(values)) | TEXT, VALUE, max_size=3)
    return SPOILED | changed.map(lambda change: json.dumps(values | change).encode())


def targets(work: Path) -> dict[str, tuple[st.SearchStrategy, Callable]]:
    """What is fuzzed: what goes in, and what must hold."""
    tokenizer = load_tokenizer(str(MODEL))
    pieces = SentencePieceProcessor(model_file=str(MODEL / "ice_text.model"))
    copies = {source: shutil.copytree(source, work / source.name) for source in (MODEL, CHATGLM3)}
    rows, index, deepspeed = work / "rows", work / "model.safetensors.index.json", work / "ds.json"

    def read_raw(data: bytes) -> None:
        rows.write_bytes(data)
        assert all(isinstance(row, (Row, RowError)) for _, _, row in read_rows(str(rows), parse_row))

    def encode(text: str) -> None:
        assert isinstance(tokenizer, ChatGLMTokenizer)
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == tokenizer.encode_texts([text])[0].tolist()
        again = tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False, split_special_tokens=True)
        assert tokenizer.decode(again) == tokenizer.decode(ids)
        if not any(mark in text for mark in "\n\t< ") and text:
            assert [i - tokenizer.num_image_tokens for i in ids] == pieces.encode(text)

    def open_config(source: Path) -> Callable[[bytes], None]:
        def check(data: bytes) -> None:
            (copies[source] / "config.json").write_bytes(data)
            explained(Checkpoint.open, str(copies[source]))

        return check

    def read(reader: Callable, file: Path) -> Callable[[bytes], None]:
        def check(data: bytes) -> None:
            file.write_bytes(data)
            explained(reader, file)

        return check

    shipped = ROOT / "ds_config_zero3.json"
    return {
        "rows": (SPOILED | st.binary(max_size=2000), read_raw),
        "tokenizer": (TEXT, encode),
        "config of ChatGLM-6B": (changes_of(MODEL / "config.json"), open_config(MODEL)),
        "config of ChatGLM3-6B": (changes_of(CHATGLM3 / "config.json"), open_config(CHATGLM3)),
        "index": (changes_of(CHATGLM3 / index.name), read(read_index, index)),
        "DeepSpeed file": (changes_of(shipped), read(read_deepspeed_config, deepspeed)),
    }


def explained(reader: Callable, argument) -> None:
    """Runs a reader that may refuse, in words."""
    try:
        reader(argument)
    except UsageError as error:
        assert all(error.args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--examples", type=int, default=300, help="of each target in a turn (%(default)s)")
    args = parser.parse_args()
    ends = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as directory:
        found = targets(Path(directory))
        counts = dict.fromkeys(found, 0)
        while True:
            for name, (strategy, check) in found.items():
                fuzz(name, strategy, check, args.examples)
                counts[name] += args.examples
            if time.monotonic() > ends:
                break
    print(json.dumps({"minutes": args.minutes, "examples": counts, "failures": 0}))


def fuzz(name: str, strategy: st.SearchStrategy, check: Callable, examples: int) -> None:
    """One turn of one target; a failing case is kept and raised."""

    @settings(
        max_examples=examples,
        deadline=None,
        database=DirectoryBasedExampleDatabase(SEEDS / name.replace(" ", "-")),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def turn(value):
        check(value)

    turn()


if __name__ == "__main__":
    main()
