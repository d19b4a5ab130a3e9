"""The lines of a training run: aligned, within the console's width, and with the columns that this machine fills."""

from types import SimpleNamespace

import pytest
import torch

from utils.common.console import WIDTH
from utils.training import log_lines
from utils.training.log_lines import LogLines

FIRST = {"loss": 12.3456, "grad_norm": 3.79, "learning_rate": 2e-5, "peak_gib": 139.4}
LATER = FIRST | {"tokens_per_second": 46471.2, "mfu": 0.5571, "padding": 0.0123, "seconds_left": 360_000}
EVALUATION = {"eval_loss": 10.5, "eval_perplexity": 36315.5, "eval_tokens": 123_456, "eval_runtime": 12.34}


@pytest.mark.parametrize("on_gpu", (True, False))
def test_lines(monkeypatch, capsys, on_gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(log_lines, "peak_tflops", lambda: 989 if on_gpu else None)
    lines, state = LogLines(padded=True), SimpleNamespace(max_steps=100_000, global_step=0)
    lines.on_train_begin(None, state, None)
    for step, logs in ((1, FIRST), (100_000, LATER), (100_000, EVALUATION)):
        state.global_step = step
        lines.on_log(None, state, None, logs)
    lines.close()
    heading, *rows, evaluation = capsys.readouterr().out.splitlines()
    assert max(map(len, (heading, *rows, evaluation))) <= WIDTH and {len(row) for row in rows} == {len(heading)}
    assert ("MFU" in heading) == ("peak GiB" in heading) == ("139.4" in rows[0]) == ("55.7%" in rows[1]) == on_gpu
    assert rows[0].split()[:5] == ["1/100,000", "12.3456", "2.00e-05", "3.790", "-"]
    assert rows[1].split()[-1] == "100:00:00" and rows[0].split()[-1] == "-"
    assert evaluation.split(maxsplit=2) == [
        "100,000/100,000",
        "10.5000",
        "evaluation: perplexity 36,316 over 123,456 tokens, 0:00:12",
    ]
    assert evaluation.index("10.5000") + 7 == rows[0].index("12.3456") + 7
