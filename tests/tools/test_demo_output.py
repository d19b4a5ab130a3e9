"""The demo shows a failed step, and breaks its commands so that a shell takes them."""

import json
import shlex
import sys

import pytest
from conftest import ROOT

from tools.demo import Step, print_result, run_step, steps, training_state
from utils.common.console import command_lines
from utils.common.errors import RunError


def test_commands_fit_and_are_unchanged_when_pasted():
    for step in steps("/a place/demo", 29999):
        lines = command_lines(f"$ {step.command}", 97)
        assert max(map(len, lines)) <= 97 and lines[0].startswith("$ ")
        assert shlex.split("\n".join(lines)[2:].replace("\\\n", "")) == shlex.split(step.command)


def test_the_log_has_what_a_step_prints_and_its_end_is_shown_on_failure(tmp_path, capfd):
    log = tmp_path / "demo.log"
    good = Step("print", """python -c 'print("many lines"); print("{\\"rows\\": 3}")'""", "{rows}")
    assert run_step(good, log) == {"rows": 3} and capfd.readouterr() == ("", "")
    with pytest.raises(RunError, match=r"the step 'fail' failed: all that it printed is in .*demo.log"):
        run_step(Step("fail", "python -c 'print(7 * 6); 1 / 0'", ""), log)
    shown = capfd.readouterr().err
    assert "42" in shown and "ZeroDivisionError" in shown and "many lines" not in shown
    assert "many lines" in log.read_text() and json.dumps({"rows": 3}) in log.read_text()


def test_the_result_in_a_terminal(tmp_path, capsys, monkeypatch):
    """No escape sequence is escaped; the prompt stands as the model gets it; the environment comes before python."""
    answer = {"answer": "a\nb"}
    for name in ("before.jsonl", "after.jsonl"):
        (tmp_path / name).write_text(json.dumps(answer))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "prefix", str(ROOT / ".venv"))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    print_result(tmp_path, 0.0, 0.96, 60)
    out = capsys.readouterr().out
    assert "\\x1b" not in out and "\x1b[1m  after    96.0%\x1b[0m" in out
    assert "  prompt  把下面的句子写成日记:\n          老李今天在家里拍照\n" in out
    assert out.index("source .venv/bin/activate") < out.index("python tools/chat.py")
    assert "  把下面的句子写成日记:\\\n  邻居昨天在村口跳舞\n" in out


def test_the_state_of_a_training_run(tmp_path):
    assert training_state(tmp_path) == ""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 5, "loss": 1.234}\n{"step": 10, "lo')
    assert training_state(tmp_path) == ""
    metrics.write_text('{"step": 5, "loss": 1.234}\n')
    assert training_state(tmp_path) == "train: step 5, loss 1.23"
