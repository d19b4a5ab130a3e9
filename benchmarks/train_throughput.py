"""
python benchmarks/train_throughput.py --shape chatglm3-6b
python benchmarks/train_throughput.py --shape chatglm3-6b --work_dir W --memory_fraction 0.3 -- --quantize int4

Measures real tokens a second of multi_gpu_fintune_belle.py, with random weights of a real model's shape, and beside it
those of plain transformers and PEFT (rows in a random order, padded, gradient checkpointing; bfloat16 on a GPU, else
float32). Flags after -- go to the training script, after the default ones; the whole command is printed.

Rows have exp(N(log 150, 0.75)) tokens, from 20 to 1024, and are trained on from the 40th, unless --jsonl_path or
--dataset_path gives others. Speeds exclude the first step. A run that does not fit in memory reports "oom". The last
line is one JSON object.
"""

import argparse
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
import torch
from peft import LoraConfig, get_peft_model

from tools.random_checkpoint import SHAPES, generation_of_shape, random_model, write_checkpoint
from utils.data.collators import PaddingCollator
from utils.training.optimize import decoder_blocks
from utils.training.throughput import Throughput

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "multi_gpu_fintune_belle.py"
FLAGS = "--per_device_train_batch_size 1 --lora_rank 8 --logging_steps 5 --save_strategy no --report_to none --packing"
GPU_FLAGS = "--bf16 --pack_tokens 16384 --num_train_epochs 1"
CPU_FLAGS = "--pack_tokens 1024 --max_steps 4"
OUT_OF_MEMORY = "out of memory"


def in_own_process(call: Callable, *arguments: Any) -> Any:
    """
    Return the result of a call in a process of its own.

    Nothing of it then stays on a GPU.
    """
    if not torch.cuda.is_available():
        return call(*arguments)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


# No special token: the embedding of the padding is zero, and where it opens a row its gradient overflows.
RANDOM_IDS = range(300, 900)


def checkpoint_of(shape: str, work_dir: Path, device: str) -> Path:
    """
    Return a checkpoint with random weights in `work_dir`.

    It is written if it does not exist.
    """
    path = work_dir / shape
    if not path.is_dir():
        unfinished = work_dir / f"{shape}.partial"
        shutil.rmtree(unfinished, ignore_errors=True)
        in_own_process(write_checkpoint, shape, unfinished, device)
        unfinished.rename(path)
    return path


