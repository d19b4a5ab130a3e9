"""
Answers on their way to a file: each in a journal as soon as it is known, all of them in the output, in the rows'
order, when the last is. A command that was killed goes on where its journals end.

A journal's line is a record: a checksum of the bytes behind it, then the answer with hashes of the command's settings
and of the row's tokens. So every record stands for itself: what is damaged is lost alone, and an answer counts where
its settings and its row are those of now. The finished output has no place for such hashes; they are in a marker
beside it, `.NAME.settings.json`. What earlier versions wrote has neither: its rows are answered again, for nothing
there says which weights and tokens an answer was made from.
"""

import contextlib
import csv
import fcntl
import glob
import hashlib
import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.common.errors import UsageError
from utils.common.files import UNENCODABLE, atomic_writer
from utils.common.json_files import read_json_object
from utils.common.processes import is_main_process, print_once
from utils.data.json_lines import dump_row
from utils.distributed.process_group import on_all_processes
from utils.inference.prompt_reader import SEPARATORS, PromptRow

Answer = dict[str, Any]
VERSION = 2  # of journals and markers; the first had no number
COLUMNS = ("index", "prompt", "answer", "finish_reason", "prompt_tokens", "answer_tokens")
NUMBERS = ("index", "prompt_tokens", "answer_tokens")
SYNC_SECONDS = 5.0
RECORD = b'{"checksum": "'  # begins each; inside a JSON string its quotes would be escaped
OUTPUT_ROW = b'{"index": '
DIGITS = 16  # of a checksum or hash, hexadecimal


