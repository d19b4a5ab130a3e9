"""
python tools/doctor.py --model_name_or_path data/chatglm-tiny

Looks at this machine and a model directory and says what a run would meet: versions, devices, back ends, the compiler
of DeepSpeed's extensions, free memory and disk, whether every weight file is whole; and for what is wrong, the mend.
Exit code 0 where nothing is, else 1.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import struct
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.common.script import run

import torch

from utils.checkpoint.directory import (
    GENERATION_FLAGS,
    GENERATION_HELP,
    choose_generation,
    open_directory,
    refuse_pointer,
)
from utils.checkpoint.tokenizer import load_tokenizer
from utils.checkpoint.weight_files import read_index, weight_files
from utils.common.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_PORT = 29500  # of torchrun
SHARED_MEMORY = 1 << 30
Finding = tuple[str, str, str | None]  # what, as it is, the mend where it is wrong


def look_at_versions() -> Iterator[Finding]:
    yield "python", platform.python_version(), None if sys.version_info >= (3, 11) else "install Python 3.11 or newer"
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        name, _, pinned = (word.strip() for word in line.partition("#")[0].partition("=="))
        if not pinned:
            continue
        try:
            found = version(name).split("+")[0]
        except PackageNotFoundError:
            yield name, "not installed", "pip install -r requirements.txt"
            continue
        yield name, found if found == pinned else f"{found} (tested: {pinned})", None


def look_at_devices() -> Iterator[Finding]:
    cards = torch.cuda.device_count()
    for card in range(cards):
        free, total = torch.cuda.mem_get_info(card)
        busy = "another process holds most of its memory: nvidia-smi names it" if free < total / 2 else None
        name = torch.cuda.get_device_name(card)
        yield f"GPU {card}", f"{name}, {free >> 30} of {total >> 30} GiB free", busy
    if not cards:
        driver = shutil.which("nvidia-smi") is not None
        mend = "torch sees none although there is a driver: install torch for its CUDA version" if driver else None
        yield "GPU", "none: everything runs on the CPU, in float32", mend
    backends = [name for name in ("nccl", "gloo") if getattr(torch.distributed, f"is_{name}_available")()]
    missing = "nccl" if cards and "nccl" not in backends else "gloo" if "gloo" not in backends else None
    yield "back ends", " ".join(backends), f"this torch has no {missing}: reinstall it" if missing else None


def look_at_compiler() -> Iterator[Finding]:
    needed = ["g++", "ninja", *(["nvcc"] if torch.cuda.is_available() else [])]
    mends = {"ninja": "activate the environment it is installed in", "nvcc": "install the CUDA toolkit, set CUDA_HOME"}
    for name in needed:
        path = shutil.which(name)
        yield name, path or "not found", None if path else mends.get(name, "install it: DeepSpeed compiles with it")


def look_at_room(output_dir: Path) -> Iterator[Finding]:
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield "memory", f"{pages >> 30} GiB free", None
    nearest = next(path for path in (output_dir.resolve(), *output_dir.resolve().parents) if path.exists())
    disk = shutil.disk_usage(nearest).free
    yield "disk", f"{disk >> 30} GiB free at {nearest}", None if disk > SHARED_MEMORY else "checkpoints need more"
    shared = shutil.disk_usage("/dev/shm").free
    yield "/dev/shm", f"{shared >> 20} MiB free", None if shared > SHARED_MEMORY else "docker run --shm-size=8g"


def look_at_network() -> Iterator[Finding]:
    name = socket.gethostname()
    try:
        yield "host name", f"{name} is {socket.gethostbyname(name)}", None
    except OSError:
        yield (
            "host name",
            f"{name} has no address",
            "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
        )
    with socket.socket() as probe:
        busy = probe.connect_ex(("127.0.0.1", DEFAULT_PORT)) == 0
    state, mend = ("in use", "give a second run another --master_port") if busy else ("free", None)
    yield f"port {DEFAULT_PORT}", state, mend


def look_at_model(path_or_id: str) -> Iterator[Finding]:
    try:
        directory, generation, _ = open_directory(path_or_id, weights=True)
        files = weight_files(directory)
    except UsageError as error:
        yield "model", path_or_id, str(error)
        return
    yield "model", f"{directory}: {generation.name}", None
    try:
        yield generation.vocab_file, f"{len(load_tokenizer(path_or_id)):,} tokens", None
    except UsageError as error:
        yield generation.vocab_file, "cannot be used", str(error)
    for file in files:
        fault = find_fault(file)
        yield file.name, f"{file.stat().st_size:,} bytes", fault and f"{fault}: download it again"
    for index in directory.glob("*.index.json"):  # its total_size is no sum of files: releases count otherwise
        yield index.name, f"{len(read_index(index))} weights", None


def find_fault(file: Path) -> str | None:
    """Says in words how a weight file is no such file, or shorter than its own header says; None where it is whole."""
    try:
        refuse_pointer(file)
    except UsageError:
        return "it is a Git LFS pointer, not the file (git lfs pull)"
    size = file.stat().st_size
    with file.open("rb") as opened:
        if file.suffix == ".safetensors":
            head = opened.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length > size - 8:
                return "its header is cut"
            tensors = json.loads(opened.read(length))
            end = max((value["data_offsets"][1] for key, value in tensors.items() if key != "__metadata__"), default=0)
            return None if size == 8 + length + end else f"its header speaks of {8 + length + end:,} bytes"
        opened.seek(max(0, size - 65558))
        return None if b"PK\x05\x06" in opened.read() else "its end is missing, or it was written before torch 1.6"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="checkpoint directory or hub id to look at")
    parser.add_argument("--generation", choices=GENERATION_FLAGS, help=GENERATION_HELP)
    parser.add_argument("--output_dir", type=Path, default=Path("output"), help="where runs will write (%(default)s)")
    args = parser.parse_args()
    if args.model_name_or_path:
        choose_generation(args.model_name_or_path, args.generation)
    parts = [
        look_at_versions(),
        look_at_devices(),
        look_at_compiler(),
        look_at_room(args.output_dir),
        look_at_network(),
    ]
    if args.model_name_or_path:
        parts.append(look_at_model(args.model_name_or_path))
    wrong = 0
    for name, found, mend in (finding for part in parts for finding in part):
        print(f"{'ok ' if mend is None else 'BAD'} {name:14} {found}" + (f"\n    -> {mend}" if mend else ""))
        wrong += mend is not None
    print(json.dumps({"wrong": wrong}))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    run(main)
