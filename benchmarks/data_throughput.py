"""
python benchmarks/data_throughput.py

Measures how fast rows are processed and tokenised, next to reference loops, in one run on one machine:

- process_belle_1M_data.py, the whole command, next to a bare loop that parses and writes each line with json;
- tokenize_dataset_rows_belle.py, the whole command on all cores, next to SentencePiece's own batch encode of the same
  texts with as many threads, and next to one Python tokenizer call a field, as in the first BELLE script.

Rows are synthetic (--rows, 200 tokens each on average). The machine's speed drifts, so a command and its reference
loops take turns of half a second, which two loops share: the command is stopped while a loop runs, and a loop repeats
the rows for as long as the command lasts. A command's seconds are those of its turns, from start to end; a loop's
exclude imports and, for the encoders, parsing the texts. Writes that the disk still has to finish run during the turns
of the others. Peak memory is the sum over a command's processes (proportional set size, sampled at the end of each
turn). The last line is one JSON object.
"""

import argparse
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.tiny_corpus import sentence

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "data" / "chatglm-tiny"
TURN = 0.5  # seconds

# Each line of stdin is a turn of that many seconds, in which the loop's `steps` run and its texts are counted.
TURNS = """
import itertools, json, sys, time
from time import perf_counter
def take_turns(steps):
    print("ready", flush=True)
    for line in sys.stdin:
        count = seconds = 0
        while seconds < float(line):
            step_count, step_seconds = next(steps)
            count, seconds = count + step_count, seconds + step_seconds
        print(count, seconds, flush=True)
def chunks(path, size):
    while True:
        with open(path, encoding="utf-8") as rows:
            while lines := list(itertools.islice(rows, size)):
                texts = []
                for row in map(json.loads, lines):
                    texts.append(f"{row['instruction']}\\n{row['input']}" if row["input"] else row["instruction"])
                    texts.append(row["output"])
                yield texts
"""
BARE_LOOP = (
    TURNS
    + """
def steps(path, copy):
    while True:
        with open(path, encoding="utf-8") as rows, open(copy, "w", encoding="utf-8") as output:
            while True:
                count, started = 0, perf_counter()
                for line in itertools.islice(rows, 4096):
                    output.write(json.dumps(json.loads(line), ensure_ascii=False) + "\\n")
                    count += 1
                if not count:
                    break
                yield count, perf_counter() - started
take_turns(steps(*sys.argv[1:]))
"""
)
SENTENCEPIECE = (
    TURNS
    + """
import sentencepiece
def steps(path, model_file, threads):
    model = sentencepiece.SentencePieceProcessor(model_file=model_file)
    for texts in chunks(path, 4096):
        started = perf_counter()
        model.encode(texts, num_threads=int(threads))
        yield len(texts), perf_counter() - started
take_turns(steps(*sys.argv[1:]))
"""
)
ORIGINAL = (
    TURNS
    + """
sys.path.insert(0, sys.argv[2])
from utils.models.tokenization_chatglm import ChatGLMTokenizer
def steps(path, model):
    tokenizer = ChatGLMTokenizer.from_pretrained(model)
    for texts in chunks(path, 64):
        started = perf_counter()
        for prompt, target in zip(texts[::2], texts[1::2]):
            tokenizer.encode(prompt) + tokenizer.encode(target, add_special_tokens=False) + [tokenizer.eos_token_id]
        yield len(texts), perf_counter() - started
take_turns(steps(sys.argv[1], sys.argv[3]))
"""
)


