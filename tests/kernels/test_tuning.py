"""tools/tune_kernels.py, and that the kernels are launched as its table says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_checks import DEVICE, DTYPE, ON_GPU
from torch import nn

from tools import tune_kernels
from utils.kernels import decode_attention, int_weight_gemm, skinny_gemm, tuning
from utils.layers.skinny_linear import SkinnyLinear, use_skinny_layers

ROOT = Path(__file__).resolve().parents[2]
NAME = tuning.card_name(DEVICE)


def tune(flags: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/tune_kernels.py", *flags.split()]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)


@pytest.fixture
def use_table(monkeypatch):
    return lambda table: monkeypatch.setattr(tuning, "read_table", lambda: table)


@pytest.mark.skipif(ON_GPU, reason="which tiles are faster there is not known before")
def test_the_kernels_read_what_the_tuner_writes(tmp_path, use_table):
    """It keeps what the file has; other sizes keep the kernel's own rule."""
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"another card": {"decode_attention": {"2 heads": {"warps": 8}}}}))
    result = tune(f"--shape tiny-glm --kernels int_weight_gemm --output {file}")
    assert result.returncode == 0, result.stderr
    table = json.loads(file.read_text())
    assert table["another card"] == {"decode_attention": {"2 heads": {"warps": 8}}}
    measured = table[NAME]["int_weight_gemm"]
    gated = torch.zeros(256, 64, dtype=torch.int8, device=DEVICE)
    assert "16 rows, int8 256 x 64, gated" in measured  # fewer, larger tiles are faster
    other = int_weight_gemm.tiling_for(3, gated[:100], 8, gated=True)
    use_table(table)
    chosen = int_weight_gemm.tiling_for(3, gated, 8, gated=True)
    assert chosen == int_weight_gemm.Tiling(**measured["16 rows, int8 256 x 64, gated"])
    assert int_weight_gemm.tiling_for(3, gated[:100], 8, gated=True) == other


def test_splits_of_attention_have_pages_and_counters(use_table):
    """A name stands for several batch sizes, and for any number of pages."""
    settings = {"splits": 8, "warps": 2, "stages": 5}
    use_table({NAME: {"decode_attention": {"64 heads": settings, "1024 heads": settings}}})
    for heads, pages, splits in ((64, 9, 8), (33, 3, 4), (1024, 9, 1)):
        assert decode_attention.launch_for(heads, pages, DEVICE) == decode_attention.Launch(splits, 2, 5)
    assert decode_attention.launch_for(32, 9, DEVICE).warps == 4


CONFIG = SimpleNamespace(
    hidden_size=1024, intermediate_size=512, head_dim=64, num_attention_heads=16, num_key_value_heads=2
)


def test_every_launch_of_attention_that_is_tried_runs(monkeypatch):
    """The kernel's own stays where it is the fastest."""
    monkeypatch.setattr(tune_kernels, "BATCH_SIZES", (1,))
    (case,) = tune_kernels.attention_cases(CONFIG, DTYPE, DEVICE)
    tried = []

    def measure(call) -> float:
        call(0)
        tried.append(call.args[0])
        return float(tried[-1] != case.settings)

    assert tune_kernels.fastest(case, measure) == (case.settings, 0.0, 0.0)
    assert (
        len(tried)
        == len(set(tried))
        == 1 + sum(value != getattr(case.settings, name) for name, values in case.choices.items() for value in values)
    )


@pytest.mark.parametrize("lost_at, reach", [(1, 0), (3, 16)])
def test_the_reach_ends_where_torch_is_faster(use_table, lost_at, reach):
    """Layers of a weight with a reach of 0 stay stock ones; small weights are not measured."""
    times = []

    def measure(call) -> float:
        if len(times) < 2:
            call(0)
        times.append(None)
        rows, is_ours = (len(times) - 1) // 2 + 1, len(times) % 2
        return float(is_ours and rows == lost_at)

    first = next(tune_kernels.measure_reach(CONFIG, DTYPE, DEVICE, measure))
    assert first[:2] == ("16 bits 1280 x 1024", {"max_rows": reach}) and len(times) == 2 * lost_at
    use_table({NAME: {"skinny_gemm": dict([first[:2]])}})
    block = nn.ModuleDict({"qkv_proj": nn.Linear(1024, 1280, dtype=DTYPE, device=DEVICE)})
    use_skinny_layers(block, skinny_gemm)
    assert type(block["qkv_proj"]) is (SkinnyLinear if reach else nn.Linear)
    assert getattr(block["qkv_proj"], "max_skinny_rows", 0) == reach
    works = [work for work, *_ in tune_kernels.measure_reach(CONFIG, DTYPE, DEVICE, lambda call: 0.0)]
    assert "16 bits 1024 x 512" not in works and len(works) >= 3


@pytest.mark.skipif(ON_GPU, reason="the kernels run there")
def test_without_a_gpu():
    result = tune("", TRITON_INTERPRET="0")
    assert result.returncode == 2 and "the kernels do not run here" in result.stderr
