"""The memory estimate beside peaks measured on H100s (torch 2.11), and what follows from it."""

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

from tools.random_checkpoint import GLM
from utils.checkpoint.model import Checkpoint
from utils.layers.quantization import Quantization
from utils.models import ChatGLMConfig
from utils.models.convert_checkpoint import glm_config
from utils.models.family import CHATGLM3, CHATGLM_6B
from utils.training import dry_run, memory
from utils.training.dry_run import advise
from utils.training.memory import MemoryModel, ModelSizes, resolve_checkpointing
from utils.training.run_config import TrainingRequest

INT4 = Quantization(4)
ZERO3 = {"partitions": 1, "compiled": False}
V1 = Checkpoint(Path("chatglm-6b"), CHATGLM_6B, ChatGLMConfig())
V3 = Checkpoint(Path("chatglm3-6b"), CHATGLM3, glm_config(GLM["chatglm3-6b"], positions_interpolated=False))


def load_of(checkpoint, tokens, compiled=True, longest=1024, packing=True, **flags):
    sizes = ModelSizes.of(checkpoint, torch.bfloat16)
    return MemoryModel(sizes, tokens, longest, packing, 8, sizes.layers.qkv, compiled, **flags)


@pytest.mark.parametrize(
    "checkpoint, tokens, flags, measured",
    [
        (V3, 16384, {}, 55.6),  # with --quantize fp8 55.5: the weights take as much
        (V1, 16384, {}, 59.0),
        (V1, 16384, {"partitions": 1}, 60.8),
        (V3, 16384, {"partitions": 1}, 55.7),
        (replace(V1, quantization=INT4, quantizes=True), 8192, {"checkpointing": True}, 9.27),
        (V3, 8 * 1024, {"compiled": False, "checkpointing": True}, 14.8),
    ],
)
def test_measured_peaks(checkpoint, tokens, flags, measured):
    assert load_of(checkpoint, tokens, **flags).gib() == pytest.approx(measured, rel=0.06)


def test_what_ran_out_of_memory():
    assert load_of(V3, 16384, **ZERO3).gib() > 80


@pytest.fixture
def decide(monkeypatch, capsys):
    """decide(checkpoint, tokens, free, wanted) -> whether it checkpoints, and the lines it says so in."""

    def run(checkpoint, tokens, free, wanted=None, **flags):
        load = load_of(checkpoint, tokens, **flags)
        monkeypatch.setattr(memory, "free_gib", lambda: free)
        monkeypatch.setattr(MemoryModel, "of", lambda *args: load)
        request = TrainingRequest(None, None, checkpoint, None, wanted)
        decided = resolve_checkpointing(request, None, SimpleNamespace(use_cpu=False), torch.bfloat16)
        return decided, capsys.readouterr().out.splitlines()

    return run


def test_checkpointing_is_decided_from_it(decide):
    assert not resolve_checkpointing(TrainingRequest(*[None] * 5), None, SimpleNamespace(use_cpu=True), None)
    decided, (line,) = decide(V3, 16384, 79.0)
    assert not decided and "weights 11.6" in line and line.endswith("checkpointing off, decided from that")
    decided, (line,) = decide(V3, 16384, 24.0)
    assert decided and line.endswith("checkpointing on, decided from that")
    decided, (_, hint) = decide(V3, 16384, 40.0)
    assert decided and hint.endswith("mostly faster: --per_device_train_batch_size 1 --pack_tokens 8192")
    decided, (line,) = decide(V3, 16384, 79.0, wanted=True)
    assert decided and line.endswith("checkpointing on, by the flag")
    decided, (_, warning) = decide(V3, 16384, 24.0, wanted=False)
    assert not decided and warning.endswith("leave --gradient_checkpointing False out")


def test_the_plan(run_script, tokens, tmp_path, monkeypatch):
    """What it says of a run is what the run is; and it writes nothing."""
    train = f"multi_gpu_fintune_belle.py --dataset_path {tokens} --model_name_or_path {TINY} "
    train += f"--output_dir {tmp_path}/out --num_train_epochs 0.2"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for flags in ("--per_device_train_batch_size 16", "--packing --pack_tokens 512 --per_device_train_batch_size 2"):
        plan = run_script(f"{train} {flags} --eval_fraction 0.1 --report_to tensorboard --plan").check().out
        assert "tokens/s" in plan and not list((tmp_path / "temporary").iterdir())
        plan = run_script(f"{train} {flags} --plan").check().out
        assert not (tmp_path / "out").exists() and "rows 300, tokens" in plan and "no GPU here" in plan
        out = run_script(f"{train} {flags} --save_strategy no --output_dir {tmp_path}/{len(flags)}").check().out
        steps = json.loads(out.splitlines()[-1])["steps"]
        trainable = re.search("trainable parameters [0-9,]+", out).group()
        assert f"steps {steps}, " in plan and trainable in plan
        for share in re.findall("([0-9.]+)% (?:padding|unfilled)", plan):
            assert 0 < float(share) < 20


