"""
python tests/faults/kill_inference.py --kills 50

Kills batch inference with SIGKILL at random moments, every third time one process of two, and runs the same command
again: the output is not there until it is complete, what was answered stays answered, and the file in the end is, byte
for byte, that of a run that nobody killed. The last line is JSON.
"""

import argparse
import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from utils.distributed import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
ROWS = 60
SCRIPT = (
    "chatglm_milti_gpu_inference.py --model_name_or_path data/chatglm-tiny --input_path {work}/rows.jsonl "
    "--output_path {out} --batch_size 4 --max_new_tokens 24"
)


def start(work: Path, out: Path, processes: int) -> subprocess.Popen:
    launcher = sys.executable
    if processes > 1:
        launcher += f" -m torch.distributed.run --nproc_per_node {processes} --master_port {free_port()}"
    words = shlex.split(f"{launcher} {SCRIPT.format(work=work, out=out)}")
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def workers_of(process: subprocess.Popen) -> list[int]:
    """The processes that the launcher started."""
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    return []


def answered(out: Path) -> set[int]:
    """The rows in whole lines of the journals."""
    found = set()
    for journal in out.parent.glob(f"{out.name}.partial-*"):
        data = journal.read_bytes()
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        found |= {row["index"] for row in map(json.loads, lines) if "index" in row}
    return found


def finish(process: subprocess.Popen) -> int:
    _, err = process.communicate(timeout=120)  # the processes that are left end by themselves, soon
    if process.returncode > 0 and b"was killed" not in err and b"SIGKILL" not in err:
        raise RuntimeError(f"it failed by itself:\n{err.decode()}")
    return process.returncode


def torture(work: Path, kills: int, seed: int) -> dict[str, int]:
    """Raises RuntimeError where an answer is lost, doubled or changed."""
    moment, runs = random.Random(seed), 0
    words = ("今天天气怎么样", "谢谢", "你好", "小明昨天在公园看书", "改成一个问题")
    with (work / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(ROWS):
            file.write(json.dumps({"prompt": f"{moment.choice(words)}{number}"}, ensure_ascii=False) + "\n")
    whole, out = work / "whole.jsonl", work / "answers.jsonl"
    began = time.monotonic()
    if finish(start(work, whole, 1)):
        raise RuntimeError("the run that nobody kills failed")
    seconds = time.monotonic() - began
    killed = 0
    while killed < kills:
        known, processes = answered(out), 2 if killed % 3 == 2 else 1
        process = start(work, out, processes)
        runs += 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=moment.uniform(0.3, 1.0) * seconds)
        if process.poll() is None:
            targets = workers_of(process) if processes > 1 else []
            with contextlib.suppress(ProcessLookupError):
                os.kill(moment.choice(targets) if targets else process.pid, signal.SIGKILL)
            killed += 1
        code = finish(process)
        if out.exists():  # also where the command was killed behind its last step
            if out.read_bytes() != whole.read_bytes():
                raise RuntimeError("the output is not that of a run that nobody killed")
            for journal in out.parent.glob(f"{out.name}.partial-*"):
                journal.unlink()
            for file in (out, out.with_name(f".{out.name}.settings.json")):
                file.unlink(missing_ok=True)
        elif code == 0:
            raise RuntimeError("the command ended without an output")
        elif not known <= answered(out):
            raise RuntimeError(f"{len(known - answered(out))} answers are lost")
    for _ in range(2):
        if code := finish(start(work, out, 1)):
            raise RuntimeError(f"it ends with {code} though nobody killed it")
        if out.read_bytes() != whole.read_bytes() or answered(out):
            raise RuntimeError("the last output is not that of a run that nobody killed")
    return {"kills": killed, "runs": runs + 3, "rows": ROWS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        print(json.dumps(torture(Path(work), args.kills, args.seed)))


if __name__ == "__main__":
    main()
