"""
Counts rows that cannot be used, shows the first of them on stderr, and lists all in a file.

A row that cannot be read is a row: readers yield a `RowError` in its place, so that every count adds up and nothing
stops a run except --strict. The scripts for processing, tokenising and inference report their rows with it.
"""

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

from utils.common.errors import RowError, RunError
from utils.common.files import UNENCODABLE, remove_leftovers
from utils.common.terminal import one_line


def check_share(failed: int, total: int, kept: str) -> None:
    """
    Fail a job at its end if most rows were not usable.

    Args:
        failed: rows that were rejected or could not be answered.
        total: all rows.
        kept: where the others are, for the message.

    Raises:
        RunError: more than half of the rows failed.
    """
    if 2 * failed > total:
        raise RunError(f"{failed} of {total} rows could not be used, more than half: {kept}")


class Rejection(NamedTuple):
    """A row that cannot be used, its file and line, and why."""

    path: str
    line: int  # from 1
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"

    def dump(self) -> str:
        """One line of JSON Lines."""
        return json.dumps({"file": self.path, "line": self.line, "reason": self.reason}, ensure_ascii=False) + "\n"


class Rejections:
    """
    Lists rejected rows in `<output>.rejected.jsonl`, one `{"file", "line", "reason"}` a line.

    Without rejected rows there is no file. The list of an earlier run stays until `report`.

    Args:
        output: the file or directory that the other rows go to.
        strict: raise a RunError at the first rejected row.
    """

    shown = 5

    def __init__(self, output: str, strict: bool = False):
        self.path = Path(f"{str(output).rstrip('/')}.rejected.jsonl")
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self.strict = strict
        self.count = 0
        self._first: dict[str, Rejection] = {}  # the first row of each reason
        self._file = None

    def add(self, path: str, line: int, reason: str | RowError) -> None:
        """
        List a rejected row.

        Raises:
            RunError: `strict` is set.
        """
        rejection = Rejection(path, line, str(reason).encode("utf-8", "backslashreplace").decode())
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path)
            self._file = self.temporary.open("w", encoding="utf-8", errors=UNENCODABLE)
        self._file.write(rejection.dump())
        self.count += 1
        if len(self._first) < self.shown:
            self._first.setdefault(rejection.reason, rejection)
        if self.strict:
            raise RunError(f"--strict: {rejection}")

    def report(self) -> None:
        """
        Close the list and show one row of each of its first reasons on stderr.

        Without rows, the list of an earlier run is removed.
        """
        if self._file is None:
            self.path.unlink(missing_ok=True)
            return
        self._file.close()
        os.replace(self.temporary, self.path)
        for rejection in self._first.values():
            print(one_line(str(rejection)), file=sys.stderr)
        listed = "the rejected row is" if self.count == 1 else f"all {self.count:,} rejected rows are"
        print(one_line(f"{listed} listed in {self.path}"), file=sys.stderr, flush=True)
