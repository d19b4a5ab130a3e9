"""What a run leaves beside its adapter: run.json, train.log, metrics.jsonl and loss.png, all by rank 0."""

import contextlib
import errno
import json
import os
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
from transformers import TrainingArguments

from utils.common.files import UNENCODABLE, atomic_writer
from utils.common.processes import is_main_process, print_once
from utils.common.redaction import hide_in_command, hide_secrets
from utils.common.terminal import drop_output

RUN_FILE = "run.json"
LOG_FILE = "train.log"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "datasets")
REPORTERS = {  # package -> variables that keep what it writes on this machine, in a directory of the run
    "tensorboard": {"TENSORBOARD_LOGGING_DIR": "{output_dir}/tensorboard"},
    "wandb": {"WANDB_MODE": "offline", "WANDB_DIR": "{output_dir}"},
    "swanlab": {"SWANLAB_MODE": "offline", "SWANLAB_LOG_DIR": "{output_dir}/swanlab"},
}


def settle_reporters(reporters: list[str], output_dir: str) -> None:
    """Lets reporters write beside the run, and nothing leave the machine unless their own variables say so."""
    for reporter in reporters:
        for variable, value in REPORTERS.get(reporter, {}).items():
            if variable not in os.environ:
                os.environ[variable] = value.format(output_dir=output_dir)
                print_once(f"{reporter}: {variable}={os.environ[variable]} (default)")


def describe_environment() -> dict[str, Any]:
    """Versions, the state of this repository, and the devices of this machine; None for what is not known."""
    versions: dict[str, str | None] = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    changes = _git("status", "--porcelain", "--untracked-files=no")
    git = {"commit": _git("rev-parse", "HEAD"), "changed_files": None if changes is None else changes.splitlines()}
    return {"versions": versions, "git": git, "devices": devices}


def _git(*words: str) -> str | None:
    repository = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            ["git", *words],
            cwd=repository,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip() if done.returncode == 0 else None


def write_run(
    args: TrainingArguments, own_arguments: dict[str, Any], data: dict[str, Any], base: dict[str, Any], resumed_from
) -> None:
    """Writes run.json: what it takes to make the same run again. The main process writes."""
    if not is_main_process():
        return
    run = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shown_command(),
        "world_size": args.world_size,
        "resumed_from": str(resumed_from) if resumed_from else None,
        **describe_environment(),
        "data": data,
        "base": base,
        "arguments": own_arguments,
        "training_arguments": args.to_dict(),
    }
    with atomic_writer(Path(args.output_dir) / RUN_FILE) as file:
        json.dump(hide_secrets(run), file, ensure_ascii=False, indent=1, default=str)


def shown_command() -> str:
    """The command line of this process, without its secrets."""
    return hide_secrets(shlex.join(hide_in_command(sys.argv)))


class _Output:
    """
    A stream whose text goes to a file too, if there is one; bars, which rewrite their line, do not. Where the stream
    is gone, a terminal that closed or a `tee` that Ctrl-C ended, the run goes on without it.
    """

    def __init__(self, stream: IO[str], file: IO[str] | None):
        self.stream, self.file = stream, file

    def write(self, text: str) -> int:
        if self.file and "\r" not in text:
            self.file.write(hide_secrets(text))
            self.file.flush()
        with self._survived():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._survived():
            self.stream.flush()

    @contextlib.contextmanager
    def _survived(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            drop_output(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def keep_log(output_dir: str) -> Iterator[None]:
    """
    Until the block ends, what the main process prints goes to train.log too, and so does the error that ends it.
    Every process outlives its stdout and stderr.
    """
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        file = None
        if is_main_process():
            log = Path(output_dir) / LOG_FILE
            file = stack.enter_context(log.open("a", encoding="utf-8", errors=UNENCODABLE))
            file.write(f"# {datetime.now(UTC).isoformat(timespec='seconds')} {shown_command()}\n")
        sys.stdout, sys.stderr = _Output(sys.stdout, file), _Output(sys.stderr, None)
        try:
            yield
        except Exception as error:
            if file:
                with contextlib.suppress(OSError):  # the disk may be full, which is then what `error` says
                    file.write(hide_secrets("".join(traceback.format_exception(error))))
                    file.flush()
            raise
        finally:
            sys.stdout, sys.stderr = before
