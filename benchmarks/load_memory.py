"""
python benchmarks/load_memory.py --way zero3 --processes 2
python benchmarks/load_memory.py --way tp --processes 2 --layers 28 --adapter --work_dir W

Measures the host memory and the time that loading a checkpoint takes, the way that the scripts load it: random weights
in float16, several safetensors files, on the CPU. A process's peak is VmHWM, which counts pages of mapped files too,
above its memory after the imports. Its bound is its share of the weights + 2 GiB + the largest weight. For the ways
that train, a step follows, since FSDP2 shards then; its peak is given apart. The last line is one JSON object.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from tools.random_checkpoint import GLM, write_checkpoint
from utils.checkpoint.model import Checkpoint, load_model

ROOT = Path(__file__).resolve().parent.parent
SHAPE = "chatglm3-small"
GIB = 1 << 30
HEADROOM = 2 * GIB  # above a process's share and the largest weight
TRAINING = {
    "one": "",
    "ddp": "",
    "zero3": "--deepspeed configs/deepspeed_zero3.json",
    "zero3_offload": "--deepspeed configs/deepspeed_zero3_cpu_offload.json",
    "fsdp2": "",
}
ADAPTER_RANK = 8
SHARDED = ("zero3", "zero3_offload", "fsdp2", "tp")
OTHER = ("tp", "dispatch", "int8", "int4", "merge", "fingerprint", "load")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def memory(kind: str) -> int:
    """Return this process's memory in bytes: VmRSS now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{kind}:"))


class Meter:
    """Measures seconds and peak memory from its creation on."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM to VmRSS
        self.baseline, self.began = memory("VmRSS"), time.perf_counter()

    def read(self) -> dict[str, float]:
        """Return the time and the peak since."""
        seconds = time.perf_counter() - self.began
        peak = memory("VmHWM")
        return {
            "seconds": round(seconds, 2),
            "baseline_gib": round(self.baseline / GIB, 3),
            "peak_gib": round(peak / GIB, 3),
            "above_baseline_gib": round((peak - self.baseline) / GIB, 3),
        }


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Load the model as the training script does, and make a step."""
    from utils.training.batches import make_batches
    from utils.training.run_config import resolve_run
    from utils.training.trainer import make_trainer

    sys.argv = ["multi_gpu_fintune_belle.py"]
    flags = f"--model_name_or_path {args.checkpoint} --dataset_path {args.rows} --output_dir {args.output_dir}"
    flags += " --per_device_train_batch_size 1 --max_steps 1 --report_to none --save_strategy no"
    config = resolve_run(f"{flags} {TRAINING[args.way]} {args.flags}".split(), description="")
    batches = make_batches(config)
    meter = Meter()
    trainer = make_trainer(config, batches, callbacks=[])
    loaded = meter.read()
    loss = trainer.train().training_loss
    return loaded | {"loss": loss, "above_baseline_with_step_gib": meter.read()["above_baseline_gib"]}


def load(args: argparse.Namespace) -> dict[str, Any]:
    """Load the model as the inference scripts do, or read its files."""
    from utils.distributed.process_group import init_process_group, shut_down
    from utils.inference.adapters import AttachAdapters
    from utils.inference.merge_export import MergeSource, merge_and_save
    from utils.inference.placement import dispatch, load_on_processes

    dtype = DTYPES[args.dtype]
    checkpoint = Checkpoint.open(args.checkpoint, quantize=args.way if args.way.startswith("int") else None)
    attach = AttachAdapters((args.adapter_path,) if args.adapter_path else ())
    if args.way == "tp":
        init_process_group(use_deepspeed=True)  # its shared memory is no weight
    calls: dict[str, Callable[[], Any]] = {
        "tp": lambda: load_on_processes(checkpoint, dtype, None, attach, args.processes),
        "dispatch": lambda: attach(dispatch(checkpoint, dtype)),
        "merge": lambda: merge_and_save(
            MergeSource(checkpoint, checkpoint.load_tokenizer(), args.adapter_path),
            Path(args.output_dir) / "merged",
            dtype,
        ),
        "int8": lambda: checkpoint.load_model(dtype),
        "int4": lambda: checkpoint.load_model(dtype),
        "load": lambda: load_model(args.checkpoint, dtype),
        "fingerprint": lambda: (checkpoint.fingerprint(), checkpoint.content_hashes()),
    }
    meter = Meter()
    result = calls[args.way]()
    measured = meter.read()
    del result
    shut_down()
    return measured


