"""tools/doctor.py says what is wrong with a model directory, and the fix."""

import json
import shutil

import pytest
from conftest import GOLDEN, TINY

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
