"""
python tools/demo.py

Runs the whole pipeline on the embedded checkpoint, with the commands that a user types: process, tokenise, LoRA
training with ZeRO-3 on two processes, batch inference with and without the adapter. Prints exact match on held-out
prompts before and after.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.common.script import run

from utils.common.errors import RunError, UsageError
from utils.common.flags import FlagParser

ROOT = Path(__file__).resolve().parent.parent
MODEL = "data/chatglm-tiny"
HELD_OUT = "data/sample.heldout.json"
DEFAULT_DIR = ROOT / "data" / "demo"
MARK = ".demo"  # a file that marks a directory as the demo's own, which it may empty


def commands(work: str, port: int | None) -> dict[str, str]:
    """Return the commands by name; `port` is torchrun's, None its default."""
    work = shlex.quote(work)
    listen = f" --master_port {port}" if port else ""
    answer = (
        f"python chatglm_milti_gpu_inference.py --model_name_or_path {MODEL} "
        f"--input_path {HELD_OUT} --batch_size 32 --max_new_tokens 64"
    )
    return {
        "process": f"python process_belle_1M_data.py --input data/sample.train.json --output {work}/train.json",
        "tokenize": f"python tokenize_dataset_rows_belle.py --jsonl_path {work}/train.json --save_path {work}/tokens "
        f"--max_seq_length 200 --skip_overlength --model_name_or_path {MODEL}",
        "answers before": f"{answer} --output_path {work}/before.jsonl",
        "train": f"torchrun --nproc_per_node=2{listen} multi_gpu_fintune_belle.py --dataset_path {work}/tokens "
        f"--lora_rank 8 --per_device_train_batch_size 16 --num_train_epochs 8 --learning_rate 6e-3 --save_steps 1000 "
        f"--save_total_limit 2 --logging_steps 20 --fp16 --output_dir {work}/adapter "
        f"--deepspeed ds_config_zero3.json --model_name_or_path {MODEL}",
        "answers after": f"{answer} --adapter_path {work}/adapter --output_path {work}/after.jsonl",
    }


def exact_match(answers_path: Path) -> float:
    """Return the share of held-out rows answered exactly, after the tokenizer's NFKC."""
    targets = [json.loads(line)["output"] for line in (ROOT / HELD_OUT).read_bytes().splitlines()]
    answers = [json.loads(line)["answer"] for line in answers_path.read_bytes().splitlines()]
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


def main() -> None:
    parser = FlagParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=DEFAULT_DIR, help="emptied first (default: %(default)s)")
    parser.add_argument("--master_port", type=int, help="torchrun's port, if another run uses the default")
    args = parser.parse_args()
    work = args.work_dir.resolve()
    empty_directory(work)
    seconds = {}
    for name, command in commands(str(work), args.master_port).items():
        print(f"\n$ {command}", flush=True)
        started = time.perf_counter()
        if subprocess.run(shlex.split(command), cwd=ROOT).returncode:
            raise RunError(f"the step '{name}' failed")
        seconds[name] = time.perf_counter() - started
    before, after = exact_match(work / "before.jsonl"), exact_match(work / "after.jsonl")
    print("\nstep              seconds")
    for name, value in seconds.items():
        print(f"{name:16} {value:8.1f}")
    print(f"\nexact match on {HELD_OUT}\n  before {before:7.1%}\n  after  {after:7.1%}\n")
    summary = {"exact_match_before": before, "exact_match_after": after, "seconds": round(sum(seconds.values()), 1)}
    print(json.dumps(summary))


if __name__ == "__main__":
    run(main)
