"""
Each harness of tests/faults detects programs that are broken on purpose.

The harnesses of inference and training are tested in tests/inference/test_answers.py and
tests/training/test_resume.py.
"""

import contextlib
import sys

import fuzz
import kill_data_scripts
import kill_rank
import kill_training
import pytest
import two_nodes
from hypothesis import strategies

COPIER = """
import os, sys, time
fault, source, out = sys.argv[1:]
was_killed = os.path.exists(out + ".started")
open(out + ".started", "w").close()
target = out if fault == "writes its output in place" else out + ".tmp"
with open(source) as rows, open(target, "w", buffering=1) as file:
    for number, row in enumerate(rows):
        if fault == "loses a row after a kill" and was_killed and number == 5:
            continue
        if fault == "appends to what it had written" and was_killed and number < 5:
            file.write(row)
        file.write(row)
        if number % 3000 == 0:
            time.sleep(0.02)
os.replace(target, out)
os.remove(out + ".started")
"""
ENDS_WITHIN = {"waits for the dead": 2, "leaves the others running": 5}  # 5 s: this launcher itself must end in them
LAUNCHER = """
import os, subprocess, sys, time
fault, command = sys.argv[1], [sys.executable, "-c", "import time; time.sleep(60)"]
ranks = [subprocess.Popen(command, env={**os.environ, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
print("both run", flush=True)
while all(rank.poll() is None for rank in ranks):
    time.sleep(0.02)
if fault == "waits for the dead":
    time.sleep(60)
if fault != "names nobody":
    gone = next(number for number, rank in enumerate(ranks) if rank.poll() is not None)
    print(f"script.py: error: rank {gone} (process {ranks[gone].pid}) was killed", flush=True)
if fault != "leaves the others running":
    [rank.kill() for rank in ranks]
sys.exit(fault != "ends well")
"""


def detected(fault: str, words: str):
    """Expect the harness's error, or none for the program without a fault."""
    return contextlib.nullcontext() if fault == "none" else pytest.raises(RuntimeError, match=words)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("none", ""),
        ("writes its output in place", "the output is partial"),
        ("loses a row after a kill", "the output differs"),
        ("appends to what it had written", "the output differs"),
    ],
)
def test_kill_data_scripts(tmp_path, fault, words):
    (tmp_path / "copier.py").write_text(COPIER)
    scripts = {"process": f"{tmp_path}/copier.py '{fault}' {{work}}/rows {{out}}"}
    # A kill while the interpreter starts shows no fault: the harness ends at the first one that does.
    kills = 2 if fault == "none" else 20
    with detected(fault, words):
        assert kill_data_scripts.torture(tmp_path, kills, seed=1, scripts=scripts) == {"process": kills}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("none", ""),
        ("waits for the dead", "did not end within 2 s"),
        ("names nobody", "0 lines name rank 1"),
        ("leaves the others running", "running"),
        ("ends well", "exit code 0"),
    ],
)
def test_kill_rank(tmp_path, monkeypatch, fault, words):
    if fault in ENDS_WITHIN:
        monkeypatch.setattr(kill_rank, "ENDS_WITHIN", ENDS_WITHIN[fault])
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    process = kill_training.start([sys.executable, str(tmp_path / "launcher.py"), fault], tmp_path / "log")
    while len(kill_rank.workers_of(process.pid)) < 2 or "both run" not in (tmp_path / "log").read_text():
        assert process.poll() is None
    with detected(fault, words):
        assert kill_rank.kill_rank(process, tmp_path / "log", 1) < kill_rank.ENDS_WITHIN


MACHINE = """
import sys, time
fault = sys.argv[1]
if fault == "waits for the other machine":
    time.sleep(60)
if fault != "names nobody":
    print("script.py: error: rank 1 gave no sign of life", flush=True)
sys.exit(fault != "ends well")
"""


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("none", ""),
        ("waits for the other machine", "did not end within 2 s"),
        ("names nobody", "0 lines name a rank"),
        ("ends well", "exit codes"),
    ],
)
def test_two_nodes(tmp_path, monkeypatch, fault, words):
    if fault == "waits for the other machine":
        monkeypatch.setattr(two_nodes, "ENDS_WITHIN", 2)
    (tmp_path / "machine.py").write_text(MACHINE)
    process = kill_training.start([sys.executable, str(tmp_path / "machine.py"), fault], tmp_path / "log")
    try:
        with detected(fault, words):
            report = two_nodes.check_end([process], tmp_path / "log")
            assert report["seconds"] < two_nodes.ENDS_WITHIN and report["message"] == "rank 1 gave no sign of life"
    finally:
        two_nodes.stop([process])


def test_fuzz(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SEEDS", tmp_path)

    def read(data: bytes) -> None:
        if len(data) > 2:
            raise IndexError

    with pytest.raises(IndexError):
        fuzz.fuzz("reader", strategies.binary(), read, 200)
    assert fuzz.seeds("reader") == [b"\0\0\0"]
    fuzz.fuzz("another", strategies.binary(), len, 20)
    assert fuzz.seeds("another") == []
