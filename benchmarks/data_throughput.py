"""
python benchmarks/data_throughput.py

How fast rows are processed and tokenised, beside what bounds them, in one run on one machine:

- process_belle_1M_data.py, the whole command, beside a bare loop that parses and writes each line with json;
- tokenize_dataset_rows_belle.py, the whole command on all cores, beside SentencePiece's own batch encode of the same
  texts with as many threads, and beside one Python tokenizer call a field, as the first BELLE script did.

Rows are synthesised (--rows, 200 tokens each in the mean). Rates of a command count everything from its start to its
end; those of a loop leave out imports and, for the encoders, reading the texts. Peak memory is the sum over a
command's processes (proportional set size, sampled twice a second). The last line is one JSON object.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.tiny_corpus import sentence

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "data" / "chatglm-tiny"
ORIGINAL_ROWS = 4000  # a sample: one call a field is slow

BARE_LOOP = """
import json, sys, time
started = time.perf_counter()
with open(sys.argv[1], encoding="utf-8") as rows, open(sys.argv[2], "w", encoding="utf-8") as output:
    for line in rows:
        output.write(json.dumps(json.loads(line), ensure_ascii=False) + "\\n")
print(time.perf_counter() - started)
"""
TEXTS = """
import itertools, json, sys, time
def texts(path, rows):
    for line in itertools.islice(open(path, encoding="utf-8"), rows):
        row = json.loads(line)
        yield f"{row['instruction']}\\n{row['input']}" if row["input"] else row["instruction"]
        yield row["output"]
"""
SENTENCEPIECE = (
    TEXTS
    + """
import sentencepiece
model = sentencepiece.SentencePieceProcessor(model_file=sys.argv[2])
source, seconds = texts(sys.argv[1], None), 0.0
while chunk := list(itertools.islice(source, 8192)):
    started = time.perf_counter()
    model.encode(chunk, num_threads=int(sys.argv[3]))
    seconds += time.perf_counter() - started
print(seconds)
"""
)
ORIGINAL = (
    TEXTS
    + """
sys.path.insert(0, sys.argv[2])
from utils.chatglm.tokenization_chatglm import ChatGLMTokenizer
tokenizer = ChatGLMTokenizer.from_pretrained(sys.argv[3])
sample = list(texts(sys.argv[1], int(sys.argv[4])))
started = time.perf_counter()
for prompt, target in zip(sample[::2], sample[1::2]):
    tokenizer.encode(prompt) + tokenizer.encode(target, add_special_tokens=False) + [tokenizer.eos_token_id]
print(time.perf_counter() - started)
"""
)


def write_rows(path: Path, rows: int, seed: int) -> None:
    """Instruction rows with what real ones have: several lines, runs of blanks, tabs, digits, Latin, rare letters."""
    draw = random.Random(seed)
    phrases = [sentence(draw).text for _ in range(20000)]
    phrases += ["".join(chr(draw.randrange(0x4E00, 0x9FA6)) for _ in range(4)) for _ in range(1000)]
    phrases += [f"{draw.choice(['GPT-4', 'Python 3.11', 'BELLE', 'x = '])}{draw.random():.3f}" for _ in range(1000)]
    ends = ["，", "。", "！", "\n", "\n\n", "  ", "\t", "；", "？\n1. "]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            size = draw.randrange(6, 32)
            phrase, end = draw.choices(phrases, k=size), draw.choices(ends, k=size)
            parts = [part for pair in zip(phrase, end, strict=True) for part in pair]
            cut = 2 * (1 + size // 4)
            row = {"instruction": "".join(parts[:cut]), "input": "", "output": "".join(parts[cut:])}
            if draw.random() < 0.3:
                row["input"] = draw.choice(phrases)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def run_loop(code: str, *arguments: object) -> float:
    """Seconds that a loop says it took."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


