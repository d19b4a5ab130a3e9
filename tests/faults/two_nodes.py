"""
python tests/faults/two_nodes.py

Trains with ZeRO-3 on two machines: two network namespaces joined by a cable (veth), one process each, gloo between.
Each launcher of the README must end in the adapter of one machine with two processes. Then one side's process is
killed, and one side's cable is cut: both sides must end within a minute and say why, and going on must end in the same
adapter. Needs root, for the namespaces. The last line is JSON.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import kill_training

NODES = ("node-a", "node-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29577
ZERO3 = "--deepspeed ds_config_zero3.json"
LAUNCHERS = {  # what to type on machine {n}, flags of the script, and the recipe of one machine that does the same
    "torchrun": (
        f"torchrun --nnodes 2 --node_rank {{n}} --nproc_per_node 1 --master_addr {ADDRESSES[0]} --master_port {PORT}",
        ZERO3,
        "zero3",
    ),
    "torchrun with a rendezvous": (
        f"torchrun --nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint {ADDRESSES[0]}:{PORT} "
        "--rdzv_id run1 --rdzv_conf is_host={hosts} --local_addr {address}",
        ZERO3,
        "zero3",
    ),
    "accelerate": (
        "accelerate launch --config_file accelerate_ds_zero3_cpu_offload_config.yaml --num_machines 2 "
        f"--num_processes 2 --machine_rank {{n}} --main_process_ip {ADDRESSES[0]} --main_process_port {PORT} "
        "--deepspeed_multinode_launcher standard",
        "",
        "zero3 offload",
    ),
    "deepspeed": (
        f"deepspeed --hostfile {{work}}/hostfile --no_ssh --node_rank {{n}} --master_addr {ADDRESSES[0]} "
        f"--master_port {PORT}",
        ZERO3,
        "zero3",
    ),
}


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)


@contextlib.contextmanager
def two_machines() -> Iterator[None]:
    """Two namespaces, each with a loopback and one end of a cable."""
    for node in NODES:
        subprocess.run(["ip", "netns", "del", node], stderr=subprocess.DEVNULL)
    try:
        for node in NODES:
            ip(f"netns add {node}")
        ip(f"link add name cable netns {NODES[0]} type veth peer name cable netns {NODES[1]}")
        for node, address in zip(NODES, ADDRESSES, strict=True):
            ip(f"-n {node} link set lo up")
            ip(f"-n {node} addr add {address}/24 dev cable")
            ip(f"-n {node} link set cable up")
        yield
    finally:
        for node in NODES:
            ip(f"netns del {node}")


def start(launcher: str, work: Path, output_dir: Path) -> list[subprocess.Popen]:
    """Starts both machines' launchers; their output goes to work/node-a.log and node-b.log."""
    (work / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    begin, flags, _ = LAUNCHERS[launcher]
    script = kill_training.arguments(work, output_dir)
    processes = []
    for n, (node, address) in enumerate(zip(NODES, ADDRESSES, strict=True)):
        launch = begin.format(n=n, hosts=int(n == 0), address=address, work=work)
        words = f"ip netns exec {node} env GLOO_SOCKET_IFNAME=cable {launch} {script} {flags}"
        processes.append(kill_training.start(shlex.split(words), work / f"{node}.log"))
    return processes


def stop(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        for pid in kill_training.descendants(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def finish(launcher: str, work: Path, output_dir: Path) -> None:
    processes = start(launcher, work, output_dir)
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        stop(processes)
    if any(codes):
        raise RuntimeError(f"{launcher} failed with {codes}:\n{(work / 'node-a.log').read_text()[-6000:]}")
    expected = kill_training.reference(LAUNCHERS[launcher][2], work)
    if differs := kill_training.difference(expected, output_dir):
        raise RuntimeError(f"{launcher}: the adapter is another one than on one machine: {differs}")


def break_once(launcher: str, work: Path, fault: str) -> dict[str, float | str]:
    """Breaks a run once, then lets it go on; how long the last process lived on, and what was said."""
    output_dir = work / "broken"
    shutil.rmtree(output_dir, ignore_errors=True)
    processes = start(launcher, work, output_dir)
    try:
        kill_training.wait_for_a_step(processes[0], work / "node-a.log")
        began = time.monotonic()
        if fault == "cut":
            ip(f"-n {NODES[1]} link set cable down")
        else:
            stop(processes[1:])
        left = processes if fault == "cut" else processes[:1]
        codes = [process.wait(timeout=120) for process in left]
        seconds = time.monotonic() - began
    finally:
        stop(processes)
        ip(f"-n {NODES[1]} link set cable up")
    said = re.findall(r"error: (rank \d.*)", (work / "node-a.log").read_text())
    if seconds > 60 or not all(codes) or len(said) != 1:
        raise RuntimeError(f"{fault}: {seconds:.0f} s, {codes}, {said}\n{(work / 'node-a.log').read_text()[-4000:]}")
    finish(launcher, work, output_dir)
    return {"seconds": round(seconds, 1), "said": said[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--faults", nargs="*", choices=("kill", "cut"), default=["kill", "cut"])
    args = parser.parse_args()
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as directory, two_machines():
        work = Path(directory)
        kill_training.prepare(work)
        for launcher in args.launchers:
            finish(launcher, work, work / f"run {launcher}".replace(" ", "-"))
            results[launcher] = "the same adapter"
            print(f"{launcher}: the same adapter as one machine's", flush=True)
        for fault in args.faults:
            results[fault] = break_once(args.launchers[0], work, fault)
            print(f"{fault}: {results[fault]}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
