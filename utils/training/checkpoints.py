"""
The checkpoints of a training run: each appears whole or not at all, is checked before use, and only resumes its own
run.

trainer.py lets Trainer write a checkpoint into a staging directory; `save_sealed` then syncs and hashes its files into
a manifest and renames it to its place. `find_resumable` picks the newest whole one when a run resumes, `start_afresh`
and `set_aside_later` keep other attempts apart, `publish` moves the finished adapter into --output_dir.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from utils.common.console import print_line
from utils.common.errors import UsageError
from utils.common.json_files import read_json_object
from utils.common.processes import is_main_process, local_rank
from utils.distributed.collectives import barrier, gather_from_all
from utils.training.resume_key import KEY_FILE, VERSION_1_FILE, ResumeKey

MANIFEST_FILE = "complete.json"  # path -> size and sha256 of every other file; written last
STAGING = ".writing"  # directory in --output_dir for what is not whole yet
UNFINISHED = ".unfinished"  # suffix of a file of the final adapter that is not in its place yet
RUN_LOCK_FILE = ".lock"
NAME = re.compile("checkpoint-(0|[1-9][0-9]*)")
ASIDE = re.compile("previous-([0-9]+)")  # directories that `set_aside` makes
STATE_TYPES = {"global_step": int, "log_history": list}


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name; -1 for other names."""
    match = NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints in a directory by step, whole or damaged."""
    checkpoints = [path for path in directory.glob("checkpoint-*") if step_of(path) >= 0 and path.is_dir()]
    return sorted(checkpoints, key=step_of)


def remove(path: Path) -> None:
    """
    Remove a directory tree, or a symlink but not its target.

    A path that does not exist is no error: another machine may remove the same tree of a shared disk at the same time.
    """
    if path.is_symlink():
        path.unlink(missing_ok=True)
    elif path.exists():
        shutil.rmtree(path, onerror=_unless_gone)


def _unless_gone(_function: Callable, _path: str, raised: tuple[type, BaseException, Any]) -> None:
    if not isinstance(raised[1], FileNotFoundError):
        raise raised[1]


def seal(staged: Path, final: Path) -> None:
    """
    Give a written checkpoint its manifest and its final name.

    A power cut afterwards loses nothing of it.
    """
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(staged)): _describe(path) for path in files}
    (staged / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (*files, staged / MANIFEST_FILE, *(p for p in staged.rglob("*") if p.is_dir()), staged):
        _sync(path)
    replaced = staged.with_name(f"replaced-{final.name}")  # an earlier attempt at this step, or a symlink
    remove(replaced)
    if final.is_symlink() or final.exists():
        final.rename(replaced)
    staged.rename(final)
    _sync(final.parent)
    remove(replaced)


def publish(staged: Path, directory: Path) -> None:
    """
    Move the files of a written adapter into `directory`.

    Whenever this is interrupted, the files there are of one adapter: the weights come last, and old weights are
    removed first unless no other file changes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = sorted((path.name for path in staged.iterdir()), key=lambda name: (name == SAFETENSORS_WEIGHTS_NAME, name))
    for name in names:
        shutil.copyfile(staged / name, directory / f"{name}{UNFINISHED}")
        _sync(directory / f"{name}{UNFINISHED}")
    changed = [name for name in names[:-1] if not _same_content(staged / name, directory / name)]
    if changed:
        (directory / SAFETENSORS_WEIGHTS_NAME).unlink(missing_ok=True)
        _sync(directory)
    for name in names:
        (directory / f"{name}{UNFINISHED}").replace(directory / name)
    _sync(directory)
    remove(staged)


