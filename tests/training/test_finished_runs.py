"""A finished run makes no further step; killed before its adapter was whole, it completes it; the best is checked."""

import json
import shutil

import datasets
import pytest
from safetensors.torch import load_file
from transformers import Trainer

from utils.training.checkpoints import list_checkpoints

FLAGS = "--lr_scheduler_type constant --save_steps 1 --logging_steps 1"
BEST = "--eval_fraction 0.1 --load_best_model_at_end --save_total_limit 1 --learning_rate 0.5"
ADAPTER = ("README.md", "adapter_config.json", "adapter_model.safetensors", "adapter_origin.json")


@pytest.fixture(scope="module")
def train(train_tiny):
    return lambda output_dir, flags: train_tiny(output_dir, f"{FLAGS} {flags}")


@pytest.fixture
def no_step(monkeypatch):
    """Fails the test if a step is made."""

    monkeypatch.setattr(Trainer, "training_step", lambda *_, **__: pytest.fail("a step too many"))


@pytest.fixture(scope="module")
def few_tokens(train, tokens, tmp_path_factory):
    path = tmp_path_factory.mktemp("few") / "tokens"
    datasets.load_from_disk(str(tokens)).select(range(5)).save_to_disk(str(path))
    shutil.copy(tokens / "origin.json", path)
    return path


@pytest.fixture(scope="module")
def finished(train, few_tokens, tmp_path_factory):
    """kind of end -> the flags and the directory of a run that ended so."""
    kinds = {
        "steps": "--max_steps 2 --save_total_limit 1",
        "epochs": f"--num_train_epochs 1 --dataset_path {few_tokens}",
        "best": f"--max_steps 2 {BEST}",
        "best saved": "--max_steps 2 --save_strategy best --eval_fraction 0.02 --eval_steps 1 --learning_rate 0.5",
    }
    runs = {}
    for kind, flags in kinds.items():
        path = tmp_path_factory.mktemp("finished") / "run"
        train(path, flags).check()
        runs[kind] = flags, path
    return runs


@pytest.mark.parametrize("kind", ("steps", "epochs", "best", "best saved"))
def test_no_step_too_many(train, finished, no_step, tmp_path, kind):
    """
    A run killed between its last checkpoint and any file of the adapter is completed, also after its directory was
    moved; an empty file, as a power cut leaves it, is written again.
    """
    flags, whole = finished[kind]
    run = tmp_path / "moved"
    shutil.copytree(whole, run)
    (run / "adapter_config.json.unfinished").write_text("half")
    for name in ADAPTER[::2]:
        (run / name).unlink()
    (run / "adapter_origin.json").write_text("")
    before = (run / "metrics.jsonl").read_text()
    summary = json.loads(train(run, f"{flags} --resume_from_checkpoint latest").check().out.splitlines()[-1])
    assert summary["steps"] == (3 if kind == "epochs" else 2)
    assert summary["train_loss"] == json.loads(before.splitlines()[-1])["train_loss"]
    assert (run / "metrics.jsonl").read_text() == before
    for name in ADAPTER:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(run.glob("*.unfinished")) and not (run / ".writing").exists()


@pytest.mark.parametrize("spoil", ("flip", "remove the file", "remove the checkpoint"))
def test_a_damaged_best_checkpoint_is_not_used(train, finished, tmp_path, spoil, no_step):
    flags, whole = finished["best"]
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    best = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())["best_global_step"]
    assert best == 1, "the wild learning rate makes the second step a worse one"
    weights = run / "checkpoint-1" / "adapter_model.safetensors"
    if spoil == "flip":
        data = bytearray(weights.read_bytes())
        data[-2] ^= 0x40
        weights.write_bytes(data)
    elif spoil == "remove the file":
        weights.unlink()
    else:
        shutil.rmtree(weights.parent)
    (run / ADAPTER[2]).unlink()
    away = whole.rename(whole.with_name("away"))  # where the run was before, the best checkpoint is whole
    result = train(run, f"{flags} --resume_from_checkpoint latest")
    away.rename(whole)
    assert result.code == 1 and "checkpoint-1, the checkpoint with the lowest loss, is damaged" in result.err, (
        result.err
    )
    assert "Traceback" not in result.err and not (run / ADAPTER[2]).exists()
    without = flags.replace("--load_best_model_at_end", "")
    train(run, f"{without} --resume_from_checkpoint latest").check()
    saved, last = (load_file(path / ADAPTER[2]) for path in (run, run / "checkpoint-2"))
    assert all(saved[name].equal(last[name]) for name in last)


def test_a_named_earlier_checkpoint(train, tmp_path):
    """Later ones are of another attempt: they are set aside, so that "latest" is one that this run writes."""
    train(tmp_path, "--max_steps 3").check()
    flags = f"--max_steps 2 --save_total_limit 1 --resume_from_checkpoint {tmp_path}/checkpoint-1"
    out = train(tmp_path, flags).check().out
    assert f"did not lead to; the earlier checkpoints are in {tmp_path}/previous-1" in out
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert [path.name for path in list_checkpoints(tmp_path / "previous-1")] == ["checkpoint-2", "checkpoint-3"]
