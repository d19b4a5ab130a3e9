"""The demo teaches the tiny checkpoint a new task; its shipped rows and checkpoint are as their scripts write them."""

import json

from conftest import ROOT, TINY

from tools.tiny_corpus import BASE_TASKS, sample_files
from utils.checkpoint.model import Checkpoint
from utils.distributed.process_group import free_port


def test_demo_learns_the_task(run_command, tmp_path):
    result = run_command(
        f"python tools/demo.py --work_dir {tmp_path}/demo --master_port {free_port()}", timeout=1200
    ).check()
    summary = json.loads(result.out.strip().splitlines()[-1])
    assert summary["exact_match_before"] <= 0.05
    assert summary["exact_match_after"] >= 0.9


def test_sample_rows_are_those_that_the_script_writes():
    for name, rows in sample_files().items():
        lines = (ROOT / "data" / name).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows


def test_held_out_rows_were_not_trained_on():
    files = sample_files()
    trained = {row["input"] for row in files["sample.train.json"]}
    assert len(trained) == 300
    assert not trained & {row["input"] for row in files["sample.heldout.json"]}
    base_instructions = {instruction for instructions in BASE_TASKS for instruction in instructions}
    assert not base_instructions & {row["instruction"] for row in files["sample.train.json"]}


def test_tiny_checkpoint_is_small_and_has_the_architecture():
    files = [path for path in TINY.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    assert {"model.safetensors", "config.json", "ice_text.model"} <= {path.name for path in files}
    config = Checkpoint.open(str(TINY)).config
    assert (config.model_type, config.num_layers, config.num_attention_heads) == ("chatglm", 4, 8)
