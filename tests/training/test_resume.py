"""Training that was killed, stopped or damaged resumes as if nothing had happened, or says why it cannot."""

import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import kill_training
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer

from utils.training.callbacks import ExactOffload
from utils.training.checkpoints import MANIFEST_FILE, find_damage, list_checkpoints
from utils.training.resume_key import KEY_FILE

FLAGS = "--lora_rank 4 --lora_dropout 0.1 --learning_rate 2e-3 --save_steps 2 --per_device_train_batch_size 2"


@pytest.fixture(scope="module")
def workspace(tokens, tmp_path_factory):
    path = tmp_path_factory.mktemp("resume")
    (path / "tokens").symlink_to(tokens)
    return path


@pytest.fixture
def train(run_script, workspace):
    def run(output_dir, flags="", settings=FLAGS):
        return run_script(
            f"multi_gpu_fintune_belle.py --dataset_path {workspace}/tokens --model_name_or_path {TINY} {settings} "
            f"--max_steps 6 --output_dir {output_dir} {flags}"
        )

    return run


def names(directory):
    return [path.name for path in list_checkpoints(directory)]


def test_resumed_from_the_last_whole_checkpoint(train, tmp_path):
    """A truncated, a flipped and an unsealed checkpoint are each named, and the one before is used."""
    train(tmp_path / "whole").check()
    assert names(tmp_path / "whole") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert not (tmp_path / "whole" / ".writing").exists()

    def truncate(checkpoint):
        data = (checkpoint / "optimizer.pt").read_bytes()
        (checkpoint / "optimizer.pt").write_bytes(data[:-10])
        return "optimizer.pt has"

    def flip(checkpoint):
        data = bytearray((checkpoint / "adapter_model.safetensors").read_bytes())
        data[-1] ^= 1
        (checkpoint / "adapter_model.safetensors").write_bytes(data)
        return "adapter_model.safetensors has other content"

    def unseal(checkpoint):
        (checkpoint / MANIFEST_FILE).unlink()
        return f"it has no readable {MANIFEST_FILE}"

    for spoil in (truncate, flip, unseal):
        damaged = tmp_path / spoil.__name__
        for step in (2, 4):
            shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", damaged / f"checkpoint-{step}")
        words = spoil(damaged / "checkpoint-4")
        printed = train(damaged, "--resume_from_checkpoint latest").check().words
        assert f"{damaged}/checkpoint-4 is skipped: {words}" in printed
        assert f"resuming from {damaged}/checkpoint-2" in printed
        assert kill_training.same_adapter(tmp_path / "whole", damaged)
        assert names(damaged) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"] and not find_damage(
            damaged / "checkpoint-4"
        )


