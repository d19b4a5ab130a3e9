"""
Runs a script's processes as torchrun starts them, forked from a server that has already imported the libraries.

Importing takes longer than most runs of a test. Real launchers are tested in test_document_commands.py,
test_family.py, test_configs.py and test_resume.py.
"""

import multiprocessing
import os
import runpy
import shlex
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import utils.distributed.process_group  # before DeepSpeed, because it sets DeepSpeed's device

# isort: split
import deepspeed  # noqa: F401

import utils.inference.job
import utils.training.trainer

SERVER = multiprocessing.get_context("forkserver")


def _start_server() -> None:
    """Start the server if none runs. It finds its imports only through PYTHONPATH, and skips missing ones."""
    SERVER.set_forkserver_preload([__name__])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def process(command: str, cwd: Path, paths: list[str], variables: dict[str, str]) -> multiprocessing.Process:
    """Return a process for "script.py --flags", not started; `paths` are the files for its stdout and stderr."""
    _start_server()
    return SERVER.Process(target=_run, args=(shlex.split(command), str(cwd), variables, *paths))


def run_ranks(processes: int, command: str, cwd: Path, timeout: float, **variables: str) -> tuple[int, str, str]:
    """
    Run "script.py --flags" as `processes` processes of one host; a single one as `python` does, without a launcher.

    Returns:
        The first nonzero exit code or 0, and what all processes wrote to stdout and to stderr.
    """
    if processes > 1:
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(utils.distributed.process_group.free_port())}
        variables |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    outputs = [os.memfd_create(name) for name in ("out", "err")]
    paths = [f"/proc/{os.getpid()}/fd/{output}" for output in outputs]
    ranks = []
    for rank in range(processes):
        numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        ranks.append(process(command, cwd, paths, variables | numbers))
    try:
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + timeout
        for rank in ranks:
            rank.join(max(0, deadline - time.monotonic()))
        codes = [rank.exitcode for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    out, err = (Path(path).read_text(encoding="utf-8") for path in paths)
    for output in outputs:
        os.close(output)
    assert None not in codes, f"{command} did not end in {timeout} s\n{out}\n{err}"
    return next((code for code in codes if code), 0), out, err


def _run(words: list[str], cwd: str, variables: dict[str, str], *paths: str) -> None:
    for descriptor, path in enumerate(paths, start=1):
        output = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(output, descriptor)
        os.close(output)
    os.environ.update(variables)
    os.chdir(cwd)
    sys.argv = words
    sys.path.insert(0, cwd)
    runpy.run_path(words[0], run_name="__main__")
