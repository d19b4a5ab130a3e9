"""
python benchmarks/loss_curves.py --quantize fp8

Measures how far LoRA training on a quantised base departs from training in 16 bits, compared with the distance between
two seeds in 16 bits. A base in ChatGLM3's shape is trained with all its parameters from random weights on the tasks of
tools/tiny_corpus.py; then multi_gpu_fintune_belle.py teaches it a new task, from two seeds, in 16 bits and quantised
(float32 without a GPU). Prints the held-out loss of each run by step; the last line is one JSON object, differences in
nats a target token.
"""

import argparse
import json
import random
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.random_checkpoint import GLM, random_model, save_checkpoint
from tools.tiny_corpus import adapter_rows, base_row
from utils.checkpoint.tokenizer import load_tokenizer
from utils.data.collators import PaddingCollator
from utils.data.encode import encode_rows
from utils.models.conversation import Conversation, Message

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "multi_gpu_fintune_belle.py"
SEEDS = (0, 1)
FULL = "none"  # the base is not quantised
HELD_OUT = 200  # rows
WARMUP_STEPS, PEAK_LEARNING_RATE = 50, 3e-4  # of training the base


def train_base(shape: str, directory: Path, steps: int, rows: int) -> float:
    """
    Train the base and write it; return its last loss.

    Each step has `rows` new rows, drawn from seed 0.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_model(shape, device, torch.float32).train()
    save_checkpoint(shape, model, directory)
    tokenizer = load_tokenizer(str(directory))
    collate, draw = PaddingCollator(tokenizer.pad_token_id), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=device == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, (steps - step) / max(1, steps - WARMUP_STEPS))
    )
    for _ in range(steps):
        pairs = [base_row(draw) for _ in range(rows)]
        encoded = encode_rows(
            tokenizer, [Conversation((Message("user", q), Message("assistant", a))) for q, a in pairs]
        )
        batch = collate([vars(row.example()) for row in encoded])
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "labels")}
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    save_checkpoint(shape, model.half(), directory)
    return loss.item()


def run(words: str) -> None:
    """Run a script of this repository; raise if it fails."""
    subprocess.run([sys.executable, *shlex.split(words)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def tokenize(base: Path, work_dir: Path, name: str, rows: list[dict[str, str]]) -> Path:
    """Write rows and tokenise them; return the dataset's path."""
    raw, path = work_dir / f"{name}.json", work_dir / name
    raw.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    run(f"tokenize_dataset_rows_belle.py --jsonl_path {raw} --save_path {path} --model_name_or_path {base}")
    return path


def read_curves(output_dir: Path) -> dict[str, dict[int, float]]:
    """Return the losses of training and of held-out rows, by step."""
    curves: dict[str, dict[int, float]] = {"loss": {}, "eval_loss": {}}
    for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        metrics = json.loads(line)
        for name, curve in curves.items():
            if name in metrics:
                curve[metrics["step"]] = metrics[name]
    return curves


def compare(first: list[dict[int, float]], second: list[dict[int, float]]) -> dict[str, float]:
    """
    Return the mean and the greatest difference of pairs of curves.

    Only steps that both curves of a pair have are compared.
    """
    differences = [abs(a[step] - b[step]) for a, b in zip(first, second, strict=True) for step in a.keys() & b.keys()]
    return {"mean": round(mean(differences), 5), "greatest": round(max(differences), 5)}


def main() -> None:
    """Train all runs and print their differences as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=GLM, default="chatglm3-1b", help="(default: %(default)s)")
    parser.add_argument("--quantize", choices=("fp8", "int8", "int4"), default="fp8", help="(default: %(default)s)")
    parser.add_argument(
        "--base_steps", type=int, default=800, help="steps of training the base (default: %(default)s)"
    )
    parser.add_argument(
        "--base_rows", type=int, default=128, help="rows in a step of training the base (default: %(default)s)"
    )
    parser.add_argument("--rows", type=int, default=2000, help="rows of the new task (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="steps of LoRA training (default: %(default)s)")
    parser.add_argument(
        "--eval_steps", type=int, default=5, help="steps between two evaluations (default: %(default)s)"
    )
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="of LoRA training (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work_dir, started = Path(directory), time.perf_counter()
        base = work_dir / "base"
        base_loss = train_base(args.shape, base, args.base_steps, args.base_rows)
        print(
            f"base: loss {base_loss:.4f} after {args.base_steps} steps, {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        torch.cuda.empty_cache()
        rows = adapter_rows(args.rows + HELD_OUT, seed=1)
        trained = tokenize(base, work_dir, "trained", rows[HELD_OUT:])
        held_out = tokenize(base, work_dir, "held-out", rows[:HELD_OUT])
        curves = {}
        for seed in SEEDS:
            for weights in (FULL, args.quantize):
                output_dir = work_dir / f"{weights}-{seed}"
                run(
                    f"{SCRIPT} --model_name_or_path {base} --dataset_path {trained} --eval_dataset_path {held_out} "
                    f"--output_dir {output_dir} --seed {seed} --lora_rank 8 --learning_rate {args.learning_rate} "
                    f"--packing --pack_tokens 4096 --per_device_train_batch_size 1 --max_steps {args.steps} "
                    f"--logging_steps 1 --eval_strategy steps --eval_steps {args.eval_steps} --save_strategy no "
                    f"--report_to none {'--bf16' if torch.cuda.is_available() else ''} "
                    f"{'' if weights == FULL else f'--quantize {weights}'}"
                )
                curves[weights, seed] = read_curves(output_dir)
                evaluated = curves[weights, seed]["eval_loss"].items()
                print(f"{weights} {seed}: {', '.join(f'{step} {loss:.4f}' for step, loss in evaluated)}", flush=True)
    result = {
        "shape": args.shape,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "quantize": args.quantize,
        "base_loss": round(base_loss, 4),
    }
    for name in ("loss", "eval_loss"):
        full, quantized = ([curves[weights, seed][name] for seed in SEEDS] for weights in (FULL, args.quantize))
        last = {
            weights: [round(list(curve.values())[-1], 5) for curve in curves_of_seeds]
            for weights, curves_of_seeds in ((FULL, full), (args.quantize, quantized))
        }
        result[name] = {"two_seeds": compare(full[:1], full[1:]), "quantized": compare(full, quantized), "last": last}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