def test_resumed_from_a_checkpoint_of_an_earlier_release(train, tmp_path):
    """Which kept its resume key in run.json, under other names; its manifest names that file."""
    train(tmp_path / "whole").check()
    checkpoint = tmp_path / "earlier" / "checkpoint-4"
    shutil.copytree(tmp_path / "whole" / checkpoint.name, checkpoint)
    key, manifest = (json.loads((checkpoint / name).read_text()) for name in (KEY_FILE, MANIFEST_FILE))
    (checkpoint / KEY_FILE).unlink()
    data = json.dumps({"trains": key["identity"], "steps": key["schedule"]}, indent=1).encode()
    (checkpoint / "run.json").write_bytes(data)
    del manifest[KEY_FILE]
    manifest["run.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(manifest))
    result = train(tmp_path / "earlier", "--resume_from_checkpoint latest").check()
    assert f"resuming from {checkpoint}" in result.words
    assert kill_training.same_adapter(tmp_path / "whole", tmp_path / "earlier")
    other = FLAGS.replace("--lora_rank 4", "--lora_rank 8")
    result = train(tmp_path / "earlier", f"--resume_from_checkpoint {checkpoint}", other)
    assert result.code == 2 and "lora_rank 4 (now 8)" in result.err


def test_resumed_in_the_second_epoch(train, workspace, tmp_path):
    """The order of rows, by length, differs from that of the first epoch."""
    datasets.load_from_disk(str(workspace / "tokens")).select(range(30)).save_to_disk(str(tmp_path / "tokens"))
    flags = FLAGS.replace("batch_size 2", f"batch_size 12 --dataset_path {tmp_path}/tokens")  # 3 steps an epoch
    train(tmp_path / "whole", settings=flags).check()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    train(tmp_path / "resumed", "--resume_from_checkpoint latest", settings=flags).check()
    assert kill_training.same_adapter(tmp_path / "whole", tmp_path / "resumed")


def test_a_named_checkpoint(train, tmp_path):
    train(tmp_path / "whole", "--save_total_limit 2").check()
    assert names(tmp_path / "whole") == ["checkpoint-4", "checkpoint-6"]
    train(tmp_path / "other", f"--resume_from_checkpoint {tmp_path}/whole/checkpoint-4").check()
    assert kill_training.same_adapter(tmp_path / "whole", tmp_path / "other")
    (tmp_path / "whole" / "checkpoint-4" / "scheduler.pt").unlink()
    for path, words in (("whole/checkpoint-4", "no checkpoint up to it is whole"), ("nowhere", "is no checkpoint")):
        result = train(tmp_path / "new", f"--resume_from_checkpoint {tmp_path}/{path}")
        assert result.code == 2 and words in result.err and not (tmp_path / "new").exists()


def test_latest_without_a_checkpoint_starts_afresh(train, tmp_path):
    assert "no checkpoint to resume from: starting afresh" in train(tmp_path, "--resume_from_checkpoint latest").out
    assert names(tmp_path)[-1] == "checkpoint-6"


def test_starting_again_loses_nothing(train, tmp_path):
    train(tmp_path).check()
    before = (tmp_path / "checkpoint-6" / "trainer_state.json").read_text()
    out = train(tmp_path).check().out
    assert "holds checkpoint-6 of this run" in out and "--resume_from_checkpoint latest" in out
    assert (tmp_path / "previous-1" / "checkpoint-6" / "trainer_state.json").read_text() == before
    assert names(tmp_path) == names(tmp_path / "previous-1")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"--lora_rank 4": "--lora_rank 8"}, "lora_rank 4 (now 8)"),
        ({"--learning_rate 2e-3": "--learning_rate 1e-3"}, "learning_rate 0.002 (now 0.001)"),
        ({"--lora_rank 4": "--packing --pack_tokens 256 --lora_rank 4"}, "pack_tokens None (now 256)"),
    ],
)
def test_another_run_is_not_resumed(train, tmp_path, changes, words):
    train(tmp_path).check()
    settings = FLAGS
    for old, new in changes.items():
        settings = settings.replace(old, new)
    result = train(tmp_path, "--resume_from_checkpoint latest", settings)
    assert result.code == 2 and words in result.err and "Traceback" not in result.err
    fresh = train(tmp_path, "", settings)  # in this directory only a run that trains the same adapter
    assert fresh.code == (2 if "lora_rank" in words else 0)


def test_more_steps_resume(train, tmp_path):
    train(tmp_path).check()
    out = train(tmp_path, "--resume_from_checkpoint latest --max_steps 8").check().out
    assert '"steps": 8' in out


@pytest.fixture(scope="module")
def unkilled(run_script, workspace, tmp_path_factory):
    """The harness's run without a kill, with all of its checkpoints."""
    path = tmp_path_factory.mktemp("unkilled")
    run_script(f"{kill_training.arguments(workspace, path)} --save_total_limit {kill_training.STEPS}").check()
    return path


@pytest.fixture
def started(workspace, tmp_path):
    """started("ddp") -> the process of a run that has made its first step, in tmp_path / "run"."""

    def run(launcher):
        process = kill_training.start(kill_training.command(launcher, workspace, tmp_path / "run"), tmp_path / "log")
        kill_training.wait_for_a_step(process, tmp_path / "log")
        assert process.poll() is None
        return process

    return run


def test_stopped_and_killed_and_resumed(unkilled, workspace, started, tmp_path):
    """SIGTERM saves and exits with 0; then one SIGKILL; tests/faults/kill_training.py makes more of them."""
    process = started("one process")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    output = (tmp_path / "log").read_text()
    step = int(output.split("stopped by SIGTERM after step ")[1].split(":")[0])
    assert names(tmp_path / "run")[-1] == f"checkpoint-{step}" and step < kill_training.STEPS
    words = kill_training.command("one process", workspace, tmp_path / "run")
    assert kill_training.kill_once(words, tmp_path / "log", random.Random(1))
    kill_training.finish(words, tmp_path / "log")
    assert kill_training.same_adapter(unkilled, tmp_path / "run")


