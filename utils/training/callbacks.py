"""
Callbacks of the Trainer: stopping on a signal, exact offload, the throughput clock, metrics.jsonl and loss.png.

trainer.py adds all but StopOnSignal, which the training script makes, as it must hear signals before there is a
Trainer.
"""

import contextlib
import math
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainerCallback

from utils.common.files import atomic_writer
from utils.common.processes import is_main_process
from utils.common.signals import STOP_SIGNALS, Interrupted, on_signals
from utils.common.terminal import print_to_stderr
from utils.data.json_lines import dump_row
from utils.distributed.collectives import max_over_processes
from utils.training.loss_figure import draw_curves
from utils.training.throughput import Throughput


class StopOnSignal(TrainerCallback):
    """
    Saves a checkpoint and stops after the step in which a signal came.

    The signal may reach any process: SIGTERM (a cluster takes the machine away), SIGINT (Ctrl-C), SIGHUP (a closed
    terminal) or SIGUSR1. Before training begins it ends the script at once; in the last step the run ends as it would
    have. `stopped` is the signal that stopped the run, if one did. Further signals change nothing: a checkpoint is
    written whole.
    """

    def __init__(self):
        self.has_begun = False
        self.received = 0
        self.stopped: signal.Signals | None = None

    def listen(self) -> contextlib.AbstractContextManager[None]:
        """Receive the signals until the block ends."""
        return on_signals(self._receive, (*STOP_SIGNALS, signal.SIGUSR1))

    def _receive(self, number: int) -> None:
        if not self.has_begun:
            raise Interrupted(number)
        if number == signal.SIGINT and not self.received and is_main_process():  # a person waits for an answer
            print_to_stderr("Ctrl-C: saving after this step; Ctrl-\\ ends at once, without saving")
        self.received = self.received or number

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """From now on a signal no longer ends the script at once."""
        self.has_begun = True

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Save and stop on all processes if any has received a signal."""
        number = max_over_processes(self.received)
        if number and state.global_step < state.max_steps:
            self.stopped = signal.Signals(number)
            control.should_save = control.should_training_stop = True


class ExactOffload(TrainerCallback):
    """
    Makes resuming with the optimizer in CPU memory exact.

    DeepSpeed's Adam keeps the powers of its betas in C++, outside its state, each computed from the one before. After
    a load it takes them from pow(), which rounds differently; this recomputes them step by step.
    """

    def on_train_begin(self, args, state, control, optimizer: AcceleratedOptimizer, **kwargs) -> None:
        """Bring the powers in C++ to the step that was loaded."""
        adam = getattr(optimizer.optimizer, "optimizer", None)  # the one that ZeRO wraps
        if type(adam).__name__ != "DeepSpeedCPUAdam":
            return
        steps = max((int(values["step"]) for values in adam.state.values()), default=0)
        group, empty = adam.param_groups[0], torch.empty(0)
        for step in range(1, steps + 1):
            adam.ds_opt_adam.adam_update(
                adam.opt_id, step, group["lr"], *group["betas"], group["eps"], group["weight_decay"],
                group["bias_correction"], empty, empty, empty, empty,
            )  # fmt: skip


class StepTimer(TrainerCallback):
    """Tells the throughput clock that an optimizer step has ended."""

    def __init__(self, throughput: Throughput):
        self.throughput = throughput

    def on_step_end(self, *args, **kwargs) -> None:
        """Count the step."""
        self.throughput.end_step()


METRICS_FILE = "metrics.jsonl"
LOSS_FIGURE_FILE = "loss.png"


class LossCurves(TrainerCallback):
    """
    Writes metrics.jsonl at every log, and loss.png with every checkpoint.

    loss.png is drawn at the end of the run too; metrics.jsonl has one line a log. Both show the run's state, which a
    checkpoint carries: a resumed run continues them from the checkpoint, without what was logged after it. Drawing
    takes some tenths of a second, less than writing a checkpoint, so no step waits for it more often than for those;
    `--report_to tensorboard` shows the curves live.

    Args:
        title: of the figure.
    """

    def __init__(self, title: str = ""):
        self.title = title

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Load the library before any step is timed."""
        if state.is_world_process_zero:
            from matplotlib.figure import Figure  # noqa: F401

    def on_log(self, args, state, control, **kwargs) -> None:
        """Write metrics.jsonl, and loss.png at the end of the run."""
        if not state.is_world_process_zero:
            return
        directory = Path(args.output_dir)
        with atomic_writer(directory / METRICS_FILE) as file:
            file.writelines(dump_row({"step": row["step"]} | _finite(row)) for row in state.log_history)
        if "train_runtime" in state.log_history[-1]:  # the summary, after the last step
            draw_curves(state.log_history, directory / LOSS_FIGURE_FILE, self.title)

    def on_save(self, args, state, control, **kwargs) -> None:
        """Write loss.png."""
        if state.is_world_process_zero:
            draw_curves(state.log_history, Path(args.output_dir) / LOSS_FIGURE_FILE, self.title)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """
    Return the row with null for infinite and NaN values.

    JSON lacks them; the norm of gradients that overflowed is one.
    """
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
