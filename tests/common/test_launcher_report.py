"""A usage error under a launcher of two processes is said once, and last; the launcher ends at once."""

import pytest

SCRIPT = """
import os, sys, time
sys.path.insert(0, {root!r})
from utils.common.script import run
from utils.common.errors import UsageError

def main():
    time.sleep(0.5 * (1 - int(os.environ["LOCAL_RANK"])))  # rank 1 is first
    raise UsageError("a wrong flag", "another")

run(main)
"""


@pytest.fixture
def script(tmp_path):
    from conftest import ROOT

    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(root=str(ROOT)))
    return path


def test_torchrun(run_command, script):
    result = run_command(f"python -m torch.distributed.run --standalone --nproc_per_node 2 {script}")
    lines = result.err.rstrip().splitlines()
    assert [line.strip() for line in lines[-3:-1]] == [
        "script.py: error: a wrong flag",
        "script.py: error: another",
    ] and set(lines[-1]) == {"="}
    assert result.err.count("a wrong flag") == 1 and "SIGTERM" not in result.err
    assert result.code == 1 and len(lines) <= 40


def test_a_wrapper_between_torchrun_and_the_script(run_command, script):
    """Nobody may promise to print the error file then, so the fault is printed too."""
    wrapper = script.with_name("wrapper.sh")
    wrapper.write_text(f"#!/bin/sh\npython {script}\nexit $?\n")
    wrapper.chmod(0o755)
    command = f"python -m torch.distributed.run --standalone --nproc_per_node 1 --no-python {wrapper}"
    assert run_command(command).err.splitlines()[0].startswith("script.py: error: a wrong flag")


def test_deepspeed(run_command, script):
    result = run_command(f"deepspeed --num_gpus 2 --master_port 29631 {script}")
    assert result.code == 2
    assert result.err.splitlines()[-2:] == ["script.py: error: a wrong flag", "script.py: error: another"]
    assert result.err.count("a wrong flag") == 1 and result.out.splitlines()[-1].endswith("exits with return code = 2")
