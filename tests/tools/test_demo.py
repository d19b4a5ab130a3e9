"""The demo shows a failed step, and breaks its commands so that a shell takes them."""

import json
import shlex

import pytest

from tools.demo import Step, run_step, steps, wrapped
from utils.common.errors import RunError


def test_commands_fit_and_are_unchanged_when_pasted():
    for step in steps("/a place/demo", 29999):
        lines = list(wrapped(step.command))
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