class MemoryWatch(threading.Thread):
    """The largest sum, in bytes, of the memory of a process and its descendants while it runs."""

    def __init__(self, process: subprocess.Popen):
        super().__init__(daemon=True)
        self.process = process
        self.peak = 0
        self.start()

    def run(self) -> None:
        while self.process.poll() is None:
            self.peak = max(self.peak, sum(map(self._memory, self._family(self.process.pid))))
            time.sleep(0.5)

    def _family(self, process_id: int) -> list[int]:
        family = [process_id]
        try:
            for task in Path(f"/proc/{process_id}/task").iterdir():
                for child in (task / "children").read_text().split():
                    family += self._family(int(child))
        except OSError:  # it has ended
            return family
        return family

    @staticmethod
    def _memory(process_id: int) -> int:
        try:
            lines = Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            return 0
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


def run_command(*arguments: object) -> tuple[float, int]:
    """Seconds that a script of this repository took, and its peak memory in bytes."""
    started = time.perf_counter()
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    watch = MemoryWatch(process)
    if process.wait():
        sys.exit(f"{' '.join(command)} failed")
    seconds = time.perf_counter() - started
    watch.join()
    return seconds, watch.peak


def measure(rows: int, processes: int, directory: Path) -> dict[str, float]:
    raw, processed, tokens = directory / "raw.json", directory / "rows.json", directory / "tokens"
    write_rows(raw, rows, seed=0)
    print(f"{rows} rows, {raw.stat().st_size / 2**20:.0f} MiB; {processes} processes or threads", flush=True)
    script = ("process_belle_1M_data.py", "--input", raw, "--output", processed)
    parse_seconds, process_seconds, process_peak = [], [], 0
    for _ in range(2):  # in turn, and the better of each counts: other work on the machine comes and goes
        parse_seconds.append(run_loop(BARE_LOOP, raw, directory / "copy.json"))
        seconds, process_peak = run_command(*script)
        process_seconds.append(seconds)
    (directory / "copy.json").unlink()
    encoder_seconds = [run_loop(SENTENCEPIECE, raw, MODEL / "ice_text.model", processes)]
    tokenize_seconds, tokenize_peak = run_command(
        "tokenize_dataset_rows_belle.py", "--jsonl_path", raw, "--save_path", tokens, "--num_proc", processes,
        "--max_seq_length", 512, "--model_name_or_path", MODEL,
    )  # fmt: skip
    encoder_seconds.append(run_loop(SENTENCEPIECE, raw, MODEL / "ice_text.model", processes))
    sample = min(rows, ORIGINAL_ROWS)
    original_seconds = run_loop(ORIGINAL, raw, ROOT, MODEL, sample)
    report = json.loads((tokens / "report.json").read_text(encoding="utf-8"))
    rates = {
        "parse_rows_per_s": rows / min(parse_seconds),
        "process_rows_per_s": rows / min(process_seconds),
        "sentencepiece_texts_per_s": 2 * rows / min(encoder_seconds),
        "tokenize_texts_per_s": 2 * rows / tokenize_seconds,
        "original_texts_per_s": 2 * sample / original_seconds,
    }
    return {
        "rows": rows,
        "processes": processes,
        "tokens_per_row": round(report["tokens"] / report["written"], 1),
        **{name: round(rate) for name, rate in rates.items()},
        "process_vs_parse": round(rates["process_rows_per_s"] / rates["parse_rows_per_s"], 3),
        "tokenize_vs_sentencepiece": round(rates["tokenize_texts_per_s"] / rates["sentencepiece_texts_per_s"], 3),
        "tokenize_vs_original": round(rates["tokenize_texts_per_s"] / rates["original_texts_per_s"], 2),
        "process_peak_mib": round(process_peak / 2**20),
        "peak_mib": round(max(process_peak, tokenize_peak) / 2**20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000, help="default: %(default)s")
    parser.add_argument("--num_proc", type=int, default=len(os.sched_getaffinity(0)), help="all cores: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(measure(args.rows, args.num_proc, Path(directory))))


if __name__ == "__main__":
    main()
