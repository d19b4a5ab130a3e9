"""A full disk, exhausted memory or a removed output directory ends a script with one line and exit code 1."""

import contextlib
import errno
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from utils.common.script import run

import numpy
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from transformers import Trainer

from utils.common.errors import RunError, UsageError
from utils.common.machine_faults import explain_machine_fault
from utils.training.checkpoints import find_damage, list_checkpoints


@pytest.fixture
def train(train_tiny):
    return lambda output_dir, flags="": train_tiny(output_dir, f"--max_steps 8 --save_steps 1 {flags}")


@pytest.mark.parametrize("small_disk", ["600k"], indirect=True)  # a checkpoint takes 170k
def test_training_on_a_full_disk(train, small_disk):
    """Older checkpoints stay complete, nothing half written stays, and with free space the run resumes."""
    output_dir = small_disk / "run"
    result = train(output_dir)
    assert result.code == 1 and "Traceback" not in result.err
    assert result.err.splitlines()[-1].endswith("free some space and run the command again"), result.err
    checkpoints = list_checkpoints(output_dir)
    assert checkpoints and not any(map(find_damage, checkpoints)) and not (output_dir / ".writing").exists()
    shutil.rmtree(checkpoints[0])
    train(output_dir, "--save_total_limit 1 --resume_from_checkpoint latest").check()


def test_an_output_directory_that_is_removed_during_training(train, tmp_path, monkeypatch):
    """The next checkpoint creates it again, or one line says that it is gone."""
    training_step, steps = Trainer.training_step, []

    def training_step_and_remove(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            shutil.rmtree(tmp_path / "run")
        return training_step(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step_and_remove)
    result = train(tmp_path / "run")
    assert "Traceback" not in result.err
    if result.code == 0:
        assert not find_damage(list_checkpoints(tmp_path / "run")[-1]) and len(list_checkpoints(tmp_path / "run")) == 6
    else:
        assert result.code == 1 and "was it removed?" in result.err


@contextlib.contextmanager
def limited(kind, value):
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


TENSORS = {"a": torch.zeros(100_000)}


@pytest.mark.parametrize(
    "fail, words",
    [
        (lambda path: torch.save(TENSORS, "/dev/full"), "free some space"),
        (lambda path: Path("/dev/full").write_text("x"), "No space left on device: free some space"),
        (lambda path: save_file(TENSORS, path / "file"), "File too large"),
        (lambda path: torch.save(TENSORS, path / "file"), "free some space"),
        (lambda path: save_file(TENSORS, path / "gone" / "file"), "was it removed?"),
        (lambda path: torch.save(TENSORS, path / "gone" / "file"), "gone does not exist: was it removed?"),
        (lambda path: (path / "gone").read_text(), "gone: No such file or directory: was it removed?"),
        (lambda path: torch.empty(1 << 60), "memory ran out ("),
        (lambda path: numpy.empty(1 << 50), "memory ran out (Unable to allocate"),
        (lambda path: bytearray(1 << 60), "memory ran out (MemoryError)"),
    ],
)
def test_faults_that_libraries_report(tmp_path, capsys, monkeypatch, fail, words):
    """Real errors of each library, provoked by a device or a limit."""
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with limited(resource.RLIMIT_FSIZE, 1000), pytest.raises(SystemExit) as end:
        run(lambda: fail(tmp_path))
    stderr = capsys.readouterr().err
    assert end.value.code == 1 and stderr.count("\n") == 1 and words in stderr, stderr


@pytest.mark.parametrize("script", ["multi_gpu_fintune_belle.py", "chatglm_milti_gpu_inference.py", "tools/chat.py"])
def test_a_python_without_the_packages(script):
    """Without site-packages, as with the Python of another environment; an import in `main` ends in the same line."""
    result = subprocess.run([sys.executable, "-S", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    words = rf"{Path(script).name}: error: \w+ is not installed in {sys.executable}: activate the environment"
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and re.match(words, result.stderr), result.stderr


def test_a_package_that_is_missing_later(capsys):
    with pytest.raises(SystemExit) as end:
        run(lambda: __import__("absent_package.module"))
    assert end.value.code == 2 and "absent_package is not installed in" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):  # a bug
        run(lambda: __import__("utils.absent"))


def test_the_first_error_of_a_chain_is_explained():
    def chained(first, second):
        try:
            try:
                raise first
            except type(first):
                raise second  # noqa: B904
        except type(second) as error:
            return error

    full, missing = OSError(errno.ENOSPC, "No space left on device"), FileNotFoundError(errno.ENOENT, "no", "file")
    assert "free some space" in explain_machine_fault(chained(full, RuntimeError("closing failed too")))
    assert explain_machine_fault(chained(missing, KeyError("a bug, not a missing file"))) is None
    assert explain_machine_fault(chained(full, UsageError("said already"))) is None
    assert explain_machine_fault(RunError("out of memory")) is None
    assert "CUDA out of memory" in explain_machine_fault(torch.OutOfMemoryError("CUDA out of memory. Tried to"))


def test_a_memory_mapped_file_that_is_cut_off(tmp_path):
    """The process cannot continue, and says why."""
    (tmp_path / "rows").write_bytes(b"x" * 100_000)
    read = (
        "import os, sys, numpy; from utils.common.signals import explain_bus_errors; explain_bus_errors()\n"
        "rows = numpy.memmap(sys.argv[1], mode='r'); os.truncate(sys.argv[1], 0); rows.sum()"
    )
    result = subprocess.run(
        [sys.executable, "-c", read, tmp_path / "rows"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "cut off or overwritten" in result.stderr
