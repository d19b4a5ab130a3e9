"""
python tools/doctor.py --model_name_or_path data/chatglm-tiny

Checks this machine and a model directory before a run: versions, devices, back ends, the compiler of DeepSpeed's
extensions, free memory and disk, whether every weight file is whole. Prints one line a check, and the fix for what is
wrong. Then it says what the machine's cards can train. With --gpus 2 --gpu A100 --gpu_gib 80 it says that of
such cards, without the checks of this machine. Exit code 0 if nothing is wrong, else 1.
"""

import json
import os
import platform
import shutil
import socket
import struct
import sys
from argparse import Namespace
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.common.script import run

import torch

from tools.trainable import LORA_RANK, ROW_TOKENS, ROWS, Cards, plans
from utils.checkpoint.directory import (
    GENERATION_FLAGS,
    GENERATION_HELP,
    choose_generation,
    open_directory,
    refuse_pointer,
)
from utils.checkpoint.tokenizer import load_tokenizer
from utils.checkpoint.weight_files import read_index, weight_files
from utils.common.console import BOLD, DIM, ERROR, WIDTH, command_lines, print_facts, print_line
from utils.common.errors import UsageError
from utils.common.flags import FlagParser

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = ("sacrebleu", "jieba", "rouge_score", "gradio")  # modules of tools/requirements.txt
DEMO_MINUTES = 2
DEFAULT_PORT = 29500  # of torchrun
ZIP_END_BYTES = 65558  # the end record of a zip file, which a .bin is, and its longest comment
MIN_FREE_BYTES = 1 << 30  # on the disk, for a checkpoint; in /dev/shm, for NCCL and workers


class Check(NamedTuple):
    """One line of the report; `fix` is None if nothing is wrong."""

    name: str
    state: str
    fix: str | None = None


def check_versions() -> Iterator[Check]:
    """Compare installed packages with the pins of requirements.txt."""
    fix = None if sys.version_info >= (3, 11) else "install Python 3.11 or newer"
    yield Check("python", platform.python_version(), fix)
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        name, _, pinned = (word.strip() for word in line.partition("#")[0].partition("=="))
        if not pinned:
            continue
        try:
            installed = version(name).split("+")[0]
        except PackageNotFoundError:
            yield Check(name, "not installed", "pip install -r requirements.txt")
            continue
        yield Check(name, installed if installed == pinned else f"{installed} (tested: {pinned})")
    missing = [name for name in OPTIONAL if find_spec(name) is None]
    install = "for tools/evaluate.py and tools/chat.py --web: pip install -r tools/requirements.txt"
    yield Check("optional", f"no {', '.join(missing)} ({install})" if missing else " ".join(OPTIONAL))


def check_gpus() -> Iterator[Check]:
    """Check GPUs, their free memory, and the back ends of torch.distributed."""
    cards = torch.cuda.device_count()
    for card in range(cards):
        free, total = torch.cuda.mem_get_info(card)
        busy = "another process holds most of its memory: nvidia-smi names it" if free < total / 2 else None
        name = torch.cuda.get_device_name(card)
        yield Check(f"GPU {card}", f"{name}, {free >> 30} of {total >> 30} GiB free", busy)
    if not cards:
        driver = shutil.which("nvidia-smi") is not None
        fix = "torch sees none although there is a driver: install torch for its CUDA version" if driver else None
        yield Check("GPU", "none: everything runs on the CPU, in float32 unless --bf16", fix)
    backends = [name for name in ("nccl", "gloo") if getattr(torch.distributed, f"is_{name}_available")()]
    needed = ["nccl", "gloo"] if cards else ["gloo"]
    missing = [name for name in needed if name not in backends]
    fix = f"this torch has no {' and no '.join(missing)}: reinstall it" if missing else None
    yield Check("back ends", " ".join(backends), fix)


def check_compiler() -> Iterator[Check]:
    """Check the programs with which DeepSpeed compiles its extensions."""
    fixes = {
        "g++": "install it: DeepSpeed compiles with it",
        "ninja": "activate the environment it is installed in",
    }
    if torch.cuda.is_available():
        fixes["nvcc"] = "install the CUDA toolkit, set CUDA_HOME"
    for name, fix in fixes.items():
        path = shutil.which(name)
        yield Check(name, path or "not found", None if path else fix)


def check_memory_and_disk(output_dir: Path) -> Iterator[Check]:
    """Check what is free of memory, of the disk of `output_dir`, and of /dev/shm."""
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Check("memory", f"{pages >> 30} GiB free")
    nearest = next(path for path in (output_dir.resolve(), *output_dir.resolve().parents) if path.exists())
    disk = shutil.disk_usage(nearest).free
    fix = None if disk > MIN_FREE_BYTES else "checkpoints need more: free some space"
    yield Check("disk", f"{disk >> 30} GiB free at {nearest}", fix)
    shared = shutil.disk_usage("/dev/shm").free
    yield Check(
        "/dev/shm", f"{shared >> 20} MiB free", None if shared > MIN_FREE_BYTES else "docker run --shm-size=8g"
    )


def check_network() -> Iterator[Check]:
    """Check that the host name has an address, and that torchrun's port is free."""
    name = socket.gethostname()
    try:
        yield Check("host name", f"{name} is {socket.gethostbyname(name)}")
    except OSError:
        fix = "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        yield Check("host name", f"{name} has no address", fix)
    with socket.socket() as probe:
        busy = probe.connect_ex(("127.0.0.1", DEFAULT_PORT)) == 0
    state, fix = ("in use", "give a second run another --master_port") if busy else ("free", None)
    yield Check(f"port {DEFAULT_PORT}", state, fix)


