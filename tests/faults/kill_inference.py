"""
python tests/faults/kill_inference.py --kills 50

Kills batch inference with SIGKILL, every third time one process of two, and runs the same command again. The output
must not exist before it is complete, answers from before a kill must be reused and not computed again, and the final
file must be, byte for byte, that of a run without a kill. Every other kill comes when the journals have reached a
number of answers, the rest at random moments. The last line is JSON.
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

from utils.distributed.process_group import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
ROWS = 60
MIN_JOURNAL_SIZES = 4  # different lengths seen while it grows; a journal written only at the end has one
TIMEOUT = 300.0  # seconds for a run
POLL_SECONDS = 0.005  # between two reads of the journals
SCRIPT = "chatglm_milti_gpu_inference.py"
FLAGS = (
    "--model_name_or_path data/chatglm-tiny --input_path {work}/rows.jsonl --output_path {out} --batch_size 4 "
    "--max_new_tokens 24"
)


class Run:
    """One start of the command; watches the length of its journals."""

    def __init__(self, work: Path, out: Path, processes: int = 1, script: str = SCRIPT):
        launcher = sys.executable
        if processes > 1:
            launcher += f" -m torch.distributed.run --nproc_per_node {processes} --master_port {free_port()}"
        words = shlex.split(f"{launcher} {script} {FLAGS.format(work=work, out=out)}")
        self.out, self.processes, self.sizes = out, processes, {len(answered(out))}
        self.before = answered(out)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)

    def wait(self, seconds: float, answers: int = ROWS + 1) -> bool:
        """
        Wait until it ends, at most `seconds`, or until the journals have `answers` answers.

        Returns:
            Whether it still runs.
        """
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            self.sizes.add(len(answered(self.out)))
            if max(self.sizes) >= answers:
                break
            time.sleep(POLL_SECONDS)
        return self.process.poll() is None

    def kill(self, moment: random.Random) -> None:
        """Kill the process, or under a launcher one of its workers."""
        targets = self._workers() if self.processes > 1 else []
        with contextlib.suppress(ProcessLookupError):
            os.kill(moment.choice(targets) if targets else self.process.pid, signal.SIGKILL)

    def _workers(self) -> list[int]:
        """Return the processes that the launcher started."""
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
            return [int(process_id) for process_id in children.split()]
        return []

    def finish(self) -> int:
        """
        Wait until it ends; return the exit code.

        Raises:
            RuntimeError: it failed for another reason than the kill, or its summary reuses fewer answers than the
                journals had at the start.
        """
        self.wait(TIMEOUT)
        printed, error = self.process.communicate(timeout=TIMEOUT)  # the other processes end soon by themselves
        if self.process.returncode > 0 and "was killed" not in error and "SIGKILL" not in error:
            raise RuntimeError(f"it failed without a kill:\n{error}")
        if self.process.returncode == 0:
            reused = json.loads(printed.splitlines()[-1])["answered_before"]
            if reused < len(self.before):
                raise RuntimeError(f"{len(self.before)} rows had answers, and only {reused} were reused")
        return self.process.returncode


def records(out: Path) -> list[int]:
    """Return the row numbers in the complete lines of the journals, repeated ones too."""
    numbers = []
    for journal in out.parent.glob(f"{out.name}.partial-*"):
        with contextlib.suppress(FileNotFoundError):
            data = journal.read_bytes()
            lines = data[: data.rfind(b"\n") + 1].splitlines()
            numbers += [row["index"] for row in map(json.loads, filter(None, lines)) if "index" in row]
    return numbers


def answered(out: Path) -> set[int]:
    """Return the numbers of the rows that the journals answer."""
    return set(records(out))


def torture(work: Path, kills: int, seed: int, script: str = SCRIPT) -> dict[str, int]:
    """
    Kill and resume inference `kills` times.

    Returns:
        The numbers of kills, runs, rows and reused answers.

    Raises:
        RuntimeError: an answer is lost, doubled, changed or computed again.
    """
    moment, runs = random.Random(seed), 0
    words = ("今天天气怎么样", "谢谢", "你好", "小明昨天在公园看书", "改成一个问题")
    with (work / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(ROWS):
            file.write(json.dumps({"prompt": f"{moment.choice(words)}{number}"}, ensure_ascii=False) + "\n")
    whole, out = work / "whole.jsonl", work / "answers.jsonl"
    began = time.monotonic()
    first = Run(work, whole, script=script)
    if first.finish():
        raise RuntimeError("the run without a kill failed")
    if len(first.sizes) < MIN_JOURNAL_SIZES:
        raise RuntimeError(f"its journal had {sorted(first.sizes)} answers while it ran: a kill would lose the others")
    seconds = time.monotonic() - began
    killed = reused = 0
    while killed < kills:
        known = answered(out)
        run = Run(work, out, 2 if killed % 3 == 2 else 1, script)
        runs += 1
        if killed % 2 == 0:  # at an answer
            running = run.wait(TIMEOUT, answers=min(len(known) + moment.randint(1, ROWS // 3), ROWS - 4))
        else:
            running = run.wait(moment.uniform(0.3, 1.0) * seconds)
        if running:
            run.kill(moment)
            killed += 1
        code = run.finish()
        if len(records(out)) > len(answered(out)):
            raise RuntimeError("a row was answered again")
        if out.exists():  # also if the command was killed after its last step
            reused += len(known)
            if out.read_bytes() != whole.read_bytes():
                raise RuntimeError("the output is not that of a run without a kill")
            for file in out.parent.glob(f"*{out.name}*"):
                file.unlink()
        elif code == 0:
            raise RuntimeError("the command ended without an output")
        elif not known <= answered(out):
            raise RuntimeError(f"{len(known - answered(out))} answers are lost")
    reused += len(answered(out))
    for _ in range(2):
        if code := Run(work, out, script=script).finish():
            raise RuntimeError(f"it ends with {code} without a kill")
        if out.read_bytes() != whole.read_bytes() or answered(out):
            raise RuntimeError("the last output is not that of a run without a kill")
    return {"kills": killed, "runs": runs + 3, "rows": ROWS, "taken_over": reused}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        print(json.dumps(torture(Path(work), args.kills, args.seed)))


if __name__ == "__main__":
    main()
