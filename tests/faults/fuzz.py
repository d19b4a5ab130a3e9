"""
python tests/faults/fuzz.py --minutes 10

Gives random input to the readers of files from outside: row readers, tokenizer (round trip, and parity with
SentencePiece), model configurations, weight indexes, DeepSpeed files. A reader must return values or raise an error
that explains the fault, never another error. The cases in tests/faults/seeds run first, and in the suite. Failing
cases are added to them, and with --keep also cases that reach new lines of utils/. The last line is JSON.
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

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from utils.checkpoint.model import Checkpoint
from utils.checkpoint.tokenizer import load_tokenizer
from utils.checkpoint.weight_files import read_index
from utils.common.errors import RowError, UsageError
from utils.data.row_parser import parse_row, read_rows
from utils.models.conversation import Conversation
from utils.models.tokenization_chatglm import ChatGLMTokenizer
from utils.training.deepspeed_config import read_deepspeed_config

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "data" / "chatglm-tiny"
CHATGLM3 = ROOT / "tests" / "golden" / "chatglm3-6b-tiny"
SEEDS = ROOT / "tests" / "faults" / "seeds"
UTILS = str(ROOT / "utils")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
SPOILED = st.binary(max_size=200) | VALUE.map(lambda value: json.dumps(value).encode())


KEYS = "instruction input output target context prompt completion messages conversations instances role from value"
ROW = st.recursive(
    TEXT | st.none() | st.sampled_from(["user", "human", "assistant", "gpt", "system", "Human: 你好 Assistant: 好"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS.split()), inner, max_size=4),
    max_leaves=10,
)
LINE = ROW.map(lambda row: json.dumps(row, ensure_ascii=False).encode())


def changes_of(file: Path) -> st.SearchStrategy[bytes]:
    """Generate the JSON object of `file` with some values replaced, or arbitrary bytes."""
    values = json.loads(file.read_text(encoding="utf-8"))
    changed = st.dictionaries(st.sampled_from(sorted(values)) | TEXT, VALUE, max_size=3)
    return SPOILED | changed.map(lambda change: json.dumps(values | change).encode())


def targets(work: Path) -> dict[str, tuple[st.SearchStrategy, Callable]]:
    """Return, for each target, the strategy of its input and the check of its result."""
    tokenizer = load_tokenizer(str(MODEL))
    pieces = SentencePieceProcessor(model_file=str(MODEL / "ice_text.model"))
    copies = {source: shutil.copytree(source, work / source.name) for source in (MODEL, CHATGLM3)}
    rows, index, deepspeed = work / "rows", work / "model.safetensors.index.json", work / "ds.json"

    def read_raw(data: bytes) -> None:
        rows.write_bytes(data)
        explained(check_rows, str(rows))

    def check_rows(path: str) -> None:
        assert all(isinstance(row, (Conversation, RowError)) for _, _, row in read_rows(path, parse_row))

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
        "rows": (st.lists(LINE, max_size=4).map(b"\n".join) | SPOILED | st.binary(max_size=2000), read_raw),
        "tokenizer": (TEXT, encode),
        "config of ChatGLM-6B": (changes_of(MODEL / "config.json"), open_config(MODEL)),
        "config of ChatGLM3-6B": (changes_of(CHATGLM3 / "config.json"), open_config(CHATGLM3)),
        "index": (changes_of(CHATGLM3 / index.name), read(read_index, index)),
        "DeepSpeed file": (changes_of(shipped), read(read_deepspeed_config, deepspeed)),
    }


def explained(reader: Callable, argument) -> None:
    """Run a reader that may raise a UsageError with messages."""
    try:
        reader(argument)
    except UsageError as error:
        assert all(error.args)


def seeds(name: str) -> list[str | bytes]:
    """Return the kept cases of a target. The file stores bytes as Latin-1 characters."""
    path = seed_file(name)
    cases = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return cases if name == "tokenizer" else [case.encode("latin-1") for case in cases]


def keep(name: str, case: str | bytes) -> None:
    """Add a case to a target's seeds."""
    cases = [*seeds(name), case]
    texts = [case if isinstance(case, str) else case.decode("latin-1") for case in cases]
    seed_file(name).write_text(json.dumps(texts, indent=0) + "\n", encoding="utf-8")


def seed_file(name: str) -> Path:
    """Return the file of a target's seeds."""
    return SEEDS / f"{name.replace(' ', '-')}.json"


def lines_of(check: Callable, case: str | bytes) -> set[tuple[str, int]]:
    """Run a check; return the lines of utils/ that it reached."""
    reached = set()

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.startswith(UTILS):
            return None
        reached.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        check(case)
    finally:
        sys.settrace(None)
    return reached


def fuzz(name: str, strategy: st.SearchStrategy, check: Callable, examples: int) -> None:
    """Run `examples` cases of a target; keep and raise a failing one, as small as hypothesis can make it."""
    failed = []

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def turn(case):
        try:
            check(case)
        except Exception:
            failed[:] = [case]
            raise

    try:
        turn()
    finally:
        for case in failed:
            keep(name, case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--examples", type=int, default=300, help="of each target in a turn (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="also add cases that reach new lines; slower")
    args = parser.parse_args()
    ends = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as directory:
        fuzzed = targets(Path(directory))
        counts = dict.fromkeys(fuzzed, 0)
        known = dict.fromkeys(fuzzed, frozenset())
        for name, (_, check) in fuzzed.items():
            for case in seeds(name):
                known[name] |= lines_of(check, case)

        def keeping(name: str, check: Callable) -> Callable:
            def run(case: str | bytes) -> None:
                new = lines_of(check, case) - known[name]
                known[name] |= new
                if new:
                    keep(name, case)

            return run

        while time.monotonic() < ends:
            for name, (strategy, check) in fuzzed.items():
                fuzz(name, strategy, keeping(name, check) if args.keep else check, args.examples)
                counts[name] += args.examples
    kept = {name: len(seeds(name)) for name in fuzzed}
    print(json.dumps({"minutes": args.minutes, "examples": counts, "seeds": kept, "failures": 0}))


if __name__ == "__main__":
    main()
