"""
Answers on their way to a file: each in a journal as soon as it is known, all of them in the output, in the rows'
order, when the last is. A command that was killed goes on where its journals end.
"""

import contextlib
import csv
import glob
import hashlib
import io
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UsageError
from utils.jsonl import atomic_writer, dump_row
from utils.requests import SEPARATORS, Request

Answer = dict[str, Any]
COLUMNS = ("index", "prompt", "answer", "finish_reason", "prompt_tokens", "answer_tokens")
NUMBERS = ("index", "prompt_tokens", "answer_tokens")
SYNC_SECONDS = 5.0


class AnswerFile:
    """
    Args:
        path: the output, JSON Lines, or a table where it ends in .csv or .tsv.
        settings: what decides the answers beside the rows themselves; as JSON has it.
        process: number of this process; each has a journal of its own.
        overwrite: forget what an earlier command left.

    Raises:
        UsageError: an unfinished command with other settings left answers there; or it cannot be written to.
    """

    def __init__(self, path: str | os.PathLike, settings: dict[str, Any], process: int = 0, overwrite: bool = False):
        self.path = Path(path)
        self.settings = json.loads(json.dumps(settings))
        self.journal_path = self._journal(str(process))
        self.marker = self.path.with_name(f".{self.path.name}.settings.json")
        self.journal = None
        self.synced = time.monotonic()
        self.overwrite = overwrite
        if self.path.is_dir():
            raise UsageError(f"--output_path {self.path} is a directory: name a file")

    def _journal(self, process: str) -> Path:
        return self.path.with_name(f"{self.path.name}.partial-{process}")

    def _journals(self) -> list[Path]:
        pattern = f"{glob.escape(self.path.name)}.partial-*"
        return sorted(self.path.parent.glob(pattern))

    def known(self, requests: Sequence[Request]) -> dict[int, Answer]:
        """
        The answers, by index, that an earlier run of the command left in its journals or in its complete output, to
        rows that are still the same.
        """
        if self.overwrite:
            return {}
        found: list[Answer] = []
        if self._read_json(self.marker) == self.settings:
            found += self._read_output()
        for journal in self._journals():
            settings, answers = _read_journal(journal)
            if settings is not None and settings != self.settings:
                differing = [name for name in self.settings if settings.get(name) != self.settings[name]]
                raise UsageError(
                    f"--output_path {self.path} has unfinished answers of another command, in {journal.name}: "
                    f"{', '.join(differing) or 'its settings'} differ; run that one to its end, or give --overwrite"
                )
            found += answers
        prompts = {request.index: (request.prompt, request.adapter) for request in requests if not request.error}
        return {
            answer["index"]: answer
            for answer in found
            if prompts.get(answer["index"], ()) == (answer["prompt"], answer.get("adapter"))
        }

    def open(self) -> None:
        """Begins this process's journal, or goes on with it behind its last whole line."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.journal = self.journal_path.open("ab", buffering=0)  # what a full disk refused is not tried again
            if self.overwrite:
                self.journal.truncate(0)
            self.journal.truncate(_whole_lines(self.journal_path))
        except OSError as error:
            raise UsageError(f"--output_path {self.path} cannot be written: {error.strerror}") from None
        if self.journal.tell() == 0 or self.journal_path.stat().st_size == 0:
            self._append({"settings": self.settings})

    def add(self, answer: Answer) -> None:
        """Keeps an answer: from here on a killed process does not lose it, and a dead machine not what is older."""
        self._append(answer)
        if time.monotonic() - self.synced > SYNC_SECONDS:
            os.fsync(self.journal.fileno())
            self.synced = time.monotonic()

    def _append(self, row: dict[str, Any]) -> None:
        data = dump_row(row).encode()
        while data:  # a disk that is nearly full takes a part of it
            data = data[self.journal.write(data) :]

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()

    def finish(self, answers: Iterable[Answer]) -> None:
        """Writes the output, which appears whole, and removes the journals."""
        answers = list(answers)
        self.marker.unlink(missing_ok=True)
        with atomic_writer(self.path) as output:
            if separator := SEPARATORS.get(self.path.suffix.lower()):
                more = {name for answer in answers for name in answer} - set(COLUMNS)
                table = csv.DictWriter(output, [*COLUMNS, *sorted(more)], delimiter=separator, lineterminator="\n")
                table.writeheader()
                table.writerows(_as_cells(answer) for answer in answers)
            else:
                output.writelines(dump_row(answer) for answer in answers)
        with atomic_writer(self.marker) as marker:
            json.dump(self.settings, marker, ensure_ascii=False)
        for journal in self._journals():
            journal.unlink(missing_ok=True)

    def _read_output(self) -> list[Answer]:
        """The answers of a complete output; errors are not answers."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return []
        answers = []
        if separator := SEPARATORS.get(self.path.suffix.lower()):
            for cells in csv.DictReader(io.StringIO(text, newline=""), delimiter=separator):
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    answers.append(_of_cells(cells))
        else:
            for line in text.split("\n"):
                with contextlib.suppress(ValueError):
                    answers.append(json.loads(line))
        return [answer for answer in answers if isinstance(answer, dict) and answer.get("finish_reason") != "error"]

    @staticmethod
    def _read_json(path: Path) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


def digest_of(path: str | os.PathLike) -> str:
    """A hash of an adapter's files, to tell it from another."""
    path = Path(path)
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def _whole_lines(path: Path) -> int:
    """Bytes up to and with the last newline."""
    return path.read_bytes().rfind(b"\n") + 1


def _read_journal(path: Path) -> tuple[dict[str, Any] | None, list[Answer]]:
    """Settings and answers; None and nothing where not even its first line is whole."""
    rows = []
    data = path.read_bytes()
    for line in data[: data.rfind(b"\n")].split(b"\n"):
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    if not rows or not isinstance(rows[0], dict) or "settings" not in rows[0]:
        return None, []
    return rows[0]["settings"], [row for row in rows[1:] if isinstance(row, dict) and "index" in row]


def _as_cells(answer: Answer) -> dict[str, Any]:
    return {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
        for name, value in answer.items()
    }


def _of_cells(cells: dict[str, str]) -> Answer:
    answer: Answer = {}
    for name, cell in cells.items():
        if name in NUMBERS:
            answer[name] = int(cell) if cell else None
        elif name == "answers":
            answer[name] = json.loads(cell) if cell else None
        else:
            answer[name] = cell
    return {name: value for name, value in answer.items() if value is not None and (value != "" or name in COLUMNS)}
