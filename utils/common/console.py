"""
What every script prints for a person: a header, progress, aligned lines, a summary, and the next command to type.

Text is plain unless stdout is a terminal: then rich draws a progress bar and styles, without colour where NO_COLOR is
set. Without a terminal, progress is a line a minute. Lines fit in WIDTH columns unless a path or a command is longer,
and are never wrapped. Only rank 0 prints. rich is imported only where it draws, because importing it takes time.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from utils.common.processes import is_main_process
from utils.common.terminal import escape_controls

WIDTH = 100  # columns
SECONDS_BETWEEN_LINES = 60  # of progress, where there is no terminal

BOLD, DIM, WARNING, ERROR = "1", "2", "33", "31"  # SGR codes of ECMA-48

_bar: Any = None  # the rich.progress.Progress that is on the screen


def is_terminal() -> bool:
    """Whether stdout is a terminal that understands escape sequences."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def style(text: str, code: str) -> str:
    """Return `text` in a style such as BOLD, or as it is without a terminal; NO_COLOR leaves bold and dim."""
    is_colour = code not in (BOLD, DIM)
    if not is_terminal() or is_colour and os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def print_line(text: str = "", code: str | None = None) -> None:
    """Print a line above the progress bar, on rank 0, with control characters escaped."""
    if not is_main_process():
        return
    text = escape_controls(text)
    line = style(text, code) if code else text
    if _bar is None:
        print(line, flush=True)
        return
    from rich.text import Text

    _bar.console.print(Text.from_ansi(line), soft_wrap=True)


def print_facts(title: str, facts: Mapping[str, object]) -> None:
    """
    Print a title, and below it one aligned line for each fact; facts that are None are left out.

    A value of several lines is indented below its name.
    """
    print_line(title, BOLD)
    facts = {name: str(value) for name, value in facts.items() if value is not None}
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        first, *rest = value.splitlines() or [""]
        print_line(f"  {name:<{width}}  {first}")
        for line in rest:
            print_line(f"  {'':<{width}}  {line}")


def print_next(commands: Sequence[tuple[str, str]]) -> None:
    """Print the commands to type next, each as (what it does, the command)."""
    for purpose, command in commands:
        print_line(f"next, {purpose}:", DIM)
        print_line(f"  {command}")


class Progress:
    """
    Progress of a loop: a bar on a terminal, a line a minute elsewhere, nothing on other ranks.

    Args:
        description: what is done, such as "tokenising".
        total: of the units, if it is known.
        unit: plural noun of what is counted, such as "rows".
        done: units that an earlier run has finished.
    """

    def __init__(self, description: str, total: int | None, unit: str, done: int = 0):
        self.description, self.total, self.unit = description, total, unit
        self.done = self.begun_with = done
        self.began = self.last_line = time.monotonic()
        self.note = ""
        self._task: Any = None

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` units more; `note`, if given, replaces the text at the end of the line."""
        self.done += count
        self.note = self.note if note is None else note
        if self._task is not None:
            _bar.update(self._task, completed=self.done, note=self.note)
        elif is_main_process() and not is_terminal() and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            print_line(self.line())

    def line(self) -> str:
        """Return the progress as one line: units, rate and time left."""
        rate = (self.done - self.begun_with) / max(time.monotonic() - self.began, 1e-9)
        of_total = f" of {self.total:,}" if self.total is not None else ""
        parts = [f"{self.description}: {self.done:,}{of_total} {self.unit}, {rate:,.3g} {self.unit}/s"]
        if self.total is not None and rate > 0:
            parts.append(f"{timedelta(seconds=round((self.total - self.done) / rate))} left")
        return ", ".join([*parts, *filter(None, [self.note])])

    @contextlib.contextmanager
    def shown(self) -> Iterator["Progress"]:
        """Show the bar until the block ends."""
        global _bar
        if not is_main_process() or not is_terminal() or _bar is not None:
            yield self
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        _bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(self.unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(soft_wrap=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        try:
            with _bar:
                self._task = _bar.add_task(self.description, total=self.total, completed=self.done, note=self.note)
                yield self
        finally:
            _bar = self._task = None
