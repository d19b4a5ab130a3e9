"""A finished run makes no further step; killed before its adapter was whole, it completes it; the best is checked."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
from conftest import TINY
from safetensors.torch import load_file
from transformers import Trainer

from utils.training.checkpoints import MANIFEST_FILE, find_damage, list_checkpoints, publish, rotate, seal
from utils.training.resume_key import KEY_FILE, ResumeKey

FLAGS = "--lora_rank 4 --lr_scheduler_type constant --per_device_train_batch_size 2 --save_steps 1 --logging_steps 1"
BEST = "--eval_fraction 0.1 --load_best_model_at_end --save_total_limit 1 --learning_rate 0.5"
ADAPTER = ("README.md", "adapter_config.json", "adapter_model.safetensors", "adapter_origin.json")


@pytest.fixture(scope="module")
def train(run_script, tokens):
    def run(output_dir, flags):
        return run_script(
            f"multi_gpu_fintune_belle.py --dataset_path {tokens} --model_name_or_path {TINY} {FLAGS} "
            f"--output_dir {output_dir} {flags}"
        )

    return run


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
    out = train(run, f"{flags} --resume_from_checkpoint latest").check().out
    assert f'"steps": {3 if kind == "epochs" else 2}' in out and "train_loss" not in out
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


def write_checkpoint(directory: Path, step: int) -> Path:
    staged = directory / "staged" / f"checkpoint-{step}"
    staged.mkdir(parents=True)
    ResumeKey({}, {}).write(staged)
    (staged / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    (staged / "adapter_model.safetensors").write_text(str(step))
    seal(staged, directory / staged.name)
    return directory / staged.name


def test_rotation_follows_no_symlink(tmp_path):
    """Nor does it remove the newest checkpoint, even if another attempt left one of a later step."""
    outside = write_checkpoint(tmp_path / "outside", 1)
    (tmp_path / "run").mkdir()
    for step in (2, 9, 4, 5):
        written = write_checkpoint(tmp_path / "run", step)
    (tmp_path / "run" / "checkpoint-1").symlink_to(outside)
    rotate(written, 1, str(tmp_path / "run" / "checkpoint-2"))
    names = [path.name for path in list_checkpoints(tmp_path / "run")]
    assert names == ["checkpoint-1", "checkpoint-2", "checkpoint-5"] and not find_damage(outside)
    (tmp_path / "run" / "checkpoint-6").symlink_to(outside)
    assert not write_checkpoint(tmp_path / "run", 6).is_symlink() and not find_damage(outside)


@pytest.mark.parametrize(
    "name, text, words",
    [
        (MANIFEST_FILE, "[]", "no readable complete.json"),
        (MANIFEST_FILE, "[" * 100_000, "no readable complete.json"),
        (MANIFEST_FILE, "{}", "complete.json does not name"),
        (
            MANIFEST_FILE,
            '{"resume_key.json": 1, "trainer_state.json": 1, "adapter_model.safetensors": 1}',
            "does not say what",
        ),
        (KEY_FILE, '{"version": 2, "identity": [], "schedule": {}}', "resume_key.json: 'identity' is list"),
        (KEY_FILE, '{"version": 9, "identity": {}, "schedule": {}}', "resume_key.json has version 9"),
        (KEY_FILE, "{" * 9, "resume_key.json is not JSON"),
        ("trainer_state.json", '{"global_step": "1", "log_history": []}', "'global_step' is str"),
        ("trainer_state.json", '{"global_step": 1, "log_history": [], "x": 1}', "has x, which"),
        ("trainer_state.json", '{"log_history":' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_side_files_of_another_shape_are_damage(tmp_path, name, text, words):
    checkpoint = write_checkpoint(tmp_path, 1)
    assert find_damage(checkpoint) is None
    (checkpoint / name).write_text(text)
    if name != MANIFEST_FILE:  # with the hash of what is in it
        checkpoint = seal_again(checkpoint)
    assert words in find_damage(checkpoint)


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"trains": {}, "steps": {}}', None),
        ('{"trains": [], "steps": {}}', "run.json: 'trains' is list"),
        ("{" * 9, "run.json is not JSON"),
    ],
)
def test_checkpoints_of_earlier_releases_are_checked(tmp_path, text, words):
    """Their resume key is in run.json, and their manifest names that."""
    checkpoint = write_checkpoint(tmp_path, 1)
    (checkpoint / KEY_FILE).rename(checkpoint / "run.json")
    (checkpoint / "run.json").write_text(text)
    assert find_damage(checkpoint) == f"{KEY_FILE} is missing"  # so its own manifest still says
    damage = find_damage(seal_again(checkpoint))
    assert damage is None if words is None else words in damage


def seal_again(checkpoint: Path) -> Path:
    staged = checkpoint.parent / "staged" / checkpoint.name
    checkpoint.rename(staged)
    (staged / MANIFEST_FILE).unlink()
    seal(staged, checkpoint)
    return checkpoint


def test_files_of_two_adapters_are_never_mixed(tmp_path, monkeypatch):
    """Interrupted before any of its renames, it leaves the old adapter, the new one, or one without weights."""
    order = ("README.md", "adapter_config.json", "adapter_origin.json", "adapter_model.safetensors")
    for renames in range(5):
        directory, staged = tmp_path / str(renames) / "run", tmp_path / str(renames) / "staged"
        for path, text in ((directory, "old"), (staged, "new")):
            path.mkdir(parents=True)
            for name in order:
                (path / name).write_text(text)
        rename, count = Path.replace, []

        def stopping(path, target, rename=rename, count=count, renames=renames):
            if len(count) == renames:
                raise KeyboardInterrupt
            count.append(path)
            return rename(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", stopping)
            if renames < 4:
                with pytest.raises(KeyboardInterrupt):
                    publish(staged, directory)
            else:
                publish(staged, directory)
        texts = {(directory / name).read_text() for name in order if (directory / name).exists()}
        assert len(texts) == 1 or not (directory / "adapter_model.safetensors").exists()
    assert texts == {"new"}
