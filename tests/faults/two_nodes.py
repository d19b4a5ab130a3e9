"""
python tests/faults/two_nodes.py

Trains with ZeRO-3 on two machines: two network namespaces joined by a cable (veth), one process each, over gloo. Each
launcher of docs/multi_node.md must give the adapter of one machine with two processes. Then one side's process is
killed, and one side's cable is cut: both sides must end within a minute, one line must name the rank, and the resumed
run must give the same adapter. Needs root, for the namespaces. The last line is JSON.
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
ENDS_WITHIN = 60.0  # seconds
ZERO3 = "--deepspeed ds_config_zero3.json"
# The command on machine {n}, the script's flags, and the launcher of kill_training that gives the same on one machine.
LAUNCHERS = {
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
    """Run the `ip` command."""
    subprocess.run(["ip", *words.split()], check=True)


@contextlib.contextmanager
def two_machines() -> Iterator[None]:
    """Create two network namespaces, each with a loopback and one end of a cable."""
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
    """Start both machines' launchers; their output goes to work/node-a.log and node-b.log."""
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
    """Kill processes and all their descendants."""
    for process in processes:
        for pid in kill_training.descendants(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def finish(launcher: str, work: Path, output_dir: Path) -> None:
    """
    Run training on both machines to its end.

    Raises:
        RuntimeError: a launcher failed, or the adapter differs from that of one machine.
    """
    processes = start(launcher, work, output_dir)
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        stop(processes)
    if any(codes):
        raise RuntimeError(f"{launcher} failed with {codes}:\n{(work / 'node-a.log').read_text()[-6000:]}")
    expected = kill_training.reference(LAUNCHERS[launcher][2], work)
    if differs := kill_training.difference(expected, output_dir):
        raise RuntimeError(f"{launcher}: the adapter differs from that of one machine: {differs}")


def break_once(launcher: str, work: Path, fault: str) -> dict[str, float | str]:
    """Break a run once ("kill" or "cut"), then resume it; returns what `check_end` returns."""
    output_dir = work / "broken"
    shutil.rmtree(output_dir, ignore_errors=True)
    processes = start(launcher, work, output_dir)
    try:
        kill_training.wait_for_a_step(processes[0], work / "node-a.log")
        if fault == "cut":
            ip(f"-n {NODES[1]} link set cable down")
            remaining = processes
        else:
            stop(processes[1:])
            remaining = processes[:1]
        report = check_end(remaining, work / "node-a.log")
    finally:
        stop(processes)
        ip(f"-n {NODES[1]} link set cable up")
    finish(launcher, work, output_dir)
    return report


def check_end(processes: list[subprocess.Popen], log: Path) -> dict[str, float | str]:
    """
    Wait until the processes of a broken run have ended.

    Returns:
        The seconds until then, and the message that names the rank.

    Raises:
        RuntimeError: a process kept running or ended with exit code 0, or not exactly one line of `log` names a rank.
    """
    began = time.monotonic()
    try:
        codes = [process.wait(timeout=max(0, began + ENDS_WITHIN - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{shlex.join(error.cmd)} did not end within {ENDS_WITHIN} s") from None
    seconds, output = time.monotonic() - began, log.read_text()
    messages = re.findall(r"error: (rank \d.*)", output)
    if not all(codes) or len(messages) != 1:
        raise RuntimeError(f"exit codes {codes}, {len(messages)} lines name a rank:\n{output[-4000:]}")
    return {"seconds": round(seconds, 1), "message": messages[0]}


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