def random_rows(checkpoint: Path, count: int, seed: int) -> datasets.Dataset:
    """
    Return rows of random tokens.

    Those of ChatGLM-6B have `[gMASK] <sop>` before the target.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    ending = [config[name] for name in ("gmask_token_id", "bos_token_id") if "gmask_token_id" in config]
    draw = random.Random(seed)
    rows = {"input_ids": [], "labels": []}
    for _ in range(count):
        length = min(max(round(math.exp(draw.gauss(math.log(150), 0.75))), 20), 1024)
        start = min(40, length // 2)
        ids = draw.choices(RANDOM_IDS, k=length)
        ids[start - len(ending) : start] = ending
        rows["input_ids"].append(ids)
        rows["labels"].append([-100] * start + ids[start:])
    features = datasets.Features({name: datasets.Sequence(datasets.Value("int32")) for name in rows})
    return datasets.Dataset.from_dict(rows, features=features)


def dataset_of(args: argparse.Namespace, checkpoint: Path, work_dir: Path) -> Path:
    """
    Return the path of the dataset.

    It is --dataset_path, the tokenised --jsonl_path, or random rows.
    """
    if args.dataset_path:
        return args.dataset_path
    path = work_dir / f"{args.shape}-rows"
    shutil.rmtree(path, ignore_errors=True)
    if args.jsonl_path:
        command = ["tokenize_dataset_rows_belle.py", "--jsonl_path", *args.jsonl_path, "--max_seq_length", "1024"]
        command += ["--save_path", str(path.resolve()), "--model_name_or_path", str(checkpoint.resolve())]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    else:
        random_rows(checkpoint, args.rows, args.seed).save_to_disk(str(path))
    return path


def run_script(checkpoint: Path, rows: Path, work_dir: Path, processes: int, flags: list[str]) -> str | None:
    """
    Return what the training script prints; None if memory runs out.

    Any other failure ends the benchmark with the script's output.
    """
    output_dir, compiled = work_dir / "output", work_dir / "compiled"
    for path in (output_dir, compiled):  # each run compiles its layers: --plan would do it for the run after it
        shutil.rmtree(path, ignore_errors=True)
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    paths = {"model_name_or_path": checkpoint, "dataset_path": rows, "output_dir": output_dir}
    command = [sys.executable, *(torchrun if processes > 1 else []), SCRIPT, *flags]
    command += [word for name, path in paths.items() for word in (f"--{name}", str(path.resolve()))]
    print(shlex.join(command), flush=True)
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(compiled.resolve())}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    output = run.stdout + run.stderr
    if run.returncode == 0:
        shown = ("memory", "warning", "weights", "packs", "rows", "measured", "the run takes")
        print("\n".join(line for line in run.stdout.splitlines() if line.startswith(shown)), flush=True)
        return run.stdout
    if OUT_OF_MEMORY in output:
        return None
    sys.exit(f"{output[-6000:]}\n{SCRIPT} failed with exit code {run.returncode}")


REPORTED = (  # keys of the training script's summary
    *("tokens_per_second", "padding", "mfu", "of_peak_tflops", "peak_gib"),
    *("first_step_seconds", "train_runtime", "train_loss"),
)


def read_summary(output: str | None) -> dict[str, Any]:
    """Return the speed in the last line of the output of `run_script`."""
    if output is None:
        return {"oom": True}
    summary = json.loads(output.strip().splitlines()[-1])
    return {name: summary[name] for name in REPORTED if name in summary}


def compare_plan(plan_output: str, measured: dict[str, Any]) -> dict[str, Any]:
    """Return what --plan estimated, and its relative error against the run."""
    timed = re.search(r"the run takes .* \((\d+) s\)", plan_output)
    if timed is None:  # by the estimate it did not fit
        return {"measured": False}
    seconds = int(timed[1])
    plan = {"seconds": seconds, "seconds_off": round(seconds / measured["train_runtime"] - 1, 3)}
    if "peak_gib" in measured:
        estimated = float(re.search(r"at its peak, ([0-9.]+) estimated", plan_output)[1])
        plan |= {"estimated_gib": estimated, "memory_off": round(estimated / measured["peak_gib"] - 1, 3)}
    return plan


def run_baseline(shape: str, rows: Path, device: str, batch_size: int, steps: int) -> dict[str, Any]:
    """
    Return the speed of a plain training loop over padded batches.

    It has PEFT's own layers and the model's own loss.
    """
    try:
        model = random_model(shape, device, torch.bfloat16 if device == "cuda" else torch.float32)
        targets = list(generation_of_shape(shape).lora_target_modules)
        model.config.use_cache = False
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, target_modules=targets))
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-5)
        dataset = datasets.load_from_disk(str(rows)).shuffle(seed=0)
        collate = PaddingCollator(pad_token_id=0)
        throughput = Throughput.of(model.get_base_model(), decoder_blocks(model))
        for step in range(steps):
            batch = collate([dataset[(step * batch_size + row) % len(dataset)] for row in range(batch_size)])
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "labels")}
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            throughput.count(batch["real_tokens"], inputs["input_ids"].numel(), len(batch["target_ids"]))
            throughput.end_step()
        first = {"first_step_seconds": round(throughput.first_step_seconds, 2)}
        return throughput.measure(whole_run=True) | first
    except torch.OutOfMemoryError:
        return {"oom": True}


def describe(name: str, result: dict[str, Any]) -> str:
    """Return one line on a result."""
    return f"{name}: " + (OUT_OF_MEMORY if "oom" in result else ", ".join(f"{key} {result[key]}" for key in result))


def measure(args: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    """Run the training script and the baseline; return their results."""
    has_gpu = torch.cuda.is_available()
    device = "cuda" if has_gpu else "cpu"
    checkpoint = checkpoint_of(args.shape, work_dir, device)
    rows = dataset_of(args, checkpoint, work_dir)
    if args.memory_fraction < 1:  # for the processes that train
        settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
        limit = f"per_process_memory_fraction:{args.memory_fraction}"
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = f"{settings},{limit}" if settings else limit
    flags = [*FLAGS.split(), *(GPU_FLAGS if has_gpu else CPU_FLAGS).split(), *args.training_flags]
    run = partial(run_script, checkpoint, rows, work_dir, args.num_proc)
    plan_output = run([*flags, "--plan"]) if args.plan else None
    results = {"ours": read_summary(run(flags))}
    print(describe("ours", results["ours"]), flush=True)
    if not args.no_baseline:
        steps = args.baseline_steps or (14 if has_gpu else 3)
        results["baseline"] = in_own_process(run_baseline, args.shape, rows, device, args.baseline_batch_size, steps)
        print(describe("baseline", results["baseline"]), flush=True)
    plan = {}
    if plan_output and "train_runtime" in results["ours"]:
        plan["plan"] = compare_plan(plan_output, results["ours"])
    speeds = [result.get("tokens_per_second") for result in results.values()]
    return {
        "shape": args.shape,
        "device": torch.cuda.get_device_name() if has_gpu else "cpu",
        "processes": args.num_proc,
        "memory_fraction": args.memory_fraction,
        **{package: version(package) for package in ("torch", "transformers", "peft")},
        "flags": " ".join(flags),
        **results,
        **plan,
        "speedup": round(speeds[0] / speeds[1], 2) if len(speeds) == 2 and all(speeds) else None,
    }


def main() -> None:
    """Parse the command line, measure, and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="chatglm3-6b", help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=3000, help="number of random rows (default: %(default)s)")
    parser.add_argument("--jsonl_path", nargs="+", help="raw files to train on instead of random rows")
    parser.add_argument("--dataset_path", type=Path, help="tokenised dataset to train on instead of random rows")
    parser.add_argument(
        "--work_dir",
        type=Path,
        help="directory that keeps checkpoint and rows for other calls (default: a temporary one)",
    )
    parser.add_argument("--num_proc", type=int, default=1, help="processes, one GPU each (default: %(default)s)")
    parser.add_argument(
        "--memory_fraction", type=float, default=1.0, help="share of a GPU's memory to use (default: %(default)s)"
    )
    parser.add_argument("--no_baseline", action="store_true", help="run the training script only")
    parser.add_argument(
        "--plan", action="store_true", help="also run --plan before, and compare its estimates with the run"
    )
    parser.add_argument(
        "--baseline_batch_size", type=int, default=8, help="rows a batch of the baseline (default: %(default)s)"
    )
    parser.add_argument("--baseline_steps", type=int, help="steps of the baseline (default: 14 on a GPU, else 3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random rows (default: %(default)s)")
    parser.add_argument("training_flags", nargs="*", metavar="-- FLAGS", help="for the training script")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work_dir = args.work_dir or Path(directory)
        work_dir.mkdir(parents=True, exist_ok=True)
        print(json.dumps(measure(args, work_dir)))


if __name__ == "__main__":
    main()
