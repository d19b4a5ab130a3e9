"""tools/doctor.py says what is wrong with a model directory, and how it is mended."""

import shutil

import pytest
from conftest import GOLDEN, TINY


@pytest.mark.parametrize(
    "name, file, spoil, words",
    [
        ("chatglm3-6b-tiny", "model-00001-of-00002.safetensors", lambda data: data[:-10], "its header speaks of"),
        ("chatglm3-6b-tiny", "model-00001-of-00002.safetensors", lambda data: data[:30], "its header is cut"),
        ("chatglm-6b-tiny", "pytorch_model-00002-of-00002.bin", lambda data: data[:-200], "its end is missing"),
        (
            "chatglm-6b-tiny",
            "pytorch_model-00002-of-00002.bin",
            lambda data: b"version https://git-lfs",
            "git lfs pull",
        ),
        ("chatglm-6b-tiny", "pytorch_model-00002-of-00002.bin", lambda data: None, "lacks 1 of its weight files"),
        ("chatglm-6b-tiny", "ice_text.model", lambda data: None, "-> download it"),
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


def test_a_whole_one(run_script):
    out = run_script(f"tools/doctor.py --model_name_or_path {TINY}").out
    assert "ok  torch" in out and "ok  model.safetensors" in out and "back ends" in out
    model = out[out.index("model  ") :]
    assert "BAD" not in model
