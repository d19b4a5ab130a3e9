"""
Paths, fixtures that run a script as a user does, and checks that several rooms share.

Every test process loads it before its tests; tests/kernels adds a conftest.py of its own.
"""

import contextlib
import io
import os
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "chatglm-tiny"
GOLDEN = ROOT / "tests" / "golden"
# Triton's interpreter needs a process of its own: `pytest tests/kernels`, which `make test` runs too.
collect_ignore = ["kernels"]
TEXTS = (
    "改成一个问题:\n小明今天在公园放风筝",
    "找出句子里的地点:\n老师昨天在图书馆看书",
    "你好",
    "先说时间:\n医生晚上在河边散步",
    "谢谢",
)

sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "tests" / "faults")]
# A shell has its background jobs ignore SIGINT, and nohup SIGHUP. Scripts that tests start would inherit that.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


def check_text_case(tokenizer, case: dict) -> None:
    """Encode and decode one text of a golden.json, and compare ids and texts."""
    text, ids = case["text"], case["ids"]
    assert tokenizer.encode(text) == ids
    assert tokenizer.encode(text, add_special_tokens=False) == case["ids_nospecial"]
    assert tokenizer.decode(ids) == case["decode"]
    assert tokenizer.decode(case["ids_nospecial"]) == case["decode_nospecial"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == case["decode_skip_special"]


def check_generation(model, tensors: dict, case: dict) -> None:
    """Generate greedily from one prompt of a golden.json, and compare the ids."""
    input_ids = tensors[f"generate.{case['name']}.input_ids"]
    settings = {"max_new_tokens": 24, "do_sample": False} | case.get("kwargs", {})
    output = model.generate(input_ids=input_ids, attention_mask=input_ids.new_ones(input_ids.shape), **settings)
    assert output.equal(tensors[f"generate.{case['name']}.output_ids"]), case["name"]


def varlen_attn_reference(
    query, key, value, starts, key_starts, longest, longest_key, scale, window_size, enable_gqa=False
):
    """
    Compute torch.nn.attention.varlen.varlen_attn, which needs a GPU, one sequence after another.

    Args:
        query: (N, H, D) of N tokens, key and value (M, K, D).
        starts: (B + 1,) where each packed sequence's queries start, and the last one's end.
        key_starts: the same of keys, at least as many; the queries are the last tokens, as FlashAttention aligns them.
        longest, longest_key: tokens of the longest sequence.

    Returns:
        (N, H, D), NaN for tokens that belong to no sequence.
    """
    output = torch.full_like(query, float("nan"))
    bounds = zip(starts.tolist(), starts.tolist()[1:], key_starts.tolist(), key_starts.tolist()[1:], strict=False)
    for start, end, first, last in bounds:
        assert end - start <= longest and end - start <= last - first <= longest_key
        if start < end:
            heads = [query[start:end], key[first:last], value[first:last]]
            visible = torch.ones(end - start, last - first, dtype=torch.bool)
            if window_size == (-1, 0):
                visible = visible.tril(last - first - (end - start))
            attended = torch.nn.functional.scaled_dot_product_attention(
                *(states.transpose(0, 1)[None] for states in heads),
                attn_mask=visible,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            output[start:end] = attended[0].transpose(0, 1)
    return output


def accelerate_variables(config_file: str) -> dict[str, str]:
    """Return the environment variables that `accelerate launch --config_file` sets for its processes."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    environment = {}
    with mock.patch("torch.distributed.run.run", lambda _: environment.update(os.environ)):
        launch_command(launch_command_parser().parse_args(["--config_file", config_file, "script.py"]))
    return {name: value for name, value in environment.items() if os.environ.get(name) != value}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files first that start processes: they take longest, so several workers (`pytest -n`) end together."""
    slow = {item.path for item in items if {"run_command", "run_ranks"} & set(item.fixturenames)}
    items.sort(key=lambda item: item.path not in slow)


class Result:
    """The exit code and the output of a command that has ended."""

    def __init__(self, command: str, code: int, out: str, err: str):
        self.command, self.code, self.out, self.err = command, code, out, err

    @property
    def words(self) -> str:
        """Return stdout with one blank between words, however its columns are aligned."""
        return " ".join(self.out.split())

    def check(self) -> "Result":
        """Fail the test, and show the output, unless the command exited with 0."""
        assert self.code == 0, f"{self.command}\nexit code {self.code}\n{self.out[-4000:]}\n{self.err[-6000:]}"
        return self


@pytest.fixture(scope="session")
def run_command():
    """Return run_command("python script.py ...", cwd=ROOT), which runs it with this interpreter in a new process."""

    def run(command: str, cwd: Path = ROOT, timeout: float = 400, **variables: str) -> Result:
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        process = subprocess.Popen(
            shlex.split(command),
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:  # without this a launcher's workers would survive it
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return Result(command, process.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def run_script():
    """
    Return run_script("script.py --flags", cwd=ROOT), which runs a script in this process.

    It behaves as `python script.py --flags`, and saves the seconds that importing torch and transformers takes.
    """

    def run(command: str, cwd: Path = ROOT) -> Result:
        script, *flags = shlex.split(command)
        out, err, code = io.StringIO(), io.StringIO(), 0
        argv, directory, environment = sys.argv, os.getcwd(), dict(os.environ)
        try:
            os.chdir(cwd)
            sys.argv = [script, *flags]
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        finally:
            sys.argv = argv
            os.chdir(directory)
            os.environ.clear()
            os.environ.update(environment)
        return Result(command, code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def run_ranks():
    """Return run_ranks(2, "script.py --flags"), which forks 2 ranks off a process that has imported the libraries."""
    from forked_ranks import run_ranks  # imports every library that scripts use

    def run(processes: int, command: str, cwd: Path = ROOT, timeout: float = 400, **variables: str) -> Result:
        return Result(command, *run_ranks(processes, command, cwd, timeout, **variables))

    return run


@pytest.fixture(scope="session")
def tokens(run_script, tmp_path_factory):
    """data/sample.train.json, tokenised for the embedded checkpoint; tests only read it."""
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    run_script(
        f"tokenize_dataset_rows_belle.py --jsonl_path data/sample.train.json --save_path {path} "
        f"--model_name_or_path {TINY}"
    ).check()
    return path


@pytest.fixture(scope="session")
def train_tiny(run_script, tokens):
    """train_tiny(output_dir, "--flags"): trains the embedded checkpoint on `tokens`, in this process."""

    def run(output_dir: Path, flags: str) -> Result:
        return run_script(
            f"multi_gpu_fintune_belle.py --dataset_path {tokens} --model_name_or_path {TINY} --lora_rank 4 "
            f"--per_device_train_batch_size 2 --output_dir {output_dir} {flags}"
        )

    return run


@pytest.fixture
def small_disk(request, tmp_path):
    """A file system of 1 MiB, or of the size in the test's parameter, such as "4m"."""
    path, size = tmp_path / "disk", getattr(request, "param", "1m")
    path.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)]).returncode:
        pytest.skip("mounting a small disk needs root")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)