def _same_content(first: Path, second: Path) -> bool:
    return second.is_file() and _describe(first) == _describe(second)


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint; None if it is whole."""
    try:
        manifest = read_json_object(checkpoint / MANIFEST_FILE)
    except UsageError:
        return f"it has no readable {MANIFEST_FILE}"
    key_file = VERSION_1_FILE if VERSION_1_FILE in manifest and KEY_FILE not in manifest else KEY_FILE
    absent = {key_file, TRAINER_STATE_NAME, SAFETENSORS_WEIGHTS_NAME} - manifest.keys()
    if absent and is_main_process():  # another machine with a disk of its own has only its shards
        return f"{MANIFEST_FILE} does not name {min(absent)}"
    for name, expected in manifest.items():
        path = checkpoint / name
        if not isinstance(expected, dict) or not isinstance(expected.get("size"), int):
            return f"{MANIFEST_FILE} does not say what {name} must be"
        if ".." in Path(name).parts or Path(name).is_absolute():
            return f"{MANIFEST_FILE} names a file elsewhere, {name}"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes, not {expected['size']}"
        if _describe(path) != expected:
            return f"{name} has other content than was written"
    try:
        if key_file in manifest:
            ResumeKey.read(checkpoint)
        if TRAINER_STATE_NAME in manifest:
            read_state(checkpoint)
    except UsageError as error:
        return str(error).removeprefix(f"{checkpoint}{os.sep}")
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """
    Return the run's state as Trainer wrote it, see TrainerState.

    Raises:
        UsageError: the file has another shape.
    """
    state = read_json_object(checkpoint / TRAINER_STATE_NAME, STATE_TYPES)
    unknown = state.keys() - {field.name for field in fields(TrainerState)}
    if unknown:
        raise UsageError(
            f"{checkpoint / TRAINER_STATE_NAME} has {min(unknown)}, which this version of transformers does not know"
        )
    return state


def save_sealed(staged: Path, final: Path) -> None:
    """
    Seal the checkpoint that all processes have written.

    Every process must call it: on a disk that the machines share the main process seals for all, else the first
    process of each machine seals its own files.
    """
    barrier()
    if is_main_process():
        seal(staged, final)
    barrier()
    if local_rank() == 0:
        if staged.exists():
            seal(staged, final)
        remove(staged.parent)
    barrier()


def rotate(written: Path, limit: int | None, best: str | None) -> None:
    """
    Remove the oldest checkpoints beyond `limit`.

    `best` and `written`, the newest one, always stay. A symlink is no checkpoint of the run: it is not counted and
    stays.
    """
    if not limit or limit < 1:
        return
    older = [path for path in list_checkpoints(written.parent) if not path.is_symlink() and path.name != written.name]
    for path in older[: max(0, len(older) + 1 - limit)]:
        if not best or path.resolve() != Path(best).resolve():
            remove(path)


@contextlib.contextmanager
def claim(output_dir: str) -> Iterator[None]:
    """
    Keep other runs away from `output_dir` until the block ends.

    The death of the process ends it too.

    Raises:
        UsageError: another run writes there.
    """
    if not is_main_process():  # machines may share the directory, and its lock
        yield
        return
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    with (Path(output_dir) / RUN_LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"--output_dir {output_dir} is in use by a run that has not ended: stop it first"
            ) from None
        yield


def find_resumable(resume_from: str, output_dir: str, key: ResumeKey) -> Path | None:
    """
    Return the checkpoint to resume from; None for "latest" without one.

    It is the newest whole one up to the one named, or for "latest" of all in `output_dir`. Every process must call it,
    and gets the same.

    Raises:
        UsageError: a named checkpoint does not exist, all are damaged, or it was written by a run with another key.
    """
    latest = resume_from == "latest"
    directory = Path(output_dir) if latest else Path(resume_from).parent
    candidates = list_checkpoints(directory)
    if not latest:
        if step_of(Path(resume_from)) < 0 or not Path(resume_from).is_dir():
            raise UsageError(f"--resume_from_checkpoint {resume_from} is no checkpoint directory; 'latest' finds one")
        candidates = [path for path in candidates if step_of(path) <= step_of(Path(resume_from))]
    whole = set()
    for path in candidates:
        damage = find_damage(path)
        if damage:
            print_line(f"{path} is skipped: {damage}")
        else:
            whole.add(step_of(path))
    common = set.intersection(*gather_from_all(whole))
    if not common:
        if not latest:
            raise UsageError(f"--resume_from_checkpoint {resume_from}: no checkpoint up to it is whole")
        print_line(f"{output_dir} has no checkpoint to resume from: starting afresh")
        return None
    checkpoint = directory / f"checkpoint-{max(common)}"
    differences = next(filter(None, gather_from_all(_differences(checkpoint, key))), "")
    if differences:
        raise UsageError(
            f"{checkpoint} was written by a run with {differences}: give it the same, or start another run"
        )
    return checkpoint


def _differences(checkpoint: Path, key: ResumeKey, identity_only: bool = False) -> str:
    """
    Return what differs from a checkpoint's key.

    A machine whose own disk has only shards of the checkpoint compares nothing.
    """
    has_key = any((checkpoint / name).is_file() for name in (KEY_FILE, VERSION_1_FILE))
    return ResumeKey.read(checkpoint).differences(key, identity_only) if has_key or is_main_process() else ""


def start_afresh(output_dir: str, key: ResumeKey) -> None:
    """
    Set aside the checkpoints of an earlier attempt at the same run.

    A line says so. Every process must call it.

    Raises:
        UsageError: the checkpoints in `output_dir` are those of a run that trained something else.
    """
    directory = Path(output_dir)
    checkpoints = list_checkpoints(directory)
    newest = next((path for path in reversed(checkpoints) if not find_damage(path)), None)
    if newest:
        differences = _differences(newest, key, identity_only=True)
        if differences:
            raise UsageError(
                f"--output_dir {output_dir} holds checkpoints of another run, with {differences}: give another "
                "directory"
            )
    content = f"{newest.name} of this run" if newest else "damaged checkpoints"
    set_aside(
        output_dir,
        checkpoints,
        f"{directory} holds {content}: --resume_from_checkpoint latest would have resumed from it. Starting afresh",
    )


def set_aside_later(output_dir: str, resumed_from: Path) -> None:
    """
    Set aside checkpoints later than the one that this run resumes from.

    They are of other attempts; "latest" is then one of this run. Every process must call it.
    """
    directory = Path(output_dir)
    is_own = directory.resolve() == resumed_from.parent.resolve()
    others = [path for path in list_checkpoints(directory) if not is_own or step_of(path) > step_of(resumed_from)]
    set_aside(output_dir, others, f"{directory} holds checkpoints that {resumed_from} did not lead to")


def set_aside(output_dir: str, checkpoints: list[Path], why: str) -> None:
    """
    Move checkpoints on each machine into a directory previous-N.

    A line says so. Every process must call it.
    """
    barrier()
    if checkpoints and is_main_process():
        print_line(f"{why}; the earlier checkpoints are in {_move_aside(Path(output_dir), checkpoints)}")
    barrier()
    if local_rank() == 0:  # another machine with a disk of its own
        remaining = [path for path in checkpoints if path.exists()]
        if remaining:
            _move_aside(Path(output_dir), remaining)
    barrier()


def _move_aside(directory: Path, checkpoints: list[Path]) -> Path:
    numbers = [int(match[1]) for path in directory.iterdir() if (match := ASIDE.fullmatch(path.name))]
    aside = directory / f"previous-{1 + max(numbers, default=0)}"
    aside.mkdir()
    for path in checkpoints:
        path.rename(aside / path.name)
    return aside


def _describe(path: Path) -> dict[str, Any]:
    """Return size and sha256 of a file."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
