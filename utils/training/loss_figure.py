"""
Draws loss.png: the losses of a training run and its learning rate, by step.

In: the run's log lines, as `state.log_history` of Trainer has them, and a title. Out: a PNG. Called by LossCurves in
callbacks.py with every checkpoint and at the end of a run.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from utils.common.terminal import escape_controls

INK, TRAINING, EVALUATION, RATE, FAULT = "#333333", "#1f77b4", "#d9730d", "#2e8b57", "#c62828"
SMOOTHED_FROM = 30  # points; fewer are drawn as they are
LEAST_FALL = 0.8  # of the axis' top, at which it ends at most
CHINESE_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "SimHei")


def title_of_run(model: str, rows: int, trained: str) -> str:
    """
    Return the title of a run's figure.

    >>> title_of_run("/models/chatglm-6b/", 1200, "LoRA rank 8")
    'chatglm-6b, 1,200 rows, LoRA rank 8'
    """
    return f"{os.path.basename(os.path.abspath(model))}, {rows:,} rows, {trained}"


def draw_curves(rows: list[dict[str, Any]], path: Path, title: str = "") -> None:
    """Write the figure of `make_figure` as a PNG, which replaces `path` at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    make_figure(rows, title).savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)


def make_figure(rows: list[dict[str, Any]], title: str = ""):
    """
    Return matplotlib's Figure of losses and learning rate by step; what there is not, it says.

    Args:
        rows: log lines; those with `loss`, `eval_loss` or `learning_rate` are drawn.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    with rc_context({"font.family": ["DejaVu Sans", *installed_fonts()], "text.color": INK, "axes.edgecolor": "#999"}):
        figure = Figure(figsize=(9, 5.6), layout="constrained")
        losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        losses.set_title(as_text(title or "training"), loc="left", fontsize=12, fontweight="bold")
        losses.set_ylabel("loss (nats a target token)")
        rates.set_ylabel("learning rate")
        rates.set_xlabel("step")
        for axes in (losses, rates):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
        _draw_losses(losses, rows)
        _draw_rates(rates, rows)
        _set_step_limits(rates, [row["step"] for row in rows if "step" in row])
        rates.xaxis.set_major_locator(MaxNLocator(integer=True))
        rates.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return figure


def as_text(text: str) -> str:
    """Return `text` as matplotlib shows it unchanged: without controls, and "$a$" is no formula."""
    return escape_controls(text).replace("$", r"\$")


def installed_fonts() -> list[str]:
    """Return the first of CHINESE_FONTS that this machine has, in a list; matplotlib's own font has no Chinese."""
    from matplotlib.font_manager import fontManager

    names = {font.name for font in fontManager.ttflist}
    return [name for name in CHINESE_FONTS if name in names][:1]


def smooth(values: np.ndarray) -> np.ndarray:
    """
    Return the running median over a fiftieth of the values, at least 5 and at most 101.

    A median does not lag behind a falling loss, and a single spike does not move it.
    """
    reach = min(max(len(values) // 50, 5), 101) // 2
    padded = np.pad(values, reach, constant_values=np.nan)
    return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1), axis=1)


def _draw_losses(axes, rows: list[dict[str, Any]]) -> None:
    steps, values, faults = _points(rows, "loss")
    eval_steps, evaluations, eval_faults = _points(rows, "eval_loss")
    tops: list[float] = []
    if len(steps) >= SMOOTHED_FROM:
        smoothed = smooth(values)
        top = max(smoothed.max(), np.percentile(values, 99))
        top = 1.05 * (top if values.max() > 1.5 * top else values.max())  # spikes would flatten all else
        above = int((values > top).sum())
        label = "training" + (f" ({above:,} of {len(values):,} points lie above)" if above else "")
        axes.plot(steps, values, color=TRAINING, alpha=0.3, linewidth=0.8, label=label)
        axes.plot(steps, smoothed, color=TRAINING, linewidth=2, label="training, smoothed")
        tops.append(top)
    elif len(steps):
        axes.plot(steps, values, color=TRAINING, marker="o", markersize=4, label="training")
    if len(eval_steps):
        marker = "o" if len(eval_steps) < 50 else None
        axes.plot(eval_steps, evaluations, color=EVALUATION, marker=marker, markersize=4, label="evaluation")
        best = int(np.argmin(evaluations))
        label = f"best evaluation: {evaluations[best]:.4g} at step {eval_steps[best]:,.0f}"
        style = {"marker": "*", "markersize": 14, "markeredgecolor": "white", "linestyle": "none", "zorder": 3}
        axes.plot(eval_steps[best], evaluations[best], color=EVALUATION, label=label, **style)
        tops += [evaluations.max() * 1.05] if tops else []
    faults = sorted({*faults, *eval_faults})
    for step in faults if len(steps) or len(eval_steps) else ():
        axes.axvline(step, color=FAULT, alpha=0.6, linewidth=1, label="_")
    if faults:
        axes.plot([], [], color=FAULT, label=f"NaN or infinite at {len(faults)} step{'s' * (len(faults) > 1)}")
    if len(steps) or len(eval_steps):
        top = max(tops, default=1.05 * max([*values, *evaluations]))
        bottom = min(*values, *evaluations, LEAST_FALL * top)  # else a loss that hardly moves would seem to fall
        axes.set_ylim(bottom - 0.05 * (top - bottom), top)
        axes.legend(loc="upper right", facecolor="white", edgecolor="none", framealpha=0.8)
    elif faults:
        _say(axes, "every logged loss is NaN or infinite:\na lower --learning_rate, or --bf16, may help")
    else:
        _say(
            axes,
            "no loss was logged:\nthe run has fewer steps than --logging_steps, or ended before the first log",
        )


def _draw_rates(axes, rows: list[dict[str, Any]]) -> None:
    steps, values, _ = _points(rows, "learning_rate")
    axes.plot(steps, values, color=RATE, marker="." if len(steps) == 1 else None)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if not len(steps):
        _say(axes, "no learning rate was logged")


def _points(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return the steps and the finite values of `key`, and the steps at which it is NaN, infinite or None."""
    points = [
        (row["step"], math.nan if row[key] is None else row[key]) for row in rows if key in row and "step" in row
    ]
    finite = np.array([point for point in points if math.isfinite(point[1])], dtype=float).reshape(-1, 2)
    return finite[:, 0], finite[:, 1], [step for step, value in points if not math.isfinite(value)]


def _say(axes, sentence: str) -> None:
    axes.text(0.5, 0.5, sentence, ha="center", va="center", transform=axes.transAxes, fontsize=11)
    axes.set_yticks([])
    axes.grid(False)


def _set_step_limits(axes, steps: list[int]) -> None:
    if not steps:
        axes.set_xlim(0, 1)
    elif min(steps) == max(steps):
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