def write_rows(path: Path, rows: int, seed: int) -> None:
    """Write instruction rows like real ones: several lines, runs of blanks, tabs, digits, Latin, rare letters."""
    draw = random.Random(seed)
    phrases = [sentence(draw).text for _ in range(20000)]
    phrases += ["".join(chr(draw.randrange(0x4E00, 0x9FA6)) for _ in range(4)) for _ in range(1000)]
    phrases += [f"{draw.choice(['GPT-4', 'Python 3.11', 'BELLE', 'x = '])}{draw.random():.3f}" for _ in range(1000)]
    ends = ["，", "。", "！", "\n", "\n\n", "  ", "\t", "；", "？\n1. "]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            size = draw.randrange(6, 32)
            phrase, end = draw.choices(phrases, k=size), draw.choices(ends, k=size)
            texts = [text for pair in zip(phrase, end, strict=True) for text in pair]
            cut = 2 * (1 + size // 4)
            row = {"instruction": "".join(texts[:cut]), "input": "", "output": "".join(texts[cut:])}
            if draw.random() < 0.3:
                row["input"] = draw.choice(phrases)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


class Loop:
    """A reference loop that runs in turns; its texts or rows and its seconds."""

    def __init__(self, code: str, *arguments: object):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.count, self.seconds = 0, 0.0
        self._answer()

    def take_turn(self, seconds: float) -> None:
        """Let the loop run for `seconds`."""
        print(seconds, file=self.process.stdin, flush=True)
        count, taken = self._answer().split()
        self.count += int(count)
        self.seconds += float(taken)

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            sys.exit("a loop failed")
        return line

    @property
    def rate(self) -> float:
        """Texts or rows a second."""
        return self.count / self.seconds

    def end(self) -> None:
        """Kill the loop's process."""
        self.process.kill()
        self.process.wait()


class Command:
    """A script of this repository that runs in turns; its seconds, and its peak memory in bytes."""

    def __init__(self, *arguments: object):
        self.arguments = [sys.executable, *map(str, arguments)]
        self.seconds, self.peak = 0.0, 0

    def run_beside(self, *loops: Loop) -> None:
        """Run the command to its end, with a turn of each loop before each of its own; then end the loops."""
        for loop in loops:
            loop.take_turn(TURN / len(loops))
        started = time.perf_counter()
        process = subprocess.Popen(self.arguments, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
        ended = select.poll()
        ended.register(os.pidfd_open(process.pid), select.POLLIN)
        try:
            while not ended.poll(TURN * 1000):
                os.killpg(process.pid, signal.SIGSTOP)
                self.seconds += time.perf_counter() - started
                self.peak = max(self.peak, sum(map(memory, family(process.pid))))
                for loop in loops:
                    loop.take_turn(TURN / len(loops))
                started = time.perf_counter()
                os.killpg(process.pid, signal.SIGCONT)
            self.seconds += time.perf_counter() - started
        finally:
            for loop in loops:
                loop.end()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if process.wait():
            sys.exit(f"{' '.join(self.arguments)} failed")


def family(process_id: int) -> list[int]:
    """Ids of a process and its descendants."""
    process_ids = [process_id]
    try:
        for task in Path(f"/proc/{process_id}/task").iterdir():
            for child in (task / "children").read_text().split():
                process_ids += family(int(child))
    except OSError:  # it has ended
        return process_ids
    return process_ids


def memory(process_id: int) -> int:
    """Proportional set size in bytes; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


def measure(rows: int, processes: int, directory: Path) -> dict[str, float]:
    """Run both commands on `rows` rows in `directory`; return rates in rows or texts a second, and MiB."""
    raw, processed, tokens = directory / "raw.json", directory / "rows.json", directory / "tokens"
    write_rows(raw, rows, seed=0)
    print(f"{rows} rows, {raw.stat().st_size / 2**20:.0f} MiB; {processes} processes or threads", flush=True)
    os.sync()
    parse = Loop(BARE_LOOP, raw, directory / "copy.json")
    process = Command("process_belle_1M_data.py", "--input", raw, "--output", processed)
    process.run_beside(parse)
    (directory / "copy.json").unlink()
    os.sync()
    encoder = Loop(SENTENCEPIECE, raw, MODEL / "ice_text.model", processes)
    original = Loop(ORIGINAL, raw, ROOT, MODEL)
    tokenize = Command(
        "tokenize_dataset_rows_belle.py", "--jsonl_path", raw, "--save_path", tokens, "--num_proc", processes,
        "--max_seq_length", 512, "--model_name_or_path", MODEL,
    )  # fmt: skip
    tokenize.run_beside(encoder, original)
    report = json.loads((tokens / "report.json").read_text(encoding="utf-8"))
    process_rate, tokenize_rate = rows / process.seconds, 2 * rows / tokenize.seconds
    return {
        "rows": rows,
        "processes": processes,
        "tokens_per_row": round(report["tokens"] / report["written"], 1),
        "parse_rows_per_s": round(parse.rate),
        "process_rows_per_s": round(process_rate),
        "sentencepiece_texts_per_s": round(encoder.rate),
        "tokenize_texts_per_s": round(tokenize_rate),
        "original_texts_per_s": round(original.rate),
        "process_vs_parse": round(process_rate / parse.rate, 3),
        "tokenize_vs_sentencepiece": round(tokenize_rate / encoder.rate, 3),
        "tokenize_vs_original": round(tokenize_rate / original.rate, 2),
        "process_peak_mib": round(process.peak / 2**20),
        "peak_mib": round(max(process.peak, tokenize.peak) / 2**20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows to write and process (default: %(default)s)")
    parser.add_argument(
        "--num_proc",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes (default: %(default)s, one a core)",
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the default would leave a stopped command
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(measure(args.rows, args.num_proc, Path(directory))))


if __name__ == "__main__":
    main()
