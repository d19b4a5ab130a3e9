"""
Records a training run beside its adapter: run.json (what it takes to repeat the run) and train.log (what it printed).

The training script calls it, the main process writes. metrics.jsonl and loss.png are written by callbacks.py.
"""

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

from utils import __version__
from utils.common.console import copy_lines
from utils.common.files import UNENCODABLE, atomic_writer
from utils.common.processes import is_main_process
from utils.common.redaction import hide_in_command, hide_secrets
from utils.common.terminal import drop_output
from utils.training.run_config import RunConfig

RUN_FILE = "run.json"
LOG_FILE = "train.log"
LAUNCHERS = ("accelerate", "deepspeed")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "datasets")
REPORTERS = {  # package -> variables that keep its files on this machine, in a directory of the run
    "tensorboard": {"TENSORBOARD_LOGGING_DIR": "{output_dir}/tensorboard"},
    "wandb": {"WANDB_MODE": "offline", "WANDB_DIR": "{output_dir}"},
    "swanlab": {"SWANLAB_MODE": "offline", "SWANLAB_LOG_DIR": "{output_dir}/swanlab"},
}


def configure_reporters(reporters: list[str], output_dir: str) -> str | None:
    """
    Make reporters write beside the run; return their variables as text, None without a reporter.

    Nothing leaves the machine unless the user's own variables say so.
    """
    lines = []
    for reporter in reporters:
        variables = REPORTERS.get(reporter, {})
        for variable, value in variables.items():
            os.environ.setdefault(variable, value.format(output_dir=output_dir))
        lines.append(": ".join([reporter, *(f"{name}={os.environ[name]}" for name in variables)]))
    return "\n".join(lines) or None


def describe_environment() -> dict[str, Any]:
    """
    Return versions, the state of this repository, and this machine's devices.

    What is not known is None.
    """
    versions: dict[str, str | None] = {"toolkit": __version__, "python": sys.version.split()[0]}
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
    """Return the output of a git command here, or None."""
    repository = Path(__file__).resolve().parents[2]
    try:
        process = subprocess.run(
            ["git", *words],
            cwd=repository,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.rstrip() if process.returncode == 0 else None


def write_run(config: RunConfig, resumed_from: Path | None) -> None:
    """
    Write run.json: what it takes to repeat the run.

    Only the main process writes.
    """
    if not is_main_process():
        return
    args, inputs, key = config.training_args, config.inputs, config.resume_key
    data = {"path": config.flags.dataset_path, "rows": len(inputs.dataset), "fingerprint": key.identity["rows"]}
    if inputs.eval_dataset:
        data |= {"eval_rows": len(inputs.eval_dataset), "eval_fingerprint": key.schedule["eval_rows"]}
    record = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shown_command(),
        "launcher": config.launcher,
        "launcher_command": launcher_command(),
        "world_size": args.world_size,
        "resumed_from": str(resumed_from) if resumed_from else None,
        **describe_environment(),
        "data": data,
        "base": inputs.origin.base,
        "arguments": vars(config.flags),
        "training_arguments": args.to_dict(),
    }
    with atomic_writer(Path(args.output_dir) / RUN_FILE) as file:
        json.dump(hide_secrets(record), file, ensure_ascii=False, indent=1, default=str)


def shown_command() -> str:
    """Return the command line of this process, without its secrets."""
    return hide_secrets(shlex.join(hide_in_command(sys.argv)))


def launcher_command() -> str | None:
    """Return the command line of torchrun, accelerate or deepspeed, if one is this process's parent."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")[:-1]
    except OSError:
        return None
    is_launcher = any(name in word for word in words for name in ("torchrun", "torch.distributed", *LAUNCHERS))
    return hide_secrets(shlex.join(hide_in_command(words))) if is_launcher else None


class _Output:
    """
    A stream without which the run continues if it breaks: a terminal closed, or Ctrl-C ended a `tee`.
    """

    def __init__(self, stream: IO[str]):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write; return the number of characters."""
        with self._outliving_the_stream():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with self._outliving_the_stream():
            self.stream.flush()

    @contextlib.contextmanager
    def _outliving_the_stream(self) -> Iterator[None]:
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
    Copy the console's lines to train.log, as plain text without secrets.

    The block's end ends that; the error that ends the block is copied too. Every process outlives its stdout and
    stderr.
    """
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)
        stack.callback(_restore_streams, before)
        if not is_main_process():
            yield
            return
        file = stack.enter_context((Path(output_dir) / LOG_FILE).open("a", encoding="utf-8", errors=UNENCODABLE))

        def write(text: str) -> None:
            file.write(hide_secrets(text))
            file.flush()

        write(f"# {datetime.now(UTC).isoformat(timespec='seconds')} {shown_command()}\n")
        stack.enter_context(copy_lines(write))
        try:
            yield
        except Exception as error:
            with contextlib.suppress(OSError):  # the disk may be full: then `error` says so
                write("".join(traceback.format_exception(error)))
            raise


def _restore_streams(streams: tuple[IO[str], IO[str]]) -> None:
    sys.stdout, sys.stderr = streams
