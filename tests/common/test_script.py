"""`run` ends a script by its error: exit codes, lines, failure callbacks."""

import re
import sys

from utils.common.script import on_failure, run

import pytest
from conftest import ROOT
from setuptools.config.pyprojecttoml import read_configuration

from utils import __version__
from utils.common.errors import RankError, RunError, UsageError


def raising(error):
    def main():
        raise error

    return main


@pytest.fixture
def end(monkeypatch, capsys):
    """end(error): the exit code and the lines on stderr of a script whose `main` raises the error."""
    monkeypatch.setattr(sys, "argv", ["script.py"])

    def end(error):
        with pytest.raises(SystemExit) as exit:
            run(raising(error))
        return exit.value.code, capsys.readouterr().err.splitlines()

    return end


def test_exit_codes_and_lines(end):
    assert end(UsageError("first", "second")) == (2, ["script.py: error: first", "script.py: error: second"])
    assert end(RunError("a bad row")) == (1, ["script.py: error: a bad row"])
    assert end(RunError("two\nlines")) == (1, ["script.py: error: two\\nlines"])
    assert end(MemoryError())[0] == 1


def test_a_bug_shows_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(KeyError):
        run(raising(KeyError("a bug")))


def test_only_errors_of_one_process_are_printed_on_every_rank(end, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert end(RunError("as on every rank")) == (1, [])
    assert end(RankError("only here")) == (1, ["script.py: error: only here"])


@pytest.mark.parametrize("flag", ("--traceback", "--debug"))
def test_the_traceback_is_shown_on_demand(monkeypatch, capsys, flag):
    monkeypatch.setattr(sys, "argv", ["script.py", flag])
    with pytest.raises(UsageError):
        run(raising(UsageError("a wrong flag")))
    assert sys.argv == ["script.py"] and "error: a wrong flag" in capsys.readouterr().err


def test_failure_callbacks_hear_of_errors_but_not_of_wrong_requests(end):
    errors = []
    unregister = on_failure(errors.append)
    end(UsageError("a wrong flag"))
    assert errors == []
    end(RunError("a bad row"))
    end(MemoryError())
    assert [type(error) for error in errors] == [RunError, RankError] and "memory ran out" in str(errors[1])
    unregister()
    end(RunError("a bad row"))
    assert len(errors) == 2


@pytest.mark.parametrize("flags", (["--version"], ["--model_name_or_path", "x", "--version"]))
def test_the_version_of_every_script(monkeypatch, capsys, flags):
    """It is that of the project's metadata and of the newest entry in CHANGELOG.md; `main` does not run."""
    monkeypatch.setattr(sys, "argv", ["elsewhere/script.py", *flags])
    run(raising(RunError("it ran")))
    assert capsys.readouterr().out == f"script.py {__version__}\n"
    metadata = read_configuration(ROOT / "pyproject.toml")["project"]
    newest = re.search(r"^## (\S+) - ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert metadata["version"] == newest[1] == __version__
