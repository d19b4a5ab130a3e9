"""The console on a real pseudo-terminal, with NO_COLOR, without a terminal, and on rank 1."""

import os
import pty
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from utils.common import console

# What a script prints: header, two steps above the bar with another bar below it, the summary, a command of 120
# columns, and a line that a library prints to stdout.
SCRIPT = """
from utils.common import console
from utils.common.console import *

copied = []
with copy_lines(copied.append):
    print_facts("script.py", {"model": "data/tiny", "absent": None, "data set": "word " * 40, "two": "first\\nsecond"})
    table = Table({"step": 7, "loss": 8})
    with Progress("training", 2, "steps").shown() as progress:
        for step in (1, 2):
            table.print_row({"step": f"{step}/2", "loss": "10.5"}, note="note" * (step == 2))
            with Progress("evaluating", 3, "batches").shown() as inner:
                inner.advance(3)
            progress.advance(note="loss 10.5")
        print("from a library")
    print_line("careful \\x1b[2J", WARNING)
    print_next([("merge it", "python merge.py " + "--flag value " * 8 + "--end")])
print(repr("".join(copied)))
"""
LINES = """script.py
  model     data/tiny
  data set  word word word word word word word word word word word word word word word word word
            word word word word word word word word word word word word word word word word word
            word word word word word word
  two       first
            second
     step      loss
      1/2      10.5
      2/2      10.5  note
careful \\x1b[2J
next, merge it:
  python merge.py --flag value --flag value --flag value --flag value --flag value --flag value \\
      --flag value --flag value --end
"""
CONTROL = re.compile("\x1b\\[[0-9;?]*[A-Za-z]")


def in_terminal(**variables: str) -> str:
    """Return what the script writes to a pseudo-terminal of 100 columns."""
    controller, terminal = pty.openpty()
    environment = {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, stdout=terminal, env=kept | environment | variables
    )
    os.close(terminal)
    chunks = []
    try:
        while chunk := os.read(controller, 65536):
            chunks.append(chunk)
    except OSError:  # the other side is closed
        pass
    os.close(controller)
    assert process.wait() == 0
    return b"".join(chunks).decode().replace("\r\n", "\n")


def piped(**variables: str) -> str:
    words = [sys.executable, "-c", SCRIPT]
    return subprocess.run(
        words, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=True
    ).stdout


def test_in_a_terminal():
    screen = in_terminal()
    text = CONTROL.sub("", screen)
    assert re.search("training +━+ 2/2 steps .* loss 10.5", text) and re.search("evaluating ━+ 3/3 batches", text)
    assert "\x1b[1mscript.py\x1b[0m" in screen and "\x1b[33mcareful" in screen
    for line in (*LINES.splitlines(), "from a library"):
        assert line.rstrip() in [printed.rstrip() for printed in text.splitlines()], line
    assert screen.splitlines()[-1] == repr(LINES)  # what was copied has no escape sequences, and no bar


def test_no_color():
    colours = set(re.findall("\x1b\\[([0-9;]*)m", in_terminal(NO_COLOR="1")))
    assert colours and not any(int(code or 0) >= 30 for codes in colours for code in codes.split(";")), colours


@pytest.mark.parametrize("variables", ({}, {"TERM": "dumb"}))
def test_without_a_terminal(variables):
    text = in_terminal(**variables) if variables else piped()
    first, last = LINES.split("careful")
    assert text == f"{first}from a library\ncareful{last}{LINES!r}\n"


def test_other_ranks_are_silent():
    assert piped(RANK="1") == "from a library\n''\n"


def test_progress_without_a_terminal_is_a_line_a_minute(capsys, monkeypatch):
    """Counted from the last line of any kind."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.Progress("tokenising", 4000, "rows", done=1000).shown() as progress:
        console.print_line("header")
        for _ in range(5):
            now[0] += 25
            progress.advance(100, note="2 rejected")
        console.print_line("other")
        now[0] += 59
        progress.advance(100)
    assert capsys.readouterr().out.splitlines() == [
        "header",
        "tokenising: 1,300 of 4,000 rows, 4 rows/s, 0:11:15 left, 2 rejected",
        "other",
    ]


def test_a_heading_is_repeated(capsys):
    table = console.Table({"step": 5})
    for step in range(console.ROWS_BELOW_HEADING + 1):
        table.print_row({"step": str(step)})
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("   step") == 2 and lines[-2] == "   step"