def hash_of(*parts: bytes) -> str:
    return hashlib.blake2b(b"".join(parts), digest_size=DIGITS // 2).hexdigest()


def row_hash(request: PromptRow) -> str:
    """Of what decides a row's answer: its tokens and the adapter that it names; and of its text, which is written."""
    names = json.dumps([request.prompt, request.adapter]).encode()
    return hash_of(names, np.asarray(request.input_ids, dtype=np.int64).tobytes())


def answer_hash(row: str, answer: Answer) -> str:
    """Of an answer in the output and the row that it belongs to."""
    return hash_of(row.encode(), json.dumps(answer, sort_keys=True).encode())


@dataclass
class JournalContent:
    settings: dict[str, Any] | None = None  # None where that line is damaged
    records: list[Answer] = field(default_factory=list)  # with "settings" and "row", their hashes
    damaged: int = 0
    usable: bool = True  # whether it is a journal of this version: it begins as one, or has a record


class AnswerFile:
    """
    Args:
        path: the output, JSON Lines, or a table where it ends in .csv or .tsv.
        settings: what decides the answers beside the rows themselves; as JSON has it.
        process: number of this process; each has a journal of its own.
        overwrite: forget what an earlier command left.
    """

    def __init__(self, path: str | os.PathLike, settings: dict[str, Any], process: int = 0, overwrite: bool = False):
        self.path = Path(path)
        self.settings = json.loads(json.dumps(settings))
        self.settings_hash = hash_of(json.dumps([VERSION, self.settings], sort_keys=True).encode())
        self.journal_path = self.path.with_name(f"{self.path.name}.partial-{process}")
        self.marker = self.path.with_name(f".{self.path.name}.settings.json")
        self.journal = self.lock = None
        self.synced = time.monotonic()
        self.overwrite = overwrite
        self.row_hashes: dict[int, str] = {}
        self.unusable: list[Path] = []  # journals
        self.replaceable: str | None = None  # hash of an output all of whose answers are known

    def begin(self, requests: Sequence[PromptRow]) -> dict[int, Answer]:
        """
        Claims the output until this process ends, and returns the answers, by index, that are known. Every process
        must call it, and gets the same.

        Raises:
            UsageError: on every process: the output is in use or cannot be written to; or see `known`.
        """
        on_all_processes(self._claim)
        if self.overwrite:
            on_all_processes(self.remove_journals)
        known: dict[int, Answer] = {}
        for others in on_all_processes(lambda: self.known(requests)):  # other machines may have other disks
            known |= others
        on_all_processes(self._keep_unusable_journals)
        return known

    def _claim(self) -> None:
        if not is_main_process():  # machines may share the directory, and its lock
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = self.path.with_name(f".{self.path.name}.lock").open("ab")
        except OSError as error:
            raise UsageError(f"--output_path {self.path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"--output_path {self.path} is in use by a command that has not ended: wait for it, stop it, or name "
                "another file"
            ) from None
        except OSError as error:
            print(f"{self.path.parent} has no locks ({error.strerror}): start no second command with this output")

    def known(self, requests: Sequence[PromptRow]) -> dict[int, Answer]:
        """
        The answers, by index, that an earlier run of the command left in its journals or in its complete output, to
        rows that are still the same.

        Raises:
            UsageError: an unfinished command with other settings left answers there.
        """
        self.row_hashes = {request.index: row_hash(request) for request in requests if not request.error}
        if self.overwrite:
            return {}
        known = self._read_output()
        for path in self._journals():
            journal = _read_journal(path)
            if not journal.usable:
                self.unusable.append(path)
            elif journal.damaged:
                print_once(f"{path}: {journal.damaged} records are damaged or cut off: their rows are answered again")
            for answer in journal.records:
                settings, row = answer.pop("settings", None), answer.pop("row", None)
                if settings != self.settings_hash:
                    raise UsageError(self._describe_other(path, journal.settings))
                if row is not None and row == self.row_hashes.get(answer["index"]):
                    known[answer["index"]] = answer
        return known

    def _keep_unusable_journals(self) -> None:
        """Those without a record that is whole, such as an earlier version's: the main process, on its disk."""
        for path in self.unusable if is_main_process() else ():
            name = self._keep(path)
            print(
                f"{path} has no answers with checksums: rows are answered again, and it is kept as {name}", flush=True
            )

    def _keep(self, path: Path) -> str:
        """Gives a file beside the output a name that no other has, and returns it."""
        number = 1
        while (kept := self.path.with_name(f"{self.path.name}.previous-{number}")).exists():
            number += 1
        path.rename(kept)
        return kept.name

    def _describe_other(self, path: Path, settings: dict[str, Any] | None) -> str:
        differing = [name for name in self.settings if settings and settings.get(name) != self.settings[name]]
        return (
            f"--output_path {self.path} has unfinished answers of another command, in {path.name}: "
            f"{', '.join(differing) or 'its settings'} differ; run that one to its end, or give --overwrite"
        )

    def open(self) -> None:
        """Begins this process's journal, or goes on with it behind its last record."""
        try:
            content = _read_journal(self.journal_path) if self.journal_path.exists() else JournalContent()
            if not content.usable:  # on another disk than the main process's
                self._keep(self.journal_path)
            self.journal = self.journal_path.open("ab", buffering=0)  # what a full disk refused is not tried again
            if content.records:
                self.journal.write(b"\n")  # a record may have been cut off
            else:
                self.journal.truncate(0)
                self._append({"version": VERSION, "settings": self.settings})
        except OSError as error:
            raise UsageError(f"--output_path {self.path} cannot be written: {error.strerror}") from None

    def add(self, answer: Answer) -> None:
        """Keeps an answer: from here on a killed process does not lose it, and a dead machine not what is older."""
        self._append({"settings": self.settings_hash, "row": self.row_hashes[answer["index"]]} | answer)
        if time.monotonic() - self.synced > SYNC_SECONDS:
            os.fsync(self.journal.fileno())
            self.synced = time.monotonic()

    def _append(self, row: dict[str, Any]) -> None:
        body = dump_row(row)[1:-1].encode("utf-8", UNENCODABLE)
        data = RECORD + f'{hash_of(body)}", '.encode() + body + b"\n"
        while data:  # a disk that is nearly full takes a part of it
            data = data[self.journal.write(data) :]

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()

    def finish(self, answers: Iterable[Answer]) -> None:
        """
        Writes the output, which appears whole. A file in its place that holds something else than answers that are
        taken over, such as a result of other settings or a hand's changes, is kept beside it.
        """
        answers = list(answers)
        with atomic_writer(self.path) as output:
            if separator := SEPARATORS.get(self.path.suffix.lower()):
                output.writelines(_table_lines(answers, separator))
            else:
                output.writelines(dump_row(answer) for answer in answers)
            output.flush()
            self._write_marker(answers, _hash_file(Path(output.name)))  # first: an output without one is not known
            self._set_aside(_hash_file(Path(output.name)))

    def _write_marker(self, answers: list[Answer], output: str) -> None:
        hashes: list[str | None] = [None] * (answers[-1]["index"] + 1 if answers else 0)
        for answer in answers:
            if answer["finish_reason"] != "error":
                hashes[answer["index"]] = answer_hash(self.row_hashes[answer["index"]], answer)
        with atomic_writer(self.marker) as marker:
            content = {"version": VERSION, "settings": self.settings, "output": output, "rows": hashes}
            json.dump(content, marker, ensure_ascii=False)

    def _set_aside(self, new: str) -> None:
        if self.overwrite or not self.path.exists() or _hash_file(self.path) in (new, self.replaceable):
            return
        name = self._keep(self.path)
        print(f"{self.path} was no earlier result of this command: it is kept as {name}", flush=True)

    def remove_journals(self) -> None:
        """On the disk of this process."""
        for journal in self._journals():
            journal.unlink(missing_ok=True)

    def end(self) -> None:
        """Once the output is there: removes what was needed on the way to it, and lets others have it."""
        self.remove_journals()
        if self.lock is not None:
            self.lock.close()

    def _journals(self) -> list[Path]:
        pattern = f"{glob.escape(self.path.name)}.partial-*"
        return sorted(path for path in self.path.parent.glob(pattern) if path.is_file())

    def _read_output(self) -> dict[int, Answer]:
        """The answers of a complete output that are as they were written, to rows that are still the same."""
        try:
            types = {"version": int, "settings": dict, "output": str, "rows": list}
            marker = read_json_object(self.marker, types) if self.marker.exists() else {}
        except UsageError as error:
            print_once(f"{error}: rows are answered again")
            marker = {}
        if marker.get("version") != VERSION or marker["settings"] != self.settings or not self.path.is_file():
            return {}
        data = self.path.read_bytes()
        separator = SEPARATORS.get(self.path.suffix.lower())
        hashes = dict(enumerate(marker["rows"]))
        known = {}
        for answer in _rows_of_table(data, separator) if separator else map(_parse, _split(data, OUTPUT_ROW)):
            index = answer.get("index") if isinstance(answer, dict) else None
            if type(index) is not int or index not in self.row_hashes or hashes.get(index) is None:
                continue
            with contextlib.suppress(RecursionError):  # no answer is as deep
                if hashes[index] == answer_hash(self.row_hashes[index], answer):
                    known[index] = answer
        if hash_of(data) == marker["output"] and len(known) == sum(each is not None for each in marker["rows"]):
            self.replaceable = marker["output"]
        return known


def _hash_file(path: Path) -> str:
    return hash_of(path.read_bytes())


def _split(data: bytes, beginning: bytes) -> Iterator[bytes]:
    """
    The objects that stand one a line. Each begins with `beginning`, so that two are told apart where the newline
    between them is damaged.
    """
    for line in data.split(b"\n"):
        first, *others = line.split(beginning)
        if first.strip():
            yield first
        for other in others:
            yield beginning + other[: other.rfind(b"}") + 1]


def _parse(data: bytes) -> Any:
    """The JSON value in `data`; None where it holds none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _read_journal(path: Path) -> JournalContent:
    content, data = JournalContent(), path.read_bytes()
    start = len(RECORD) + DIGITS + len(b'", ')
    for line in _split(data, RECORD):
        body = line[start:]
        row = None
        if line.startswith(RECORD) and line[len(RECORD) :][:DIGITS] == hash_of(body).encode():
            row = _parse(b"{" + body)
        if not isinstance(row, dict):
            content.damaged += 1
        elif isinstance(row.get("settings"), dict):
            content.settings = row["settings"]
        elif isinstance(row.get("settings"), str) and type(row.get("index")) is int:
            content.records.append(row)
        else:
            content.damaged += 1
    content.usable = bool(content.records) or data[: len(RECORD)] == RECORD[: len(data)]
    return content


def _rows_of_table(data: bytes, separator: str) -> Iterator[Answer]:
    csv.field_size_limit(1 << 30)
    rows = csv.DictReader(io.StringIO(data.decode(errors="replace"), newline=""), delimiter=separator)
    while True:
        try:
            yield _of_cells(next(rows))
        except StopIteration:
            return
        except (csv.Error, ValueError, TypeError, RecursionError):  # no row that was written
            continue


def _table_lines(answers: list[Answer], separator: str) -> Iterator[str]:
    more = {name for answer in answers for name in answer} - set(COLUMNS)
    line = io.StringIO(newline="")
    # `csv` puts a cell in quotes for a character of the line's end: a text's CR would end its row.
    table = csv.DictWriter(line, [*COLUMNS, *sorted(more)], delimiter=separator, lineterminator="\r\n")
    for cells in ({name: name for name in table.fieldnames}, *map(_as_cells, answers)):
        table.writerow(cells)
        yield line.getvalue()[:-2] + "\n"
        line.seek(line.truncate(0))


def _as_cells(answer: Answer) -> dict[str, Any]:
    return {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
        for name, value in answer.items()
    }


def _of_cells(cells: dict[str | None, str]) -> Answer:
    if None in cells:
        raise ValueError("more cells than columns")
    answer: Answer = {}
    for name, cell in cells.items():
        if name in NUMBERS:
            answer[name] = int(cell) if cell else None
        elif name == "answers":
            answer[name] = json.loads(cell) if cell else None
        else:
            answer[name] = cell
    return {name: value for name, value in answer.items() if value is not None and (value != "" or name in COLUMNS)}
