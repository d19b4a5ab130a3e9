"""
python tests/faults/kill_data_scripts.py --kills 100

Kills processing and tokenising with SIGKILL at random moments and runs them again. After each kill an output must be
the older one, the new one or absent, never partial; and a run that ends must give, byte for byte, the output of a run
without a kill. The last line is JSON.
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
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ROWS = 60_000
SCRIPTS = {
    "process": "process_belle_1M_data.py --input {work}/rows --output {out} --dedup exact --shuffle",
    "tokenize": "tokenize_dataset_rows_belle.py --jsonl_path {work}/rows --save_path {out} --num_proc 2 "
    "--model_name_or_path data/chatglm-tiny",
}


def start(command: str, work: Path, out: Path) -> subprocess.Popen:
    """Start one of SCRIPTS in a session of its own."""
    words = shlex.split(f"{sys.executable} {command.format(work=work, out=out)}")
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def content(out: Path) -> dict[str, bytes]:
    """Return the contents of an output's files by name; empty if it does not exist."""
    if out.is_file():
        return {"": out.read_bytes()}
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.suffix != ".png" and path.is_file()
    }


def complete(command: str, work: Path, out: Path) -> float:
    """
    Run one of SCRIPTS to its end; return its seconds.

    Raises:
        RuntimeError: it failed.
    """
    began = time.monotonic()
    process = start(command, work, out)
    _, err = process.communicate(timeout=300)
    if process.returncode:
        raise RuntimeError(f"{command} failed without a kill:\n{err.decode()}")
    return time.monotonic() - began


def torture(work: Path, kills: int, seed: int, scripts: Mapping[str, str] = SCRIPTS) -> dict[str, int]:
    """
    Kill the scripts in turn.

    Returns:
        The number of kills of each script.

    Raises:
        RuntimeError: an output is partial, or differs from that of a run without a kill.
    """
    moment, done = random.Random(seed), dict.fromkeys(scripts, 0)
    row = {"input": "", "target": "答案" * 10}
    with (work / "rows").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row | {"input": f"第{i}个问题"}, ensure_ascii=False) + "\n" for i in range(ROWS))
    expected, seconds = {}, {}
    for script, command in scripts.items():
        seconds[script] = complete(command, work, work / f"{script}.whole")
        expected[script] = content(work / f"{script}.whole")
    while sum(done.values()) < kills:
        script = min(done, key=done.get)
        out = work / f"{script}.killed"
        process = start(scripts[script], work, out)
        time.sleep(moment.uniform(0.3, 1) * seconds[script])
        if process.poll() is None:
            done[script] += 1
        else:
            seconds[script] *= 0.9  # the machine is less busy than in the first run
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        files = content(out)
        if script == "tokenize":  # removed in the last step, after the dataset is in its place
            files = {name: data for name, data in files.items() if name != "lock" and not name.startswith("reports/")}
        if files and files != expected[script]:
            raise RuntimeError(f"{script}: after kill {done[script]} the output is partial")
        if done[script] % 5 == 0 or sum(done.values()) > kills - len(scripts):
            complete(scripts[script], work, out)
            if content(out) != expected[script]:
                raise RuntimeError(f"{script}: after {done[script]} kills the output differs")
            if script == "process":
                out.unlink()
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        done = torture(Path(directory), args.kills, args.seed)
    print(json.dumps({"kills": sum(done.values()), "by_script": done, "lost_or_doubled_rows": 0}))


if __name__ == "__main__":
    main()
