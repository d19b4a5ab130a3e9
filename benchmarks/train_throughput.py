"""
python benchmarks/train_throughput.py --shape chatglm3-6b
python benchmarks/train_throughput.py --shape chatglm3-6b --work_dir W --memory_fraction 0.3 -- --quantize int4

Real tokens a second of multi_gpu_fintune_belle.py, with random weights of a real model's shape, and of plain
transformers and PEFT beside it (rows in a random order, padded, gradient checkpointing; bfloat16 on a GPU, else
float32). What follows -- goes to the training script, behind the flags that it gets anyhow, which are printed.

Rows have exp(N(log 150, 0.75)) tokens, at least 20 and at most 1024, trained on from the 40th, unless --jsonl_path or
--dataset_path names others. Speeds leave the first step out. A run that does not fit says "oom". The last line is one
JSON object.
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

from tools.random_checkpoint import CHATGLM, SHAPES, random_model, write_checkpoint
from utils.data.collators import PaddingCollator
from utils.models.family import CHATGLM3, CHATGLM_6B
from utils.training.optimize import decoder_blocks
from utils.training.throughput import Throughput

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "multi_gpu_fintune_belle.py"
FLAGS = "--per_device_train_batch_size 1 --lora_rank 8 --logging_steps 5 --save_strategy no --report_to none --packing"
GPU_FLAGS = "--bf16 --pack_tokens 16384 --num_train_epochs 1"
CPU_FLAGS = "--pack_tokens 1024 --max_steps 4"
OUT_OF_MEMORY = "out of memory"


def apart(call: Callable, *arguments: Any) -> Any:
    """The result of a call in a process of its own, so that nothing of it stays on a GPU."""
    if not torch.cuda.is_available():
        return call(*arguments)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def checkpoint_of(shape: str, work_dir: Path, device: str) -> Path:
    """Of random weights; one that is there already is taken."""
    path = work_dir / shape
    if not path.is_dir():
        partial = work_dir / f"{shape}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        apart(write_checkpoint, shape, partial, device)
        partial.rename(path)
    return path


def random_rows(checkpoint: Path, count: int, seed: int) -> datasets.Dataset:
    """Rows of random tokens; those of ChatGLM-6B have `[gMASK] <sop>` before what is trained on."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    ending = [config[name] for name in ("gmask_token_id", "bos_token_id") if "gmask_token_id" in config]
    draw = random.Random(seed)
    rows = {"input_ids": [], "labels": []}
    for _ in range(count):
        length = min(max(round(math.exp(draw.gauss(math.log(150), 0.75))), 20), 1024)
        start = min(40, length // 2)
        ids = draw.choices(range(100, 900), k=length)
        ids[start - len(ending) : start] = ending
        rows["input_ids"].append(ids)
        rows["labels"].append([-100] * start + ids[start:])
    features = datasets.Features({name: datasets.Sequence(datasets.Value("int32")) for name in rows})
    return datasets.Dataset.from_dict(rows, features=features)


def dataset_of(args: argparse.Namespace, checkpoint: Path, work_dir: Path) -> Path:
    """Where the rows are that --dataset_path, --jsonl_path or nothing names."""
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
    """What the training script says, or None where memory does not suffice; exits with its output where it fails."""
    output_dir, compiled = work_dir / "output", work_dir / "compiled"
    for path in (output_dir, compiled):  # each run compiles its layers: --plan would do it for the run behind it
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
        said = ("memory", "warning", "weights", "packs", "rows", "measured", "the run takes")
        print("\n".join(line for line in run.stdout.splitlines() if line.startswith(said)), flush=True)
        return run.stdout
    if OUT_OF_MEMORY in output:
        return None
    sys.exit(f"{output[-6000:]}\n{SCRIPT} failed with exit code {run.returncode}")


REPORTED = (
    *("tokens_per_second", "padding", "mfu", "of_peak_tflops", "peak_gib"),
    *("first_step_seconds", "train_runtime", "train_loss"),
)


def read_summary(said: str | None) -> dict[str, Any]:
    """The speed in the last line of a run of `run_script`."""
    if said is None:
        return {"oom": True}
    summary = json.loads(said.strip().splitlines()[-1])
    return {name: summary[name] for name in REPORTED if name in summary}


def compare_plan(planned: str, found: dict[str, Any]) -> dict[str, Any]:
    """What --plan foresaw, and by what share it was off what the run then took."""
    timed = re.search(r"the run takes .* \((\d+) s\)", planned)
    if timed is None:  # it did not fit, by the estimate
        return {"measured": False}
    seconds = int(timed[1])
    plan = {"seconds": seconds, "seconds_off": round(seconds / found["train_runtime"] - 1, 3)}
    if "peak_gib" in found:
        estimated = float(re.search(r"at its peak, ([0-9.]+) estimated", planned)[1])
        plan |= {"estimated_gib": estimated, "memory_off": round(estimated / found["peak_gib"] - 1, 3)}
    return plan


def run_baseline(shape: str, rows: Path, device: str, batch_size: int, steps: int) -> dict[str, Any]:
    """The same of a plain loop over padded batches, with PEFT's own layers and the model's own loss."""
    try:
        model = random_model(shape, device, torch.bfloat16 if device == "cuda" else torch.float32)
        generation = CHATGLM_6B if shape in CHATGLM else CHATGLM3
        targets = list(generation.lora_target_modules)
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


def describe(name: str, found: dict[str, Any]) -> str:
    return f"{name}: " + (OUT_OF_MEMORY if "oom" in found else ", ".join(f"{key} {found[key]}" for key in found))


def measure(args: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    device = "cuda" if has_gpu else "cpu"
    checkpoint = checkpoint_of(args.shape, work_dir, device)
    rows = dataset_of(args, checkpoint, work_dir)
    if args.memory_fraction < 1:  # for the processes that train
        given = os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
        limit = f"per_process_memory_fraction:{args.memory_fraction}"
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = f"{given},{limit}" if given else limit
    flags = [*FLAGS.split(), *(GPU_FLAGS if has_gpu else CPU_FLAGS).split(), *args.training_flags]
    run = partial(run_script, checkpoint, rows, work_dir, args.num_proc)
    planned = run([*flags, "--plan"]) if args.plan else None
    results = {"ours": read_summary(run(flags))}
    print(describe("ours", results["ours"]), flush=True)
    if not args.no_baseline:
        steps = args.baseline_steps or (14 if has_gpu else 3)
        results["baseline"] = apart(run_baseline, args.shape, rows, device, args.baseline_batch_size, steps)
        print(describe("baseline", results["baseline"]), flush=True)
    plan = {"plan": compare_plan(planned, results["ours"])} if planned and "train_runtime" in results["ours"] else {}
    speeds = [found.get("tokens_per_second") for found in results.values()]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="chatglm3-6b")
    parser.add_argument("--rows", type=int, default=3000, help="rows of random tokens (default: %(default)s)")
    parser.add_argument("--jsonl_path", nargs="+", help="raw files to train on in place of random rows")
    parser.add_argument("--dataset_path", type=Path, help="a tokenised dataset to train on in place of random rows")
    parser.add_argument("--work_dir", type=Path, help="keeps checkpoint and rows, for another call to take up")
    parser.add_argument("--num_proc", type=int, default=1, help="processes, a card each (default: %(default)s)")
    parser.add_argument("--memory_fraction", type=float, default=1.0, help="of a card's memory that may be used")
    parser.add_argument("--no_baseline", action="store_true", help="the training script alone")
    parser.add_argument("--plan", action="store_true", help="also what --plan says, before the run that it plans")
    parser.add_argument("--baseline_batch_size", type=int, default=8, help="rows (default: %(default)s)")
    parser.add_argument("--baseline_steps", type=int, help="default: 14, without a GPU 3")
    parser.add_argument("--seed", type=int, default=0, help="of the random rows (default: %(default)s)")
    parser.add_argument("training_flags", nargs="*", metavar="-- FLAGS", help="for the training script")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work_dir = args.work_dir or Path(directory)
        work_dir.mkdir(parents=True, exist_ok=True)
        print(json.dumps(measure(args, work_dir)))


if __name__ == "__main__":
    main()
