"""Checkpoints and adapters on disk: whole or absent, checked, rotated, and removed on disks that machines share."""

import json
import threading
from pathlib import Path

import pytest

from utils.training.checkpoints import MANIFEST_FILE, find_damage, list_checkpoints, publish, remove, rotate, seal
from utils.training.resume_key import KEY_FILE, ResumeKey


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


def test_machines_that_share_a_disk_remove_the_same_directory(tmp_path):
    """At the same time, without an error."""
    for number in range(10):
        directory, failed = tmp_path / str(number), []
        for name in ("a", "b", "c"):
            (directory / name).mkdir(parents=True)
            for number_of_file in range(60):
                (directory / name / str(number_of_file)).touch()
        start = threading.Barrier(4)

        def machine(directory=directory, failed=failed, start=start):
            start.wait()
            try:
                remove(directory)
            except OSError as error:
                failed.append(error)

        machines = [threading.Thread(target=machine) for _ in range(4)]
        for thread in machines:
            thread.start()
        for thread in machines:
            thread.join()
        assert not failed and not directory.exists()