def check_model(path_or_id: str) -> Iterator[Check]:
    """Check a checkpoint's configuration, tokenizer and weight files; no weight is loaded."""
    try:
        directory, generation, _ = open_directory(path_or_id, weights=True)
        files = weight_files(directory)
    except UsageError as error:
        yield Check("model", path_or_id, str(error))
        return
    yield Check("model", f"{directory}: {generation.name}")
    try:
        yield Check(generation.vocab_file, f"{len(load_tokenizer(path_or_id)):,} tokens")
    except UsageError as error:
        yield Check(generation.vocab_file, "cannot be used", str(error))
    for file in files:
        fault = find_fault(file)
        yield Check(file.name, f"{file.stat().st_size:,} bytes", f"{fault}: download it again" if fault else None)
    for index in directory.glob("*.index.json"):  # total_size is not compared: some releases count it differently
        yield Check(index.name, f"{len(read_index(index))} weights")


def find_fault(file: Path) -> str | None:
    """Return what is wrong with a weight file; None if it is whole."""
    try:
        refuse_pointer(file)
    except UsageError:
        return "it is a Git LFS pointer, not the file (git lfs pull)"
    size = file.stat().st_size
    with file.open("rb") as opened:
        if file.suffix == ".safetensors":  # 8 bytes: the header's length; the header, JSON; the tensors
            head = opened.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length > size - 8:
                return "its header is cut"
            tensors = json.loads(opened.read(length))
            end = max((value["data_offsets"][1] for key, value in tensors.items() if key != "__metadata__"), default=0)
            return None if size == 8 + length + end else f"its header speaks of {8 + length + end:,} bytes"
        opened.seek(max(0, size - ZIP_END_BYTES))
        return None if b"PK\x05\x06" in opened.read() else "its end is missing, or it was written before torch 1.6"


def main() -> None:
    parser = FlagParser(description=__doc__)
    parser.add_argument("--model_name_or_path", help="checkpoint directory or hub id to check")
    parser.add_argument("--generation", choices=GENERATION_FLAGS, help=GENERATION_HELP)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("output"), help="where runs will write (default: %(default)s)"
    )
    parser.add_argument("--gpu", metavar="NAME", help="say what such a card can train, as A100, with --gpu_gib")
    parser.add_argument("--gpu_gib", type=float, metavar="GIB", help="memory of the card to ask for, as 80")
    parser.add_argument("--gpus", type=int, metavar="N", help="how many of them (default: 1)")
    args = parser.parse_args()
    cards = asked_cards(args)
    if args.model_name_or_path:
        choose_generation(args.model_name_or_path, args.generation)
    print_line("doctor.py", BOLD)
    areas = []
    if cards is None:  # the question is about this machine
        areas = [
            check_versions(),
            check_gpus(),
            check_compiler(),
            check_memory_and_disk(args.output_dir),
            check_network(),
        ]
    if args.model_name_or_path:
        areas.append(check_model(args.model_name_or_path))
    wrong = sum(map(print_checks, areas))
    print(json.dumps({"wrong": wrong, "trains": print_trainable(cards or Cards.here())}))
    sys.exit(1 if wrong else 0)


def print_checks(checks: Iterator[Check]) -> int:
    """Print a line for each check, and the fix of what is wrong; return how many are."""
    found = list(checks)
    width = max(14, *(len(check.name) for check in found))
    for check in found:
        print_line(
            f"  {'BAD' if check.fix else 'ok '} {check.name:{width}}  {check.state}", ERROR if check.fix else None
        )
        if check.fix:
            print_line(f"      -> {check.fix}")
    return sum(check.fix is not None for check in found)


def asked_cards(args: Namespace) -> Cards | None:
    """
    Return the cards that the flags ask for; None without such flags.

    Raises:
        UsageError: the memory is missing, or a number cannot be.
    """
    if args.gpu_gib is None:
        if args.gpu or args.gpus:
            raise UsageError("--gpu and --gpus need the memory of a card: add --gpu_gib, such as --gpu_gib 80")
        return None
    if not 1 <= args.gpu_gib <= 1024 or (args.gpus is not None and args.gpus < 1):
        raise UsageError("--gpu_gib must be from 1 to 1024, and --gpus at least 1")
    return Cards.asked_for(args.gpus or 1, args.gpu or "card", args.gpu_gib)


def print_trainable(cards: Cards | None) -> dict[str, dict[str, Any]]:
    """Print what the cards can train; return memory and time of each model that fits."""
    if cards is None:
        print_facts(
            "what this machine can train",
            {
                "GPU": "none: the models of the family need one",
                "tiny model": f"make demo trains it on the CPU in some {DEMO_MINUTES} minutes",
                "other cards": "python tools/doctor.py --gpus 2 --gpu A100 --gpu_gib 80",
            },
        )
        return {}
    found = list(plans(cards))
    title = f"what {cards} can train: LoRA rank {LORA_RANK}, {ROWS:,} rows of {ROW_TOKENS} tokens, one epoch"
    print_line(title, BOLD)
    width = max(len(plan.model) for plan in found)
    for plan in found:
        print_line(f"  {plan.model:{width}}  {plan.describe()}")
        if plan.command:
            for line in command_lines(plan.command, WIDTH - 4):
                print_line(f"    {line}")
    for note in cards.notes():
        print_line(f"  {note}", DIM)
    fitting = [plan for plan in found if plan.recipe]
    return {
        plan.model: {
            "gib": round(plan.recipe.memory.gib(), 1),
            "hours": plan.seconds and round(plan.seconds / 3600, 2),
        }
        for plan in fitting
    }


if __name__ == "__main__":
    run(main)
