"""
What every script prints for a person: a header, progress, aligned lines, a summary, and the next command to type.

Text is plain unless stdout is a terminal: then rich draws a progress bar and styles, without colour where NO_COLOR is
set. Without a terminal, progress is a line once a minute. Lines fit in WIDTH columns unless a path or a command is
longer, and no line is wrapped. Only rank 0 prints. rich is imported only where it draws: importing it takes time.
"""

import contextlib
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from utils.common.processes import is_main_process
from utils.common.terminal import escape_controls

WIDTH = 100  # columns
SECONDS_BETWEEN_LINES = 60  # without a terminal: progress is printed if nothing else was for so long
SECONDS_BETWEEN_DRAWINGS = 0.25  # of the bar
ROWS_BELOW_HEADING = 40  # of a table; then its heading is printed again

BOLD, DIM, WARNING, ERROR, TRAINED = "1", "2", "33", "31", "32"  # SGR codes of ECMA-48

_bar: Any = None  # the rich.progress.Progress that is on the screen
_copy: Callable[[str], object] | None = None  # gets each line that is printed
_last_line = time.monotonic()  # when a line was printed


def is_terminal() -> bool:
    """Whether stdout is a terminal that understands escape sequences."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def style(text: str, code: str) -> str:
    """Return `text` in a style such as BOLD, or as it is without a terminal; NO_COLOR leaves bold and dim."""
    is_colour = code not in (BOLD, DIM)
    if not is_terminal() or is_colour and os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def duration(seconds: float) -> str:
    """
    Return seconds as hours, minutes and seconds.

    >>> duration(59.6), duration(90061)
    ('0:01:00', '25:01:01')
    """
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def print_line(text: str = "", code: str | None = None) -> None:
    """Print a line above the progress bar, on rank 0, with control characters escaped."""
    print_styled([(text, code)])


def print_styled(parts: Sequence[tuple[str, str | None]]) -> None:
    """Print a line as `print_line` does, each part in its own style."""
    global _last_line
    if not is_main_process():
        return
    _last_line = time.monotonic()
    parts = [(escape_controls(text), code) for text, code in parts]
    if _copy is not None:
        _copy("".join(text for text, _ in parts) + "\n")
    line = "".join(style(text, code) if code else text for text, code in parts)
    if _bar is None:
        print(line, flush=True)
        return
    from rich.text import Text

    _bar.console.print(Text.from_ansi(line), soft_wrap=True)


@contextlib.contextmanager
def copy_lines(write: Callable[[str], object]) -> Iterator[None]:
    """Also give each printed line to `write`, plain and with its line feed, until the block ends."""
    global _copy
    before, _copy = _copy, write
    try:
        yield
    finally:
        _copy = before


def print_facts(title: str, facts: Mapping[str, object]) -> None:
    """
    Print a title, and below it one aligned line for each fact; facts that are None are left out.

    Lines of a value after its first, and what exceeds WIDTH, are indented below its beginning.
    """
    print_line(title, BOLD)
    facts = {name: str(value) for name, value in facts.items() if value is not None}
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        lines = []
        for line in value.splitlines() or [""]:
            lines += textwrap.wrap(line, WIDTH - width - 4, break_long_words=False, break_on_hyphens=False) or [""]
        for label, line in zip([name, *[""] * (len(lines) - 1)], lines, strict=True):
            print_line(f"  {label:<{width}}  {line}".rstrip())


def print_next(commands: Sequence[tuple[str, str]]) -> None:
    """
    Print the commands to type next, each as (what it does, the command).

    A long command continues below, as a shell reads it.
    """
    for purpose, command in commands:
        print_line(f"next, {purpose}:", DIM)
        for line in command_lines(command):
            print_line(f"  {line}")


def command_lines(command: str, width: int = WIDTH) -> list[str]:
    """Return a command as lines of `width` columns, split before flags; a backslash ends all but the last."""
    first, *flags = command.split(" --")
    lines = [first]
    for flag in flags:
        if len(lines[-1]) + len(flag) + len("   -- \\") <= width:
            lines[-1] += f" --{flag}"
        else:
            lines[-1] += " \\"
            lines.append(f"    --{flag}")
    return lines


class Table:
    """
    Prints rows in aligned columns; the heading stands above the first row, and again after ROWS_BELOW_HEADING.

    Args:
        widths: heading of a column -> its width at least.
    """

    def __init__(self, widths: Mapping[str, int]):
        self.widths = {heading: max(width, len(heading)) for heading, width in widths.items()}
        self.rows = 0

    def print_row(self, cells: Mapping[str, str], note: str = "") -> None:
        """Print a row; a column without a cell stays empty, `note` stands behind the last one with a cell."""
        if self.rows % ROWS_BELOW_HEADING == 0:
            print_line(self._line({heading: heading for heading in self.widths}), BOLD)
        self.rows += 1
        print_line(f"{self._line(cells)}  {note}".rstrip())

    def _line(self, cells: Mapping[str, str]) -> str:
        line = "  ".join(f"{cells.get(heading, ''):>{width}}" for heading, width in self.widths.items())
        return f"  {line}".rstrip()


class Progress:
    """
    Progress of a loop: a bar on a terminal, a line once a minute elsewhere, nothing on other ranks.

    Args:
        description: what is done, such as "tokenising".
        total: of the units, if it is known.
        unit: plural noun of what is counted, such as "rows".
        done: units that an earlier run has finished.
    """

    def __init__(self, description: str, total: int | None, unit: str, done: int = 0):
        self.description, self.total, self.unit = description, total, unit
        self.done = self.begun_with = done
        self.began = self.drawn = time.monotonic()
        self.note = ""
        self._task: Any = None

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` units more; `note`, if given, replaces the text at the end of the line."""
        self.done += count
        self.note = self.note if note is None else note
        now = time.monotonic()
        if self._task is not None:
            if now - self.drawn >= SECONDS_BETWEEN_DRAWINGS or self.done == self.total:
                self.drawn = now
                _bar.update(self._task, completed=self.done, note=self.note, refresh=True)
        elif is_main_process() and not is_terminal() and now - _last_line >= SECONDS_BETWEEN_LINES:
            print_line(self.line())

    def line(self) -> str:
        """Return the progress as one line: units, rate and time left."""
        rate = (self.done - self.begun_with) / max(time.monotonic() - self.began, 1e-9)
        of_total = f" of {self.total:,}" if self.total is not None else ""
        parts = [f"{self.description}: {self.done:,}{of_total} {self.unit}, {rate:,.3g} {self.unit}/s"]
        if self.total is not None and rate > 0:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        return ", ".join([*parts, *filter(None, [self.note])])

    @contextlib.contextmanager
    def shown(self) -> Iterator["Progress"]:
        """Show the bar until the block ends, below the bar of an enclosing block if there is one."""
        global _bar
        self.began = time.monotonic()
        if not is_main_process() or not is_terminal():
            yield self
        elif _bar is not None:
            with self._on(_bar):
                yield self
        else:
            try:
                with _new_bar() as _bar, self._on(_bar):
                    yield self
            finally:
                _bar = None

    @contextlib.contextmanager
    def _on(self, bar: Any) -> Iterator[None]:
        fields = {"note": self.note, "unit": self.unit}
        self._task = bar.add_task(self.description, total=self.total, completed=self.done, **fields)
        bar.refresh()
        try:
            yield
        finally:
            bar.remove_task(self._task)
            bar.refresh()
            self._task = None


def _new_bar() -> Any:
    """Return rich's display of tasks; it has no thread, which a forked process would lack."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(soft_wrap=True),
        auto_refresh=False,
        transient=True,
    )
