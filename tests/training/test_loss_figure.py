"""utils/training/loss_figure.py: what loss.png shows of a run, and what it says where there is nothing to show."""

import math

import numpy as np
import pytest
from matplotlib.image import imread

from utils.training.loss_figure import draw_curves, make_figure, smooth


def texts(figure):
    legends = [axes.get_legend() for axes in figure.axes]
    labels = [text.get_text() for legend in legends if legend for text in legend.get_texts()]
    return labels + [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize(
    "rows, words",
    [
        ([], "no loss was logged"),
        ([{"step": 5, "train_runtime": 1.0}], "no loss was logged"),
        ([{"step": 1, "loss": 2.5, "learning_rate": 1e-3}], "training"),
        ([{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}], "every logged loss is NaN or infinite"),
        ([{"step": 1, "loss": None}, {"step": 2, "eval_loss": 2.0}], "NaN or infinite at 1 step"),
        ([{"step": 2, "eval_loss": 3.0}, {"step": 4, "eval_loss": 2.0}], "best evaluation: 2 at step 4"),
    ],
)
def test_a_figure_is_never_empty(rows, words, tmp_path):
    figure = make_figure(rows)
    assert any(text.startswith(words) for text in texts(figure)), texts(figure)
    drawn = [line for axes in figure.axes for line in axes.lines if len(line.get_xdata())]
    assert drawn or any(" " in text for text in texts(figure))
    draw_curves(rows, tmp_path / "loss.png")
    assert imread(tmp_path / "loss.png")[..., :3].std() > 0.05


def test_title_best_and_a_name_that_is_no_formula(tmp_path):
    rows = [{"step": i, "eval_loss": loss} for i, loss in enumerate((3.0, 1.25, 2.0), 1)]
    figure = make_figure(rows, "$\\frac{$ 模型\x1b")
    assert figure.axes[0].get_title(loc="left") == "\\$\\frac{\\$ 模型\\x1b"
    assert "best evaluation: 1.25 at step 2" in texts(figure)
    draw_curves(rows, tmp_path / "loss.png", "$\\frac{$ 模型\x1b")


def test_a_long_run_is_readable():
    """The smoothed line does not lag; a spike is cut, and counted."""
    falling = np.linspace(4, 1, 5000)
    falling[2500] = 1000
    assert np.abs(smooth(falling) - np.linspace(4, 1, 5000)).max() < 0.05
    figure = make_figure([{"step": i, "loss": loss} for i, loss in enumerate(falling)])
    assert figure.axes[0].get_ylim()[1] < 5 and "training (1 of 5,000 points lie above)" in texts(figure)