@pytest.mark.parametrize("fault, step", [*zip(kill_training.BROKEN, (kill_training.STEPS, 6, 6), strict=True)])
def test_the_harness_detects_a_broken_program(run_script, unkilled, workspace, tmp_path, monkeypatch, fault, step):
    """By its comparison; `tests/faults/kill_training.py --self_test` shows the same with kills."""
    shutil.copytree(unkilled / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    name, value = kill_training.BROKEN[fault]
    monkeypatch.setattr(name, eval(value, {"Trainer": Trainer}))
    run_script(kill_training.arguments(workspace, tmp_path)).check()
    assert "weights differ" in kill_training.difference(unkilled, tmp_path)


def test_resumed_under_zero3(run_ranks, workspace, tmp_path):
    """From the last checkpoint but one; and no run leaves shared memory."""
    shared = set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = "--deepspeed ds_config_zero3.json --max_steps 4"
    run_ranks(2, f"{kill_training.arguments(workspace, whole)} {flags}").check()
    before_last = list_checkpoints(whole)[-2]
    shutil.copytree(before_last, resumed / before_last.name)
    result = run_ranks(2, f"{kill_training.arguments(workspace, resumed)} {flags}").check()
    assert f"resuming from {resumed}/{before_last.name}" in result.words
    assert kill_training.same_adapter(whole, resumed)
    (resumed / "adapter_model.safetensors").unlink()  # as after a kill right before the end
    result = run_ranks(2, f"{kill_training.arguments(workspace, resumed)} {flags}").check()
    assert "all 4 steps are made" in result.out and kill_training.same_adapter(whole, resumed)
    assert set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*")) <= shared


def test_resumed_in_a_later_epoch(run_ranks, workspace, tmp_path):
    """By two processes and in the order by length of that epoch, not of the first."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = f"{kill_training.PADDED} --max_steps 9"
    run_ranks(2, f"{kill_training.arguments(workspace, whole)} {flags}").check()
    shutil.copytree(whole / "checkpoint-8", resumed / "checkpoint-8")
    run_ranks(2, f"{kill_training.arguments(workspace, resumed)} {flags}").check()
    assert kill_training.same_adapter(whole, resumed)


def test_workers_end_with_their_launcher(started, tmp_path):
    process = started("ddp")
    workers = kill_training.descendants(process.pid)[1:]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 120
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "stopped by SIGTERM after step" in (tmp_path / "log").read_text()


def test_a_directory_in_use_is_refused(train, tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = train(tmp_path)
    assert result.code == 2 and "is in use by a run that has not ended" in result.err


def test_sigterm_on_two_processes(started, tmp_path):
    """Whichever process the signal reaches first, all stop after the same step."""
    process = started("ddp")
    os.kill(kill_training.descendants(process.pid)[-1], signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    output = (tmp_path / "log").read_text()
    assert output.count("stopped by SIGTERM after step") == 1
    newest = list_checkpoints(tmp_path / "run")[-1]
    assert not find_damage(newest) and (newest / "rng_state_1.pth").is_file()
    assert json.loads((newest / "resume_key.json").read_text())["schedule"]["processes"] == 2
    assert load_file(newest / "adapter_model.safetensors")


@pytest.mark.parametrize("steps", (2, 5))
def test_an_optimizer_in_cpu_memory_resumes_exactly(steps):
    """After 2 and after 5 steps; after 5 the power of beta2 that its C++ code recomputes differs."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam as cpu_adam

    gradients = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    whole, first = (nn.Parameter(torch.ones(1000)) for _ in range(2))

    def advance(parameter, optimizer, gradients):
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()

    advance(whole, cpu_adam([whole], lr=1e-2), gradients)
    before = cpu_adam([first], lr=1e-2)
    advance(first, before, gradients[:steps])
    second = nn.Parameter(first.detach().clone())
    after = cpu_adam([second], lr=1e-2)
    after.load_state_dict(before.state_dict())
    prepared = SimpleNamespace(optimizer=SimpleNamespace(optimizer=after))
    ExactOffload().on_train_begin(None, None, None, optimizer=prepared)
    advance(second, after, gradients[steps:])
    assert second.equal(whole)
