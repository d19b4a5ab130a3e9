"""tools/doctor.py says what is wrong with a model directory, and the fix; and what cards can train."""

import json
import re
import shlex
import shutil

import pytest
import torch
from conftest import GOLDEN, ROOT, TINY

from tools.trainable import ROW_TOKENS, ROWS, Cards, plans
from utils.training.arguments import make_parser

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1018370\n"


@pytest.mark.parametrize(
    "name, file, spoil, words",
    [
        ("chatglm3-6b-tiny", "model-00001-of-00002.safetensors", lambda data: data[:-10], "its header speaks of"),
        ("chatglm3-6b-tiny", "model-00001-of-00002.safetensors", lambda data: data[:30], "its header is cut"),
        ("chatglm-6b-tiny", "pytorch_model-00002-of-00002.bin", lambda data: data[:-200], "its end is missing"),
        (
            "chatglm-6b-tiny",
            "pytorch_model-00002-of-00002.bin",
            lambda data: POINTER,
            "is a Git LFS pointer, not the file: run `git lfs pull`",
        ),
        ("chatglm3-6b-tiny", "model-00001-of-00002.safetensors", lambda data: POINTER, "git lfs pull"),
        ("chatglm-6b-tiny", "ice_text.model", lambda data: POINTER, "run `git lfs pull`"),
        ("chatglm3-6b-tiny", "config.json", lambda data: POINTER, "run `git lfs pull`"),
        ("chatglm-6b-tiny", "pytorch_model-00002-of-00002.bin", lambda data: None, "lacks 1 of its weight files"),
        ("chatglm-6b-tiny", "ice_text.model", lambda data: None, "has no ice_text.model"),
    ],
)
def test_a_cut_checkpoint(run_script, tmp_path, name, file, spoil, words):
    directory = shutil.copytree(GOLDEN / name, tmp_path / "checkpoint")
    data = spoil((directory / file).read_bytes())
    (directory / file).unlink()
    if data is not None:
        (directory / file).write_bytes(data)
    result = run_script(f"tools/doctor.py --model_name_or_path {directory}")
    assert result.code == 1 and words in result.out and "BAD" in result.out and "Traceback" not in result.err


def test_a_whole_one(run_script, tmp_path):
    """Also if the total size in its index is another: releases count weights that files share, or lack."""
    directory = shutil.copytree(GOLDEN / "chatglm3-6b-tiny", tmp_path / "checkpoint")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    index.write_text(json.dumps(content | {"metadata": {"total_size": 1 << 40}}), encoding="utf-8")
    out = run_script(f"tools/doctor.py --model_name_or_path {directory}").out
    assert "BAD" not in out[out.index("model  ") :] and "#" not in out
    out = run_script(f"tools/doctor.py --model_name_or_path {TINY}").out
    assert "ok  torch" in out and "ok  model.safetensors" in out and "back ends" in out
    model = out[out.index("model  ") :]
    assert "BAD" not in model


@pytest.mark.parametrize(
    "count, name, gib, model, flags, measured_gib, measured_speed",
    [  # docs/benchmarks.md; H100s that were limited to 24 and 16 GB; the latter fits in 12
        (1, "H100", 80, "ChatGLM3-6B", "--pack_tokens 16384", 54.8, 23131),
        (1, "NVIDIA H100 80GB HBM3", 80, "ChatGLM-6B", "--pack_tokens 16384", 58.8, 21633),
        (1, "h100", 80, "GLM-4-9B", "--pack_tokens 8192", 51.6, 14113),
        (1, "H100", 24, "ChatGLM3-6B", "--pack_tokens 16384 --gradient_checkpointing", 18.0, 14989),
        (1, "H100", 12, "ChatGLM3-6B", "--pack_tokens 16384 --quantize int4 --gradient_checkpointing", 10.3, 14636),
        (2, "H200", 141, "ChatGLM3-6B", "--pack_tokens 16384", 54.6, 46471),
    ],
)
def test_what_known_cards_train(count, name, gib, model, flags, measured_gib, measured_speed):
    (plan,) = (plan for plan in plans(Cards.asked_for(count, name, gib)) if plan.model == model)
    assert plan.command.endswith(f"--per_device_train_batch_size 1 {flags}")
    assert plan.recipe.memory.gib() == pytest.approx(measured_gib, rel=0.06)
    assert ROWS * ROW_TOKENS / plan.seconds == pytest.approx(measured_speed, rel=0.11)


@pytest.mark.parametrize("count, gib, name", [(2, 24, "RTX 4090"), (1, 8, "of the future"), (1, 4, "A10")])
def test_its_commands_are_those_of_the_training_script(count, gib, name):
    known, launchers = "4090" in name, set()
    for plan in plans(Cards.asked_for(count, name, gib)):
        if plan.recipe is None:
            assert gib < 10 and "does not fit" in plan.describe()
            continue
        assert (plan.seconds is not None) == (known and not plan.recipe.name.startswith("ZeRO-3"))
        launcher, flags = re.split(r"multi_gpu_fintune_belle\.py ", plan.command)
        launchers.add(launcher.split()[0])
        values = make_parser("").parse_args(shlex.split(flags))
        assert values.bf16 and values.packing and values.pack_tokens == plan.recipe.memory.tokens
        assert all((ROOT / word).is_file() for word in plan.command.split() if word.endswith((".json", ".yaml")))
        assert plan.recipe.memory.gib() < gib
    assert launchers == {24: {"torchrun"}, 8: {"python", "accelerate"}, 4: set()}[gib]


def test_what_it_prints_of_cards(run_script):
    out = run_script("tools/doctor.py --gpus 2 --gpu A100 --gpu_gib 40").out
    lines = out[out.index("what 2 x A100 of 40 GiB can train") :].splitlines()
    commands = [lines.index(line) for line in lines if "torchrun" in line or "accelerate launch" in line]
    assert len(commands) == 6 and all(lines[index].endswith(" \\") for index in commands)
    assert all(len(line) <= 100 for line in lines[:-1]) and "speed measured on H100s" in out and "  ok  " not in out
    trains = json.loads(lines[-1])["trains"]
    assert len(trains) == 6 and {"GLM-4-9B-0414", "GLM-4-32B-0414"} < trains.keys()
    assert all(1 < plan["hours"] < 50 and plan["gib"] < 38 for plan in trains.values())
    out = run_script("tools/doctor.py").out
    assert "ok  optional        sacrebleu jieba rouge_score gradio\n" in out
    assert torch.cuda.is_available() or ("make demo" in out and json.loads(out.splitlines()[-1])["trains"] == {})
    for flags in ("--gpus 2", "--gpu A100", "--gpu_gib 0", "--gpu_gib 80 --gpus 0"):
        result = run_script(f"tools/doctor.py {flags}")
        assert result.code == 2 and "--gpu_gib" in result.err, flags