@pytest.mark.parametrize("processes, flags", [(1, ""), (2, "--deepspeed ds_config_zero3.json")])
def test_the_planned_time_is_that_of_the_run(run_ranks, tokens, tmp_path, processes, flags):
    """Within a factor of 3, as steps of the tiny checkpoint on a shared CPU are far from even."""
    train = f"multi_gpu_fintune_belle.py --dataset_path {tokens} --model_name_or_path {TINY} "
    train += f"--output_dir {tmp_path}/out --num_train_epochs 1 --per_device_train_batch_size 4 {flags}"
    train += " --save_strategy no"
    plan = run_ranks(processes, f"{train} --plan").check().out
    assert not (tmp_path / "out").exists()
    planned = int(re.search(r"the run takes .* \(([0-9]+) s\)", plan)[1])
    seconds = json.loads(run_ranks(processes, train).check().out.splitlines()[-1])["train_runtime"]
    assert planned / 3 < seconds < planned * 3, (planned, seconds)


def test_the_time_of_a_run_from_its_speed():
    speed = {"first_step_seconds": 2.0, "tokens_per_second": 100.0, "seconds_a_step": 0.5, "peak_gib": 20.0}
    said = dry_run.describe_speed(speed, load_of(V3, 8192), steps=11, tokens=1100)
    assert "100 tokens/s, 0.5 s a step, the first 2 s" in said
    assert "the run takes 0:00:12 (12 s)" in said and "20.0 GiB at its peak" in said


def test_steps_that_will_not_fit_are_not_tried(monkeypatch, capsys):
    monkeypatch.setattr(dry_run, "free_gib", lambda on_cpu: 12.0)
    monkeypatch.setattr(dry_run, "describe_plan", lambda *_: "")
    monkeypatch.setattr(dry_run, "row_lengths", lambda _: [1024])
    monkeypatch.setattr(MemoryModel, "of", lambda *_: load_of(V3, 8192))
    flags = SimpleNamespace(packing=False)
    batches = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "world_size": 1, "max_steps": 5}
    args = SimpleNamespace(use_cpu=False, gradient_checkpointing=False, **batches)
    request = TrainingRequest(None, None, V3, None)
    dry_run.plan(request, flags, args, torch.bfloat16, lambda: pytest.fail("the model is loaded"))
    said = capsys.readouterr().out
    assert "speed not measured: " in said and "advice: DDP over 4 bits" in said


def test_weights_under_fsdp2(monkeypatch):
    """A half on each of two cards, two blocks gathered, and the head."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(memory, "row_lengths", lambda _: [1024])
    flags = {"packing": True, "pack_tokens": 8192, "lora_rank": 8, "lora_target_modules": ["q_proj"]}
    args = SimpleNamespace(per_device_train_batch_size=1, world_size=2, deepspeed_plugin=None)
    load = MemoryModel.of(
        TrainingRequest(None, None, V3, None), SimpleNamespace(**flags, compile_layers=True), args, torch.bfloat16
    )
    whole = replace(load, fsdp=False, partitions=None, optimizer_partitions=1)
    block = 2 * (4096 * 4096 * 2 + 4096 * 512 + 4096 * 13696 * 3 + 4608 + 2 * 4096)  # q, o; k, v; MLP; biases; norms
    head = 2 * 65024 * 4096
    gathered = (2 * block + head) / 2**30
    assert load.parts()["weights"] == pytest.approx(whole.parts()["weights"] / 2 + gathered, rel=1e-3)
    assert load.parts()["optimizer"] == whole.parts()["optimizer"] / 2
    assert load.values_kept() == whole.values_kept()


@pytest.mark.parametrize(
    "room, processes, advice",
    [
        (75.0, 1, "DDP, --packing --per_device_train_batch_size 1 --pack_tokens 16384 ("),
        (36.0, 1, "DDP, --packing --per_device_train_batch_size 1 --pack_tokens 8192 ("),
        (20.0, 1, "DDP, --packing --per_device_train_batch_size 1 --pack_tokens 16384 --gradient_checkpointing ("),
        (12.0, 8, "ZeRO-3, --packing --per_device_train_batch_size 1 --pack_tokens 16384 --deepspeed ds_config"),
        (10.0, 1, "DDP over 4 bits, --packing --per_device_train_batch_size 1 --pack_tokens 16384 --quantize int4"),
        (2.0, 1, "accelerate launch"),
    ],
)
def test_advice(room, processes, advice):
    request = TrainingRequest(None, None, V3, None)
    found = advise(load_of(V3, 8192), request, processes, room, torch.bfloat16)
    assert found.startswith(advice), found


def test_the_flag_that_makes_it_fit(decide):
    def mend(*arguments, **flags):
        _, (_, warning) = decide(*arguments, **flags)
        return warning.partition("GPU's memory: ")[2]

    assert mend(V3, 32768, 18.0) == "give --per_device_train_batch_size 1 --pack_tokens 8192"
    assert mend(V3, 32 * 1024, 18.0, packing=False, compiled=False) == "give --per_device_train_batch_size 8"
    assert mend(V3, 16384, 12.0) == "give --quantize int8 --per_device_train_batch_size 1 --pack_tokens 8192"
    assert "accelerate_ds_zero3_cpu_offload_config.yaml" in mend(V3, 16384, 4.0)
