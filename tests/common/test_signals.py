"""Signals that ask a script to end: training saves a checkpoint first, every other script ends with one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from utils.common.script import run

import forked_ranks
import pytest
from conftest import ROOT, TINY
from kill_training import has_logged_a_step
from transformers import Trainer

from utils.common.files import atomic_writer
from utils.training.checkpoints import find_damage, list_checkpoints

FLAGS = "--lr_scheduler_type constant --save_steps 100 --logging_steps 1"


@pytest.fixture
def train(train_tiny):
    return lambda output_dir, flags: train_tiny(output_dir, f"{FLAGS} --max_steps 4 {flags}")


@pytest.fixture
def send(monkeypatch):
    """send(2, SIGINT, SIGTERM) sends these signals to this process in the second step of training."""

    def send(step, *numbers):
        training_step, steps = Trainer.training_step, []

        def training_step_and_signal(*args, **kwargs):
            steps.append(1)
            if len(steps) == step:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return training_step(*args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", training_step_and_signal)

    return send


@pytest.mark.parametrize(
    "numbers, flags",
    [
        ((signal.SIGINT, signal.SIGINT, signal.SIGTERM), ""),
        ((signal.SIGHUP,), "--save_strategy no"),
        ((signal.SIGUSR1,), "--save_strategy best --eval_fraction 0.02 --eval_steps 1 --learning_rate 0.5"),
    ],
)
def test_training_saves_a_checkpoint_at_a_signal(train, send, tmp_path, numbers, flags):
    """With any --save_strategy and however often a signal comes; the handlers are restored."""
    before = [signal.getsignal(number) for number in numbers]
    send(2, *numbers)
    result = train(tmp_path, flags)
    assert result.code == 0 and f"stopped by {numbers[0].name} after step 2: resume with" in result.out, result.err
    assert "Traceback" not in result.err and not (tmp_path / "adapter_model.safetensors").exists()
    newest = list_checkpoints(tmp_path)[-1]
    assert newest.name == "checkpoint-2" and not find_damage(newest)
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_signal_in_the_last_step_changes_nothing(train, send, tmp_path):
    send(4, signal.SIGTERM)
    result = train(tmp_path, "").check()
    assert "stopped by" not in result.out and (tmp_path / "adapter_model.safetensors").exists()


def test_a_signal_before_the_first_step_is_one_line(train, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "create_optimizer", lambda self, *_: os.kill(os.getpid(), signal.SIGTERM))
    result = train(tmp_path, "")
    assert result.code == 1 and result.err.splitlines()[-1:] == [
        "multi_gpu_fintune_belle.py: error: stopped by SIGTERM: no step was made; run the same command again"
    ]


def test_an_ignored_signal_stays_ignored(train, send, tmp_path):
    """nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        send(2, signal.SIGHUP)
        assert '"steps": 4' in train(tmp_path, "").check().out
    finally:
        signal.signal(signal.SIGHUP, before)


def test_training_outlives_its_terminal(tokens, tmp_path):
    """Ctrl-C also ends the `tee` of a pipe: only the output of training is lost."""
    pipe, output_dir = tmp_path / "pipe", tmp_path / "run"
    os.mkfifo(pipe)
    command = (
        f"multi_gpu_fintune_belle.py --dataset_path {tokens} --model_name_or_path {TINY} {FLAGS} --max_steps 4000"
    )
    process = forked_ranks.process(f"{command} --output_dir {output_dir}", ROOT, [str(pipe)] * 2, {})
    process.start()
    with pipe.open() as reader:
        while not has_logged_a_step(line := reader.readline()):
            assert line and "Traceback" not in line, line
    os.kill(process.pid, signal.SIGINT)
    process.join(timeout=120)
    assert process.exitcode == 0
    assert "stopped by SIGINT after step" in (output_dir / "train.log").read_text()
    assert not find_damage(list_checkpoints(output_dir)[-1])


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
def test_a_signal_ends_a_script_with_one_line(tmp_path, capsys, monkeypatch, number):
    """Temporary files are removed, the older output stays, the handlers are restored."""
    monkeypatch.setattr(sys, "argv", ["script.py"])
    output, before = tmp_path / "output", signal.getsignal(number)
    output.write_text("older")

    def main():
        with atomic_writer(output) as file:
            file.write("half")
            os.kill(os.getpid(), number)
            time.sleep(10)

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 1 and signal.getsignal(number) == before
    assert capsys.readouterr().err == (
        f"script.py: error: stopped by {number.name}: run the same command again: it resumes where this one stopped\n"
    )
    assert output.read_text() == "older" and list(tmp_path.iterdir()) == [output]


def test_a_signal_during_the_imports(tmp_path):
    words = [sys.executable, "tokenize_dataset_rows_belle.py", "--jsonl_path", "data/sample.train.json"]
    process = subprocess.Popen([*words, "--save_path", tmp_path / "out"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while "numpy" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and stderr.count("\n") == 1, stderr
    assert "stopped by SIGINT: run the same command" in stderr
