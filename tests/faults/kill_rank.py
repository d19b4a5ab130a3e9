"""
python tests/faults/kill_rank.py

Kills each of two processes in turn under every launcher. The launcher and the other process must end within a minute
with a nonzero exit code and one line that names the rank, and nothing may keep running. The same command must then
resume: training to the adapter, bit for bit, of a run without a kill, inference to its answers. Prints one line a
kill; the last line is JSON.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.faults import kill_training
from utils.distributed.process_group import free_port

ENDS_WITHIN = 60.0  # seconds
LAUNCHERS = {  # of inference; those of training are in kill_training
    "one process": "python chatglm_milti_gpu_inference.py",
    "torchrun, replicas": "torchrun --nproc_per_node=2 --master_port {port} chatglm_milti_gpu_inference.py",
    "deepspeed, replicas": "deepspeed --num_gpus 2 --master_port {port} chatglm_milti_gpu_inference.py",
    "deepspeed, sharded": "deepspeed --num_gpus 2 --master_port {port} chatglm_deepspeed_inference.py --tp_size 2",
}
TRAINING = [name for name, (start, _) in kill_training.LAUNCHERS.items() if start != "python"]


def workers_of(process_id: int) -> dict[int, int]:
    """Return the process id of each of the launcher's workers by its rank."""
    ranks = {}
    for pid in kill_training.descendants(process_id):
        environment = kill_training.environment_of(pid)
        if environment.get("RANK", "").isdigit() and environment.get("LOCAL_RANK", "").isdigit():
            ranks.setdefault(int(environment["RANK"]), pid)
    return ranks


def kill_rank(process: subprocess.Popen, log: Path, rank: int) -> float:
    """
    Kill a rank.

    Returns:
        Seconds until all processes had ended.

    Raises:
        RuntimeError: a process kept running, the exit code is 0, or not exactly one line names the rank.
    """
    words, running = process.args, kill_training.descendants(process.pid)
    os.kill(workers_of(process.pid)[rank], signal.SIGKILL)
    killed = time.monotonic()
    try:
        code = process.wait(timeout=ENDS_WITHIN)
        while running := [pid for pid in running if os.path.exists(f"/proc/{pid}")]:
            if time.monotonic() - killed > ENDS_WITHIN:
                raise RuntimeError(f"{shlex.join(words)} left {running} running")
            time.sleep(0.1)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{shlex.join(words)} did not end within {ENDS_WITHIN} s") from None
    finally:
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    seconds = time.monotonic() - killed
    named = log.read_text().count(f"error: rank {rank} (process")
    if code == 0 or named != 1:
        raise RuntimeError(
            f"{shlex.join(words)}: exit code {code}, {named} lines name rank {rank}:\n{log.read_text()}"
        )
    return seconds


def command(name: str, work: Path, output: Path) -> list[str]:
    """Return the words of a command: training into the directory `output`, or inference into the file `output`."""
    if name in TRAINING:
        return kill_training.command(name, work, output)
    return shlex.split(
        f"{LAUNCHERS[name].format(port=free_port())} --model_name_or_path data/chatglm-tiny --batch_size 2 "
        f"--max_new_tokens 24 --input_path {work}/rows.jsonl --output_path {output}"
    )


def start(name: str, work: Path, output: Path, log: Path) -> subprocess.Popen:
    """Start the command and wait for its first step or its first answer."""

    def has_begun() -> bool:
        if name in TRAINING:
            return kill_training.has_logged_a_step(log.read_text())
        return any(journal.stat().st_size for journal in output.parent.glob(f"{output.name}.partial-*"))

    process = kill_training.start(command(name, work, output), log)
    while not has_begun():
        if process.poll() is not None:
            raise RuntimeError(f"{shlex.join(process.args)} ended before it was killed:\n{log.read_text()}")
        time.sleep(0.02)
    return process


def kill_and_resume(name: str, work: Path, rank: int) -> float:
    """Kill a rank, resume, and compare the result with that of a run without a kill; seconds until the end."""
    log, output = work / "log", work / f"{name} {rank}".replace(" ", "-")
    seconds = kill_rank(start(name, work, output, log), log, rank)
    kill_training.finish(command(name, work, output), log)
    if name in TRAINING:
        differs = kill_training.difference(kill_training.reference(name, work), output)
    else:
        whole = work / "whole.jsonl"
        if not whole.exists():
            kill_training.finish(command("one process", work, whole), log)
        differs = "" if output.read_bytes() == whole.read_bytes() else "other answers"
    if differs:
        raise RuntimeError(f"{name}: {differs}")
    return seconds


def write_rows(work: Path) -> None:
    """Write the prompts of inference to work/rows.jsonl."""
    rows = [json.dumps({"prompt": f"今天天气怎么样{number}"}, ensure_ascii=False) for number in range(60)]
    (work / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*TRAINING, *(name for name in LAUNCHERS if name != "one process")]
    parser.add_argument("--launchers", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    slowest = {}
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        kill_training.prepare(work)
        write_rows(work)
        for name in args.launchers:
            for rank in (0, 1):
                seconds = kill_and_resume(name, work, rank)
                slowest[name] = round(max(seconds, slowest.get(name, 0)), 1)
                print(f"{name}: rank {rank} killed, all ended after {seconds:.1f} s, and the run resumed", flush=True)
    print(json.dumps({"seconds_until_the_end": slowest}))


if __name__ == "__main__":
    main()
