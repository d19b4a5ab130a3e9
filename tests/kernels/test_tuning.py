"""tools/tune_kernels.py, and that the kernels are launched as its table says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_checks import DEVICE, ON_GPU

from utils.kernels import decode_attention, int_weight_gemm, tuning

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


@pytest.mark.skipif(ON_GPU, reason="the kernels run there")
def test_without_a_gpu():
    result = tune("", TRITON_INTERPRET="0")
    assert result.returncode == 2 and "the kernels do not run here" in result.stderr
