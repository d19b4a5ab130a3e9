"""A process of a run dies: the others end within a minute, say which and why, and the run goes on from there."""

import contextlib
import os
import re
import signal
import sys
import time

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "faults"))
import kill_training


@pytest.mark.parametrize("launcher, victim", [("ddp", 1)])
def test_a_killed_rank_is_named_by_the_others(tokens, tmp_path, launcher, victim):
    (tmp_path / "tokens").symlink_to(tokens)
    words = kill_training.command(launcher, tmp_path, tmp_path / "run")
    log = tmp_path / "log"
    process = kill_training.start(words, log)
    try:
        kill_training.wait_for_a_step(process, log)
        workers = kill_training.descendants(process.pid)[1:]
        ranks = {kill_training.environment_of(pid).get("RANK"): pid for pid in reversed(workers)}
        started = time.monotonic()
        os.kill(ranks[str(victim)], signal.SIGKILL)
        assert process.wait(timeout=60) != 0 and time.monotonic() - started < 60
    finally:
        for pid in kill_training.descendants(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    said = log.read_text()
    lines = re.findall(r"error: rank \d.*", said)
    assert len(lines) == 1 and f"rank {victim} (process {ranks[str(victim)]} on " in lines[0], said
    assert "was killed" in lines[0] and "--resume_from_checkpoint latest" in lines[0]
    assert not [line for line in said.splitlines() if "gloo" in line], said
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
