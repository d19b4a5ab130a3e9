"""
python tools/demo.py

Teaches the embedded checkpoint a task that it does not know, with the commands that a user types: process, tokenise,
answer, LoRA training with ZeRO-3 on two processes, answer again. Shows each command with its result, and exact match
on held-out prompts before and after. What the commands print is in demo.log beside their files; the last line is JSON.
"""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.common.script import run

from utils.common.console import (
    BOLD,
    DIM,
    WIDTH,
    Progress,
    command_lines,
    is_terminal,
    print_facts,
    print_line,
    print_next,
)
from utils.common.errors import RunError, UsageError
from utils.common.flags import FlagParser
from utils.data.input_facts import describe_size, size_of

ROOT = Path(__file__).resolve().parent.parent
MODEL = "data/chatglm-tiny"
HELD_OUT = "data/sample.heldout.json"
DEFAULT_DIR = ROOT / "data" / "demo"
MARK = ".demo"  # a file that marks a directory as the demo's own, which it may empty
LOG = "demo.log"
SHOWN_ON_FAILURE = 40  # lines of the log
SECONDS_BETWEEN_LOOKS = 0.5  # at how far a command is
OWN_ROWS = "python process_belle_1M_data.py --input YOUR_ROWS.json"


@dataclass(frozen=True)
class Step:
    """A command of the pipeline, and its result in words from the JSON object that it ends with."""

    name: str
    command: str
    result: str


def steps(work: str, port: int | None) -> list[Step]:
    """Return the steps; `port` is torchrun's, None its default."""
    work = shlex.quote(work)
    listen = f" --master_port {port}" if port else ""
    answer = (
        f"python chatglm_milti_gpu_inference.py --model_name_or_path {MODEL} "
        f"--input_path {HELD_OUT} --batch_size 32 --max_new_tokens 64"
    )
    answered = "{rows} held-out prompts answered, {new_tokens_per_second:,.0f} tokens a second"
    return [
        Step(
            "process",
            f"python process_belle_1M_data.py --input data/sample.train.json --output {work}/train.json",
            "{read} rows read, {written} written as prompt and target",
        ),
        Step(
            "tokenise",
            f"python tokenize_dataset_rows_belle.py --jsonl_path {work}/train.json --save_path {work}/tokens "
            f"--max_seq_length 200 --skip_overlength --model_name_or_path {MODEL}",
            "{written} rows, {tokens:,} tokens, {trained_tokens:,} of them trained on",
        ),
        Step("answer before training", f"{answer} --output_path {work}/before.jsonl", answered),
        Step(
            "train",
            f"torchrun --nproc_per_node=2{listen} multi_gpu_fintune_belle.py --dataset_path {work}/tokens "
            "--lora_rank 8 --per_device_train_batch_size 16 --num_train_epochs 8 --learning_rate 6e-3 "
            f"--save_steps 1000 --save_total_limit 2 --logging_steps 5 --fp16 --output_dir {work}/adapter "
            f"--deepspeed ds_config_zero3.json --model_name_or_path {MODEL}",
            "{steps} steps on 2 processes, mean loss {train_loss:.2f}",
        ),
        Step(
            "answer with the adapter",
            f"{answer} --adapter_path {work}/adapter --output_path {work}/after.jsonl",
            answered,
        ),
    ]


