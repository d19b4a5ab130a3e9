"""
What a person sees while a run trains: a line at each log, in aligned columns, and a progress bar on a terminal.

trainer.py adds both callbacks. Trainer's own show a dictionary without its step, and not the last steps of a run whose
length is no multiple of --logging_steps.
"""

import contextlib
import math
from typing import Any

import torch
from transformers import TrainerCallback

from utils.common.console import Progress, Table, duration
from utils.common.numbers import format_loss
from utils.training.throughput import peak_tflops


class LogEnds(TrainerCallback):
    """
    Has Trainer also log the first step of this process, the last, and each that is evaluated or saved.

    So the log rows of a checkpoint cover all of its steps, and `mean_loss` is exact when a run resumes.
    """

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Note the first step."""
        self.first = state.global_step + 1

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Have this step logged if it is one of those."""
        is_end = state.global_step in (self.first, state.max_steps)
        control.should_log |= is_end or control.should_evaluate or control.should_save

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        """Have the last step of an epoch logged if it is evaluated or saved."""
        control.should_log |= control.should_evaluate or control.should_save


def mean_loss(rows: list[dict[str, Any]]) -> float | None:
    """
    Return the mean over a run's steps of their loss; None if none was logged.

    The loss of a step is that of the target tokens of its global batch.

    Args:
        rows: of TrainerState.log_history; each "loss" is the mean over the steps since the one before.

    >>> mean_loss([{"step": 1, "loss": 4.0}, {"step": 1, "eval_loss": 9.0}, {"step": 4, "loss": 2.0}])
    2.5
    """
    total, last_step = 0.0, 0
    for row in rows:
        if "loss" in row:
            total += row["loss"] * (row["step"] - last_step)
            last_step = row["step"]
    return total / last_step if last_step else None


class LogLines(TrainerCallback):
    """
    Prints a line at each log, and shows a progress bar on a terminal.

    Args:
        padded: whether rows are padded, so that a column says how much.
    """

    def __init__(self, padded: bool):
        self.padded = padded
        self.stack = contextlib.ExitStack()
        self.progress: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Show the bar, and choose the columns."""
        self.total = f"{state.max_steps:,}"
        widths = {"step": 2 * len(self.total) + 1, "loss": 8, "learning rate": 0, "grad norm": 0, "tokens/s": 0}
        if peak_tflops():
            widths["MFU"] = 5
        if torch.cuda.is_available():
            widths["peak GiB"] = 0
        if self.padded:
            widths["padding"] = 0
        self.table = Table(widths | {"time left": 0})
        progress = Progress("training", state.max_steps, "steps", done=state.global_step)
        self.progress = self.stack.enter_context(progress.shown())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Update the bar."""
        self.progress.advance()

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        """Print the line of a step, or of an evaluation."""
        step = f"{state.global_step:,}/{self.total}"
        if "loss" in logs:
            self.table.print_row({"step": step, "loss": format_loss(logs["loss"]), **_cells(logs)})
            self.progress.advance(0, note=f"loss {format_loss(logs['loss'])}")
        elif "eval_loss" in logs:
            note = (
                f"evaluation: perplexity {logs['eval_perplexity']:,.5g} over {logs['eval_tokens']:,} tokens, "
                f"{duration(logs['eval_runtime'])}"
            )
            self.table.print_row({"step": step, "loss": format_loss(logs["eval_loss"])}, note)

    def close(self) -> None:
        """Remove the bar, also when an error ended the run."""
        self.stack.close()


def _cells(logs: dict[str, Any]) -> dict[str, str]:
    """Return the cells of a log row but its step and loss; "-" stands where a number is not known yet."""
    texts = {
        "learning rate": ("learning_rate", "{:.2e}"),
        "grad norm": ("grad_norm", "{:#.4g}"),
        "tokens/s": ("tokens_per_second", "{:,.0f}"),
        "MFU": ("mfu", "{:.1%}"),
        "peak GiB": ("peak_gib", "{:.1f}"),
        "padding": ("padding", "{:.1%}"),
    }
    cells = {heading: text.format(logs[key]) if key in logs else "-" for heading, (key, text) in texts.items()}
    seconds = logs.get("seconds_left", math.nan)
    return cells | {"time left": duration(seconds) if math.isfinite(seconds) else "-"}
