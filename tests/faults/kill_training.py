"""
python tests/faults/kill_training.py --kills 50

Kills training, launcher and workers, with SIGKILL at random moments: in steps, while a checkpoint is written, and
between the last checkpoint and the end. Starts it again with --resume_from_checkpoint latest until it ends. The
adapter must equal, bit for bit, that of a run without a kill. Takes the launchers in turn and prints one line a round;
the last line is JSON. The learning rate is constant, so that every step, also one too many, changes the adapter.

--self_test runs rounds with programs that are broken on purpose, see BROKEN: each must be detected.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from safetensors.torch import load_file

from utils.distributed.process_group import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
TORCHRUN = "torchrun --nproc_per_node=2 --master_port {port}"
OFFLOAD = "accelerate_ds_zero3_cpu_offload_config.yaml"
PADDED = "--packing false --per_device_train_batch_size 32"  # of 300 rows, so that two processes make 5 steps an epoch
LAUNCHERS = {
    "one process": ("python", ""),
    "ddp": (TORCHRUN, ""),
    "ddp, padded rows, several epochs": (TORCHRUN, PADDED),
    "zero3": (TORCHRUN, "--deepspeed ds_config_zero3.json"),
    "zero3 offload": (f"accelerate launch --config_file {OFFLOAD} --main_process_port {{port}}", ""),
    "deepspeed": ("deepspeed --num_gpus 2 --master_port {port}", "--deepspeed configs/deepspeed_zero2.json"),
    "zero3 one process": ("python", "--deepspeed ds_config_zero3.json"),
}
STEPS = 12
# Programs that are broken on purpose: the name of a function, and the expression that replaces it.
BROKEN = {
    "a finished run makes another step": ("utils.training.trainer.AdapterTrainer._run_epoch", "Trainer._run_epoch"),
    "the optimizer's state is lost": ("transformers.Trainer._load_optimizer_and_scheduler", "lambda *_: None"),
    "rows are trained on twice": ("transformers.trainer.skip_first_batches", "lambda loader, count: loader"),
}


def arguments(work: Path, output_dir: Path) -> str:
    """Return the training script and its flags, without a launcher."""
    return (
        f"multi_gpu_fintune_belle.py --dataset_path {work}/tokens --model_name_or_path data/chatglm-tiny "
        f"--lora_rank 4 --lora_dropout 0.1 --learning_rate 2e-3 --lr_scheduler_type constant "
        f"--max_steps {STEPS} --save_steps 1 "
        f"--save_total_limit 2 --per_device_train_batch_size 2 --logging_steps 1 --packing --pack_tokens 256 "
        f"--output_dir {output_dir} --resume_from_checkpoint latest"
    )


def command(launcher: str, work: Path, output_dir: Path) -> list[str]:
    """Return the words of a training command under one of LAUNCHERS."""
    start, flags = LAUNCHERS[launcher]
    return shlex.split(f"{start.format(port=free_port())} {arguments(work, output_dir)} {flags}")


def broken_command(fault: str, work: Path, output_dir: Path) -> list[str]:
    """Return the words of training in one process with a fault of BROKEN."""
    name, value = BROKEN[fault]
    (work / "broken.py").write_text(
        "import runpy, sys, pytest\nfrom transformers import Trainer\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nsys.argv = sys.argv[1:]\n"
        f"pytest.MonkeyPatch().setattr({name!r}, {value})\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return [sys.executable, str(work / "broken.py"), *shlex.split(arguments(work, output_dir))]


def start(words: list[str], log: Path) -> subprocess.Popen:
    """Start a command in a session of its own; stdout and stderr go to `log`."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    with log.open("w") as file:
        return subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def descendants(pid: int) -> list[int]:
    """Return a process and all its descendants. (A launcher's workers have sessions of their own.)"""
    processes = [pid]
    for parent in processes:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            processes += [int(child) for child in task.read_text().split()]
    return processes