def run_step(step: Step, log: Path, while_it_runs: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """
    Run a command, its output appended to `log`; return the JSON object on its last line.

    `while_it_runs` is called every SECONDS_BETWEEN_LOOKS.

    Raises:
        RunError: it failed; the end of its output is on stderr.
    """
    with log.open("a+", encoding="utf-8", errors="replace") as file:
        file.write(f"$ {step.command}\n")
        file.flush()
        start = file.tell()
        output = {"stdout": file, "stderr": subprocess.STDOUT}
        with subprocess.Popen(shlex.split(step.command), cwd=ROOT, **output) as process:
            try:
                while process.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(SECONDS_BETWEEN_LOOKS)
                    while_it_runs()
            except BaseException:
                process.kill()
                raise
        file.seek(start)
        lines = file.read().splitlines()
    if process.returncode:
        print("\n".join(lines[-SHOWN_ON_FAILURE:]), file=sys.stderr)
        raise RunError(f"the step '{step.name}' failed: all that it printed is in {log}")
    return json.loads(next(line for line in reversed(lines) if line.startswith("{")))


def training_state(adapter: Path) -> str:
    """Return the step and the loss that a training run has logged last; nothing before its first."""
    try:
        *_, last = (adapter / "metrics.jsonl").read_bytes().splitlines()
        values = json.loads(last)
        return f"train: step {values['step']}, loss {values['loss']:.2f}"
    except (OSError, ValueError, KeyError, TypeError):  # no line yet, the summary of the run, a loss of null
        return ""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def exact_match(answers_path: Path) -> float:
    """Return the share of held-out rows answered exactly, after the tokenizer's NFKC."""
    targets = [row["output"] for row in read_rows(ROOT / HELD_OUT)]
    answers = [row["answer"] for row in read_rows(answers_path)]
    pairs = zip(answers, targets, strict=True)
    same = sum(unicodedata.normalize("NFKC", a) == unicodedata.normalize("NFKC", t) for a, t in pairs)
    return same / len(targets)


def empty_directory(directory: Path) -> None:
    """
    Make `directory`, or empties it if it is the demo's own.

    Raises:
        UsageError: it holds other files, or cannot be made.
    """
    try:
        if directory.is_dir():
            may_empty = directory == DEFAULT_DIR or (directory / MARK).is_file() or not any(directory.iterdir())
            if not may_empty:
                raise UsageError(f"--work_dir {directory} holds other files: name a directory that is empty or new")
            shutil.rmtree(directory)
        directory.mkdir(parents=True)
        (directory / MARK).touch()
    except OSError as error:
        raise UsageError(f"--work_dir {directory} cannot be made: {error.strerror}") from None


def print_result(work: Path, before: float, after: float, seconds: float) -> None:
    """Print how the answers changed, where everything is, and what to do next."""
    rows = read_rows(ROOT / HELD_OUT)
    first = rows[0]
    answers = [read_rows(work / name)[0]["answer"] for name in ("before.jsonl", "after.jsonl")]
    print_line()
    example = {
        "prompt": f"{first['instruction']}\n{first['input']}",
        "target": first["output"],
        "before": answers[0].replace("\n", " "),
        "after": answers[1].replace("\n", " "),
    }
    print_facts("a held-out row", example)
    print_line()
    print_line(f"exact match on the {len(rows)} rows of {HELD_OUT}", BOLD)
    print_line(f"  before  {before:6.1%}")
    print_line(f"  after   {after:6.1%}", BOLD)
    print_line()
    adapter = shown(work / "adapter")
    weights = describe_size(size_of(work / "adapter" / "adapter_model.safetensors"))
    places = {"adapter": f"{adapter} ({weights} of weights)", "log": shown(work / LOG)}
    print_facts(f"done in {timedelta(seconds=round(seconds))}", places)
    if Path(sys.prefix) == ROOT / ".venv" and "VIRTUAL_ENV" not in os.environ:
        print_next([("use the environment that `make demo` installed", "source .venv/bin/activate")])
    model = f"--model_name_or_path {MODEL} --adapter_path {shlex.quote(adapter)}"
    print_next(
        [
            ("talk to it", f"python tools/chat.py {model}"),
            ("type a sentence there, below the task", f"{first['instruction']}\\\n  {rows[1]['input']}"),
            ("teach it rows of your own, with the commands above", f"{OWN_ROWS} --output data/rows.json"),
        ]
    )


def shown(path: Path) -> str:
    """Return a path as a user would type it in the repository."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def main() -> None:
    parser = FlagParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=DEFAULT_DIR, help="emptied first (default: %(default)s)")
    parser.add_argument("--master_port", type=int, help="torchrun's port, if another run uses the default")
    args = parser.parse_args()
    work = args.work_dir.resolve()
    empty_directory(work)
    began = time.monotonic()
    size = describe_size(size_of(ROOT / MODEL / "model.safetensors"))
    print_line(f"A tiny ChatGLM-6B ({size}) learns to turn sentences into diary entries, on this machine alone", BOLD)
    pipeline = steps(shown(work), args.master_port)

    def show_state() -> None:
        state = training_state(work / "adapter") if step.name == "train" else ""
        if is_terminal() and state:
            progress.advance(0, state)

    with Progress("demo", len(pipeline), "steps done").shown() as progress:
        for number, step in enumerate(pipeline, start=1):
            print_line()
            print_line(f"{number}. {step.name}", BOLD)
            for line in command_lines(f"$ {step.command}", WIDTH - 3):
                print_line(f"   {line}", DIM)
            if is_terminal():
                progress.advance(int(number > 1), step.name)
            started = time.monotonic()
            result = step.result.format(**run_step(step, work / LOG, show_state))
            taken = f"{time.monotonic() - started:.1f} s"
            print_line(f"   {result} {taken:>{WIDTH - 4 - len(result)}}")
    seconds = time.monotonic() - began
    before, after = exact_match(work / "before.jsonl"), exact_match(work / "after.jsonl")
    print_result(work, before, after, seconds)
    print(json.dumps({"exact_match_before": before, "exact_match_after": after, "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    run(main, after_signal="run the same command again")