def write_adapter(checkpoint: Checkpoint, directory: Path) -> None:
    """Write an adapter of random weights on every linear layer of the blocks."""
    from utils.lora.adapter import LoraSettings, attach_adapter, save_adapter
    from utils.training.fsdp_weights import placeholder_model

    settings = LoraSettings(ADAPTER_RANK, 2 * ADAPTER_RANK, 0.0, list(checkpoint.generation.linear_layers))
    model = attach_adapter(placeholder_model(checkpoint, torch.float32), settings, seed=1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.01)
    save_adapter(model, directory)


def work(args: argparse.Namespace) -> None:
    """Measure this process, and write its numbers into `output_dir`."""
    measured = train(args) if args.way in TRAINING else load(args)
    path = Path(args.output_dir) / f"rank-{os.environ.get('RANK', '0')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(measured), encoding="utf-8")


def prepare(args: argparse.Namespace, work_dir: Path) -> None:
    """Write the checkpoint, an adapter and a few rows, unless they are there."""
    from benchmarks.train_throughput import random_rows

    args.checkpoint, args.rows = work_dir / f"{SHAPE}-{args.layers}", work_dir / "rows"
    if not args.checkpoint.is_dir():
        GLM[SHAPE] = GLM["chatglm3-1b"] | {"num_layers": args.layers, "padded_vocab_size": args.vocabulary}
        write_checkpoint(SHAPE, args.checkpoint, "cpu")
    if args.adapter or args.way == "merge":
        args.adapter_path = work_dir / f"adapter-{args.layers}"
        if not args.adapter_path.is_dir():
            write_adapter(Checkpoint.open(str(args.checkpoint)), args.adapter_path)
    if not args.rows.is_dir():
        random_rows(args.checkpoint, 4, seed=0).save_to_disk(str(args.rows))


def command_of(args: argparse.Namespace, work_dir: Path) -> list[str]:
    """Return the command that starts the processes to measure."""
    values = {
        "way": args.way,
        "checkpoint": args.checkpoint,
        "adapter_path": args.adapter_path or "",
        "rows": args.rows,
        "output_dir": work_dir / "output",
        "processes": args.processes,
        "dtype": args.dtype,
        "flags": args.flags,
    }
    worker = [str(Path(__file__).resolve()), "--worker", *(f"--{name}={value}" for name, value in values.items())]
    if args.way == "fsdp2":
        launch = "-m accelerate.commands.launch --config_file configs/accelerate_fsdp2.yaml --mixed_precision no"
        return [sys.executable, *launch.split(), f"--num_processes={args.processes}", *worker]
    if args.processes > 1:
        return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={args.processes}", *worker]
    return [sys.executable, *worker]


def measure(args: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    """Start the processes; return what each took, and the bound."""
    prepare(args, work_dir)
    output = work_dir / "output"
    shutil.rmtree(output, ignore_errors=True)
    run = subprocess.run(command_of(args, work_dir), cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{(run.stdout + run.stderr)[-6000:]}\n--way {args.way} failed with exit code {run.returncode}")
    quantize = args.way if args.way.startswith("int") else None
    dtype = torch.float32 if args.way in TRAINING else DTYPES[args.dtype]
    tensors = Checkpoint.open(str(args.checkpoint), quantize=quantize).empty_model(dtype).state_dict().values()
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    share = 0 if args.way == "fingerprint" else sum(sizes) // (args.processes if args.way in SHARDED else 1)
    return {
        "way": args.way,
        "processes": args.processes,
        "adapter": bool(args.adapter_path),
        "dtype": str(dtype).removeprefix("torch."),
        "weights_gib": round(sum(sizes) / GIB, 3),
        "largest_gib": round(max(sizes) / GIB, 3),
        "share_gib": round(share / GIB, 3),
        "bound_gib": round((share + HEADROOM + max(sizes)) / GIB, 3),
        "ranks": [json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob("rank-*.json"))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=(*TRAINING, *OTHER), default="one", help="(default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=24, help="decoder blocks of the model (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=65024, help="rows of the embedding (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of inference (default: %(default)s)")
    parser.add_argument("--adapter", action="store_true", help="with an adapter, for tp and dispatch; merge has one")
    parser.add_argument("--flags", default="", help="more flags for the training script")
    parser.add_argument("--work_dir", type=Path, help="of the checkpoint; (default: a temporary directory)")
    for name in ("--checkpoint", "--adapter_path", "--rows", "--output_dir"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    if args.work_dir:
        args.work_dir.mkdir(parents=True, exist_ok=True)
        print(json.dumps(measure(args, args.work_dir.resolve())))
    else:
        with tempfile.TemporaryDirectory() as directory:
            print(json.dumps(measure(args, Path(directory))))


if __name__ == "__main__":
    main()
