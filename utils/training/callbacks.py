"""Callbacks of the Trainer: stopping on a signal, exact offload, the progress bar, the loss curves."""

import contextlib
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import ProgressCallback, TrainerCallback

from utils.common.files import atomic_writer
from utils.common.processes import is_main_process
from utils.common.signals import STOP_SIGNALS, Interrupted, on_signals
from utils.common.terminal import print_to_stderr
from utils.data.json_lines import dump_row
from utils.distributed.collectives import max_over_processes
from utils.training.throughput import Throughput


class StopOnSignal(TrainerCallback):
    """
    At SIGTERM, which a cluster sends before it takes a machine away, SIGINT (Ctrl-C), SIGHUP (a closed terminal) and
    SIGUSR1, on whichever process, ends the step, saves and stops. Until training begins the script ends where it
    stands, and in its last step it ends as it would have.

    `stopped` is the signal that stopped the run, if one did. Another changes nothing: a checkpoint is written whole.
    """

    def __init__(self):
        self.has_begun = False
        self.received = 0
        self.stopped: signal.Signals | None = None

    def listen(self) -> contextlib.AbstractContextManager[None]:
        """Until the block ends."""
        return on_signals(self._receive, (*STOP_SIGNALS, signal.SIGUSR1))

    def _receive(self, number: int) -> None:
        if not self.has_begun:
            raise Interrupted(number)
        if number == signal.SIGINT and not self.received and is_main_process():  # a person waits for an answer
            print_to_stderr(
                "Ctrl-C: saving after this step. Ctrl-C again changes nothing; Ctrl-\\ ends at once, without saving"
            )
        self.received = self.received or number

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.has_begun = True

    def on_step_end(self, args, state, control, **kwargs) -> None:
        number = max_over_processes(self.received)
        if number and state.global_step < state.max_steps:
            self.stopped = signal.Signals(number)
            control.should_save = control.should_training_stop = True


class ExactOffload(TrainerCallback):
    """
    Makes resuming with the optimizer in CPU memory exact. DeepSpeed's Adam keeps the powers of its betas outside its
    state, each the product of the one before, and after a load it takes them from pow(), which rounds otherwise: they
    are multiplied up again instead.
    """

    def on_train_begin(self, args, state, control, optimizer: AcceleratedOptimizer, **kwargs) -> None:
        adam = getattr(optimizer.optimizer, "optimizer", None)  # what ZeRO wraps
        if type(adam).__name__ != "DeepSpeedCPUAdam":
            return
        steps = max((int(values["step"]) for values in adam.state.values()), default=0)
        group, nothing = adam.param_groups[0], torch.empty(0)
        for step in range(1, steps + 1):
            adam.ds_opt_adam.adam_update(
                adam.opt_id, step, group["lr"], *group["betas"], group["eps"], group["weight_decay"],
                group["bias_correction"], nothing, nothing, nothing, nothing,
            )  # fmt: skip


class StepEnd(TrainerCallback):
    def __init__(self, throughput: Throughput):
        self.throughput = throughput

    def on_step_end(self, *args, **kwargs) -> None:
        self.throughput.end_step()


METRICS_FILE = "metrics.jsonl"
FIGURE_FILE = "loss.png"
FIGURE_SHARE = 100  # a figure is drawn once its last drawing took less than a hundredth of the time since then


class Bar(ProgressCallback):
    """Trainer's bar, which log lines are written above, with loss and speed in it."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        super().on_log(args, state, control, logs, **kwargs)
        if state.is_world_process_zero and self.training_bar is not None and "loss" in logs:
            speed = f"{logs['tokens_per_second']:,.0f} tokens/s, " if "tokens_per_second" in logs else ""
            self.training_bar.set_postfix_str(f"{speed}loss {logs['loss']:.4g}")

    def close(self) -> None:
        """Ends the bar's line, where an error ended the run."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


class Curves(TrainerCallback):
    """
    Keeps metrics.jsonl, one line a log, and loss.png up to date. Both hold what the state of the run holds, which a
    checkpoint carries: a resumed run goes on where the checkpoint was, whatever had been logged behind it.

    A log is made when the device has nothing to do, so a figure waits for the end of the next step, which the device
    is then about to compute.
    """

    def __init__(self):
        self.drawn, self.cost = 0.0, 0.0
        self.is_due = False

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Draws twice, so that the library is loaded and a drawing's cost known before a step is timed."""
        if state.is_world_process_zero:
            for _ in range(2):
                self._draw(args, state)

    def on_log(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        directory = Path(args.output_dir)
        with atomic_writer(directory / METRICS_FILE) as file:
            file.writelines(dump_row({"step": row["step"]} | _finite(row)) for row in state.log_history)
        self.is_due = time.monotonic() - self.drawn > FIGURE_SHARE * self.cost
        if "train_runtime" in state.log_history[-1]:
            self._draw(args, state)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.is_due:
            self._draw(args, state)

    def _draw(self, args, state) -> None:
        self.is_due = False
        begun = time.monotonic()
        draw(state.log_history, Path(args.output_dir) / FIGURE_FILE)
        self.drawn = time.monotonic()
        self.cost = self.drawn - begun


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """With null for what JSON has no number for: the norm of gradients that overflowed."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The training and evaluation loss, and below them the learning rate, by step, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for axes, key, label in (
        (upper, "loss", "training loss"),
        (upper, "eval_loss", "evaluation loss"),
        (lower, "learning_rate", "learning rate"),
    ):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 50 else None)
            axes.legend()
            axes.grid(alpha=0.3)
    lower.set_xlabel("step")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)