def environment_of(pid: int) -> dict[str, str]:
    """Return the environment variables that a process was started with."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def has_logged_a_step(output: str) -> bool:
    """Whether a line of a step is in what training printed."""
    return re.search(r"^ +[\d,]+/[\d,]+ ", output, re.MULTILINE) is not None


def wait_for_a_step(process: subprocess.Popen, log: Path) -> None:
    """Wait until training has logged a step or has ended."""
    while process.poll() is None and not has_logged_a_step(log.read_text()):
        time.sleep(0.02)


def kill_once(words: list[str], log: Path, moment: random.Random, last: Path | None = None) -> bool:
    """
    Start training and kill all its processes some time after its first step, or after the checkpoint `last` exists.

    Returns:
        Whether it was still running.
    """
    process = start(words, log)
    wait_for_a_step(process, log)
    if last:
        while process.poll() is None and not last.is_dir():
            time.sleep(0.002)
    time.sleep(moment.uniform(0, 0.1 if last else 1))
    killed = process.poll() is None
    if killed:
        for pid in descendants(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()
    if not killed and process.returncode:
        raise RuntimeError(f"{shlex.join(words)} failed without a kill:\n{log.read_text()}")
    return killed


def finish(words: list[str], log: Path) -> None:
    """
    Run a command to its end.

    Raises:
        RuntimeError: it failed.
    """
    process = start(words, log)
    if process.wait(timeout=600):
        raise RuntimeError(f"{shlex.join(words)} failed:\n{log.read_text()}")


def difference(first: Path, second: Path) -> str:
    """Describe how two adapters differ; an empty text if they are equal bit for bit."""
    a, b = (load_file(path / "adapter_model.safetensors") for path in (first, second))
    if a.keys() != b.keys():
        return "other weights"
    differing = [(a[key] - b[key]).abs().max().item() for key in a if not a[key].equal(b[key])]
    return f"{len(differing)} of {len(a)} weights differ, by up to {max(differing):.1e}" if differing else ""


def same_adapter(first: Path, second: Path) -> bool:
    """Whether two adapters are equal bit for bit."""
    return not difference(first, second)


def reference(launcher: str, work: Path) -> Path:
    """Return the output directory of a run without a kill; it is started again once, which must change nothing."""
    path = work / f"reference {launcher}".replace(" ", "-")
    if not path.exists():
        finish_twice(command(launcher, work, path), work / "log", path)
    return path


def finish_twice(words: list[str], log: Path, output_dir: Path) -> None:
    """
    Run a command to its end, and once more.

    Raises:
        RuntimeError: the second run changed the adapter.
    """
    finish(words, log)
    before = output_dir / "before"
    before.mkdir()
    shutil.copy(output_dir / "adapter_model.safetensors", before)
    finish(words, log)
    if differs := difference(before, output_dir):
        raise RuntimeError(f"{shlex.join(words)}: starting a finished run again changed its adapter: {differs}")


def run_round(words: list[str], expected: Path, output_dir: Path, kills: int, moment: random.Random) -> int:
    """
    Run a command to its end and kill it up to `kills` times, the last time once its last checkpoint exists.

    Returns:
        The number of kills.

    Raises:
        RuntimeError: the adapter is not the one in `expected`.
    """
    log, count = output_dir.with_name("log"), 0
    shutil.rmtree(output_dir, ignore_errors=True)
    for kill in range(kills):
        last = output_dir / f"checkpoint-{STEPS}" if kill + 1 == kills else None
        if not kill_once(words, log, moment, last):
            break
        count += 1
    finish(words, log)
    if differs := difference(expected, output_dir):
        raise RuntimeError(f"{shlex.join(words)}: after {count} kills the adapter differs: {differs}")
    return count


def self_test(work: Path, moment: random.Random) -> None:
    """
    Run the rounds with programs that are broken on purpose.

    Raises:
        RuntimeError: a fault was not detected.
    """
    expected, output_dir = reference("one process", work), work / "killed"
    for fault in BROKEN:
        try:
            run_round(broken_command(fault, work, output_dir), expected, output_dir, 2, moment)
        except RuntimeError as error:
            print(f"detected: {fault}: {str(error).splitlines()[0]}", flush=True)
        else:
            raise RuntimeError(f"not detected: {fault}")


def prepare(work: Path) -> None:
    """Tokenise the rows that training uses into work/tokens."""
    words = shlex.split(
        f"{sys.executable} tokenize_dataset_rows_belle.py --jsonl_path data/sample.train.json "
        f"--save_path {work}/tokens --model_name_or_path data/chatglm-tiny"
    )
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--self_test", action="store_true")
    args = parser.parse_args()
    moment, done = random.Random(args.seed), dict.fromkeys(args.launchers, 0)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        prepare(work)
        if args.self_test:
            return self_test(work, moment)
        while sum(done.values()) < args.kills:
            launcher = min(done, key=done.get)
            expected, output_dir = reference(launcher, work), work / "killed"
            kills = min(5, args.kills - sum(done.values()))
            count = run_round(command(launcher, work, output_dir), expected, output_dir, kills, moment)
            done[launcher] += count
            print(f"{launcher}: killed {count} times, the same adapter", flush=True)
    print(json.dumps({"kills": sum(done.values()), "by_launcher": done, "different_adapters": 0}))


if __name__ == "__main__":
    main()
