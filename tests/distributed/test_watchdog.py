"""A process of a run dies: the others end within a minute, say which and why, and the run can be resumed."""

import re
import signal

import kill_rank
import pytest

from utils.distributed import watchdog


@pytest.mark.parametrize(
    "launcher, rank, advice",
    [
        ("ddp", 1, "resume with --resume_from_checkpoint latest"),
        ("deepspeed, replicas", 0, "the same command resumes where this one stopped"),  # it held the launcher's store
    ],
)
def test_a_killed_rank_is_named_by_the_others(tokens, tmp_path, launcher, rank, advice):
    """tests/faults/kill_rank.py kills each rank under every launcher, and resumes the run."""
    (tmp_path / "tokens").symlink_to(tokens)
    kill_rank.write_rows(tmp_path)
    log = tmp_path / "log"
    process = kill_rank.start(launcher, tmp_path, tmp_path / "run", log)
    assert kill_rank.kill_rank(process, log, rank) < kill_rank.ENDS_WITHIN
    output = log.read_text()
    (line,) = re.findall(r"error: rank \d.*", output)
    assert "was killed" in line and line.endswith(advice)
    assert not [line for line in output.splitlines() if "gloo" in line or "frame #" in line], output


def test_nobody_is_called_killed_where_all_are_stopped(tmp_path):
    kill_rank.write_rows(tmp_path)
    log = tmp_path / "log"
    process = kill_rank.start("torchrun, replicas", tmp_path, tmp_path / "answers", log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=kill_rank.ENDS_WITHIN) != 0
    assert "was killed" not in log.read_text()


def test_processes_that_were_all_suspended_are_alive(run_ranks):
    """For longer than one may be silent, as in a container that is paused."""
    result = run_ranks(2, "tests/helpers/suspended_check.py").check()
    assert result.out.count("alive") == 2 and not result.err


def test_the_clock_of_suspended_processes_stands(monkeypatch):
    moments = iter([100.0, 101.0, 102.5, 3702.5, 3703.5])
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(moments))
    clock = watchdog.AwakeClock()
    assert [clock.now() for _ in range(4)] == [1.0, 2.5, 2.5 + watchdog.MISSED_BEATS, 3.5 + watchdog.MISSED_BEATS]
