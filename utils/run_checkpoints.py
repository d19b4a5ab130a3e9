"""
The checkpoints of a training run: each appears whole or not at all, is checked before it is used, and is used only by
the run that wrote it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.distributed import barrier, gather_from_all, is_main_process, local_rank, print_once
from utils.errors import UsageError

MANIFEST_FILE = "complete.json"  # path -> size and sha256 of every other file; written last
RUN_FILE = "run.json"  # the settings of the run, see utils.training.describe_settings
STAGING = ".writing"
LOCK_FILE = ".lock"
NAME = re.compile(r"checkpoint-(\d+)")
Settings = dict[str, dict[str, Any]]


def step_of(checkpoint: Path) -> int:
    match = NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def list_checkpoints(directory: Path) -> list[Path]:
    """Oldest first, whole or not."""
    found = [path for path in directory.glob("checkpoint-*") if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=step_of)


def seal(staged: Path, final: Path) -> None:
    """Gives a written checkpoint its manifest and its name; a power cut afterwards loses nothing of it."""
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(staged)): _describe(path) for path in files}
    (staged / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (*files, staged / MANIFEST_FILE, *(p for p in staged.rglob("*") if p.is_dir()), staged):
        _sync(path)
    if final.exists():  # of an earlier attempt at this step
        shutil.rmtree(final)
    staged.rename(final)
    _sync(final.parent)


def find_damage(checkpoint: Path) -> str | None:
    """Says in words what is wrong with a checkpoint; None where it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"it has no readable {MANIFEST_FILE}"
    for name, expected in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes, not {expected['size']}"
        if _describe(path) != expected:
            return f"{name} has other content than was written"
    return None


def save_sealed(staged: Path, final: Path) -> None:
    """
    Seals what all processes have written. Every process must call it: on a file system that the machines share the
    main process does it for all, else the first process of each machine for its own.
    """
    barrier()
    if is_main_process():
        seal(staged, final)
    barrier()
    if local_rank() == 0:
        if staged.exists():
            seal(staged, final)
        shutil.rmtree(staged.parent, ignore_errors=True)
    barrier()


def rotate(directory: Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints beyond `limit`, never the best nor the newest, which has just been written."""
    checkpoints = list_checkpoints(directory)
    for path in checkpoints[: -max(limit, 1)] if limit else []:
        if not best or path.resolve() != Path(best).resolve():
            shutil.rmtree(path)


@contextlib.contextmanager
def claim(output_dir: str) -> Iterator[None]:
    """
    Keeps other runs away from `output_dir` until the block ends or the process dies.

    Raises:
        UsageError: another run writes there.
    """
    if not is_main_process():  # machines may share the directory, and its lock
        yield
        return
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    with (Path(output_dir) / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"--output_dir {output_dir} is in use by a run that has not ended: stop it first"
            ) from None
        yield


def find_resumable(resume_from: str, output_dir: str, settings: Settings) -> Path | None:
    """
    The checkpoint to go on from: the one named, or with "latest" the newest in `output_dir`; in its place the newest
    before it where it is damaged. None for "latest" where there is no checkpoint yet. Every process must call it, and
    gets the same.

    Raises:
        UsageError: a named checkpoint does not exist or all are damaged, or it was written by a run with other
            settings.
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
            print_once(f"{path} is skipped: {damage}")
        else:
            whole.add(step_of(path))
    common = set.intersection(*gather_from_all(whole))
    if not common:
        if not latest:
            raise UsageError(f"--resume_from_checkpoint {resume_from}: no checkpoint up to it is whole")
        print_once(f"{output_dir} has no checkpoint to resume from: starting afresh")
        return None
    found = directory / f"checkpoint-{max(common)}"
    differing = compare(read_settings(found), settings)
    if differing:
        raise UsageError(f"{found} was written by a run with {differing}: give it the same, or start another run")
    print_once(f"resuming from {found}")
    return found


def start_afresh(output_dir: str, settings: Settings) -> None:
    """
    Sets the checkpoints of an earlier attempt at the same run aside, and says so. Every process must call it.

    Raises:
        UsageError: the checkpoints in `output_dir` are those of a run that trains something else.
    """
    directory = Path(output_dir)
    checkpoints = list_checkpoints(directory)
    newest = next((path for path in reversed(checkpoints) if not find_damage(path)), None)
    if newest:
        differing = compare(read_settings(newest), settings, parts=("trains",))
        if differing:
            raise UsageError(
                f"--output_dir {output_dir} holds checkpoints of another run, with {differing}: give another directory"
            )
    barrier()
    if is_main_process():
        _set_aside(directory, newest)
    barrier()
    if local_rank() == 0:  # of another machine, with a disk of its own
        _set_aside(directory, newest)
    barrier()


def _set_aside(directory: Path, newest: Path | None) -> None:
    checkpoints = list_checkpoints(directory)
    if not checkpoints:
        return
    number = 1 + max((int(path.name[9:]) for path in directory.glob("previous-[0-9]*")), default=0)
    aside = directory / f"previous-{number}"
    aside.mkdir()
    for path in checkpoints:
        path.rename(aside / path.name)
    found = f"{newest.name} of this run" if newest else "damaged checkpoints"
    print_once(
        f"{directory} holds {found}: --resume_from_checkpoint latest would have gone on from it. "
        f"Starting afresh; what was there is in {aside}"
    )


def read_settings(checkpoint: Path) -> Settings:
    return json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8"))


def compare(then: Settings, now: Settings, parts: tuple[str, ...] = ("trains", "steps")) -> str:
    """The settings that differ, in words; empty where none does."""
    differing = [
        f"{name} {then[part].get(name)} (now {value})"
        for part in parts
        for name, value in json.loads(json.dumps(now[part])).items()
        if then[part].get(name) != value
    ]
    return ", ".join(differing)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
