"""The memory estimate beside peaks measured on H100s (torch 2.11), and what follows from it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from tools.random_checkpoint import GLM
from utils import memory_estimate
from utils.chatglm import ChatGLMConfig
from utils.chatglm.generations import CHATGLM, CHATGLM3
from utils.chatglm.released_glm import glm_config
from utils.checkpoint import Checkpoint
from utils.memory_estimate import Load, ModelSizes, resolve_checkpointing
from utils.preflight import Request
from utils.quantization import Quantization
from utils.run_plan import advise

import pytest
import torch
from conftest import TINY

INT4 = Quantization(4)
ZERO3 = {"partitions": 1, "compiled": False}
V1 = Checkpoint(Path("chatglm-6b"), CHATGLM, ChatGLMConfig())
V3 = Checkpoint(Path("chatglm3-6b"), CHATGLM3, glm_config(GLM["chatglm3-6b"], positions_interpolated=False))


def load_of(checkpoint, tokens, compiled=True, longest=1024, packing=True, **flags):
    sizes = ModelSizes.of(checkpoint, torch.bfloat16)
    return Load(sizes, tokens, longest, packing, 8, sizes.qkv, compiled, **flags)


@pytest.mark.parametrize(
    "checkpoint, tokens, flags, measured",
    [
        (V3, 16384, {}, 55.6),  # with --quantize fp8 55.5: the weights take as much
        (V1, 16384, {}, 59.0),
        (V1, 8192, ZERO3, 51.8),
        (V3, 8192, ZERO3 | {"partitions": 2}, 58.1),
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
        monkeypatch.setattr(memory_estimate, "free_gib", lambda: free)
        monkeypatch.setattr(Load, "of", lambda *args: load)
        request = Request(None, None, checkpoint, None, wanted)
        decided = resolve_checkpointing(request, None, SimpleNamespace(use_cpu=False), torch.bfloat16)
        return decided, capsys.readouterr().out.splitlines()

    return run


def test_checkpointing_is_decided_from_it(decide):
    assert not resolve_checkpointing(Request(*[None] * 5), None, SimpleNamespace(use_cpu=True), None)
    decided, (line,) = decide(V3, 16384, 79.0)
    assert not decided and "weights 11.6" in line and line.endswith("checkpointing off, decided from that")
    decided, (line,) = decide(V3, 16384, 24.0)
    assert decided and line.endswith("checkpointing on, decided from that")
    decided, (line,) = decide(V3, 16384, 79.0, wanted=True)
    assert decided and line.endswith("checkpointing on, by the flag")
    decided, (_, warning) = decide(V3, 16384, 24.0, wanted=False)
    assert not decided and warning.endswith("leave --gradient_checkpointing False out")


def test_the_plan(run_script, tokens, tmp_path):
    """What it says of a run is what the run is; and it writes nothing."""
    train = f"multi_gpu_fintune_belle.py --dataset_path {tokens} --model_name_or_path {TINY} "
    train += f"--output_dir {tmp_path}/out --num_train_epochs 0.2"
    for flags in ("--per_device_train_batch_size 16", "--packing --pack_tokens 512 --per_device_train_batch_size 2"):
        plan = run_script(f"{train} {flags} --plan").check().out
        assert not (tmp_path / "out").exists() and "rows 300, tokens" in plan and "no GPU here" in plan
        out = run_script(f"{train} {flags} --save_strategy no --output_dir {tmp_path}/{len(flags)}").check().out
        steps = json.loads(out.splitlines()[-1])["steps"]
        trainable = re.search("trainable parameters [0-9,]+", out).group()
        assert f"steps {steps}, " in plan and trainable in plan
        for share in re.findall("([0-9.]+)% (?:padding|unfilled)", plan):
            assert 0 < float(share) < 20


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
    request = Request(None, None, V3, None)
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
