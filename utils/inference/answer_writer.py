"""
Write the answers of batch inference: first to journals, at the end to the output.

In: answers as they come, in any order, from several processes. Out: --output_path, in row order, all at once; until
then a journal a process beside it (utils/inference/answer_journal.py), from which a killed command resumes. An old
answer counts if it was made with the settings and for the row of now: each record has hashes of both. The output has
no place for hashes; they are in a marker beside it, `.NAME.settings.json`. Results of other settings, edited files and
journals without checksums are never overwritten: they are kept as NAME.previous-N.

A finished output is read back too, also a CSV or TSV table: the same command, run again, tries only the rows with
errors, and with a changed input answers only the rows that changed. Resuming from journals alone would lose that.
Called by utils/inference/job.py and utils/inference/generate.py.
"""

import contextlib
import fcntl
import glob
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.common.console import print_line
from utils.common.errors import UsageError
from utils.common.files import atomic_writer
from utils.common.json_files import read_json_object
from utils.common.processes import is_main_process
from utils.data.json_lines import dump_row
from utils.distributed.process_group import on_all_processes
from utils.inference.answer_journal import (
    JOURNAL_VERSION,
    JournalContent,
    encode_record,
    hash_of,
    parse_json,
    read_journal,
    split_objects,
)
from utils.inference.answer_settings import describe_differences
from utils.inference.answer_tables import answer_table_lines, read_answer_table
from utils.inference.prompt_reader import SEPARATORS, PromptRow

Answer = dict[str, Any]  # as `generate_answers` yields it: a line of the output
SYNC_SECONDS = 5.0  # a machine that dies loses at most the answers of this time
ANSWER_PREFIX = b'{"index": '  # begins each line of a JSON Lines output


def row_hash(prompt: PromptRow) -> str:
    """Hash the tokens and the adapter of a row, which decide its answer, and its text."""
    names = json.dumps([prompt.prompt, prompt.adapter]).encode()
    return hash_of(names, np.asarray(prompt.input_ids, dtype=np.int64).tobytes())


def answer_hash(row: str, answer: Answer) -> str:
    """Hash an answer of the output together with the hash of its row."""
    return hash_of(row.encode(), json.dumps(answer, sort_keys=True).encode())


class AnswerFile:
    """
    The output of a command, and the journal of this process.

    Call `begin`, `open`, then `add` for each answer, `close`, on the main process `finish`, and `end`.

    Args:
        path: the output: JSON Lines, or a table if it ends in .csv or .tsv.
        settings: what decides the answers beside the rows themselves; JSON values.
        paths: of model and adapters by their flags, for messages about answers of another command.
        process: number of this process; each has a journal of its own.
        overwrite: ignore what an earlier command left.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        settings: dict[str, Any],
        process: int = 0,
        overwrite: bool = False,
        paths: dict[str, Any] | None = None,
    ):
        self.path, self.paths = Path(path), paths or {}
        self.settings = json.loads(json.dumps(settings))
        self.settings_hash = hash_of(json.dumps([JOURNAL_VERSION, self.settings], sort_keys=True).encode())
        self.journal_path = self.path.with_name(f"{self.path.name}.partial-{process}")
        self.marker = self.path.with_name(f".{self.path.name}.settings.json")
        self.journal = self.lock = None
        self.synced = time.monotonic()
        self.overwrite = overwrite
        self.row_hashes: dict[int, str] = {}
        self.unusable: list[Path] = []  # journals without a single whole record
        self.replaceable: str | None = None  # hash of the output if all its answers are taken over
        self.others = "is no result of such a command"  # why the output's answers are not taken over

    def begin(self, prompts: Sequence[PromptRow]) -> dict[int, Answer]:
        """
        Claim the output until this process ends; return the known answers by index.

        Every process must call it; all get the same answers.

        Raises:
            UsageError: on every process: the output is in use or cannot be written to; or see `known`.
        """
        on_all_processes(self._claim)
        if self.overwrite:
            on_all_processes(self.remove_journals)
        known: dict[int, Answer] = {}
        for answers in on_all_processes(lambda: self.known(prompts)):  # other machines may have other disks
            known |= answers
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
            print_line(f"{self.path.parent} has no locks ({error.strerror}): start no second command with this output")

    def known(self, prompts: Sequence[PromptRow]) -> dict[int, Answer]:
        """
        Return by index the answers of an earlier run to rows that have not changed.

        Raises:
            UsageError: an unfinished command with other settings left answers there.
        """
        self.row_hashes = {prompt.index: row_hash(prompt) for prompt in prompts if not prompt.error}
        if self.overwrite:
            return {}
        known = self._read_output()
        for path in self._journals():
            journal = read_journal(path)
            if not journal.usable:
                self.unusable.append(path)
            elif journal.damaged:
                print_line(f"{path}: {journal.damaged} records are damaged or cut off: their rows are answered again")
            for answer in journal.records:
                settings, row = answer.pop("settings", None), answer.pop("row", None)
                if settings != self.settings_hash:
                    raise UsageError(self._describe_other(path, journal))
                if row is not None and row == self.row_hashes.get(answer["index"]):
                    known[answer["index"]] = answer
        return known

    def _keep_unusable_journals(self) -> None:
        """Keep, under another name, files in a journal's place that it cannot continue."""
        if not is_main_process():
            return
        for path in self.unusable:
            name = self._keep(path)
            print_line(f"{path} has no answers with checksums: rows are answered again, and it is kept as {name}")

    def _keep(self, path: Path) -> str:
        """Rename a file to the next free NAME.previous-N, and return that name."""
        number = 1
        while (kept := self.path.with_name(f"{self.path.name}.previous-{number}")).exists():
            number += 1
        path.rename(kept)
        return kept.name

    def _describe_other(self, path: Path, journal: JournalContent) -> str:
        others = "other settings"
        if journal.settings:
            others = describe_differences(journal.settings, self.settings, journal.paths, self.paths)
        return (
            f"--output_path {self.path} has unfinished answers of another command, in {path.name}: "
            f"{others}; give another --output_path, or --overwrite, or run that command to its end"
        )

    def open(self) -> None:
        """Begin this process's journal, or continues it after its last record."""
        try:
            content = read_journal(self.journal_path) if self.journal_path.exists() else JournalContent()
            if not content.usable:  # `begin` kept those on the main process's disk; this is another disk
                self._keep(self.journal_path)
            self.journal = self.journal_path.open("ab", buffering=0)  # `close` must not retry what a full disk refused
            if content.records:
                self.journal.write(b"\n")  # the last record may have been cut off
            else:
                self.journal.truncate(0)
                self._append({"version": JOURNAL_VERSION, "settings": self.settings, "paths": self.paths})
        except OSError as error:
            raise UsageError(f"--output_path {self.path} cannot be written: {error.strerror}") from None

    def add(self, answer: Answer) -> None:
        """Append an answer to the journal, which a killed process does not lose."""
        self._append({"settings": self.settings_hash, "row": self.row_hashes[answer["index"]]} | answer)
        if time.monotonic() - self.synced > SYNC_SECONDS:
            os.fsync(self.journal.fileno())
            self.synced = time.monotonic()

    def _append(self, row: dict[str, Any]) -> None:
        data = encode_record(row)
        while data:  # a disk that is nearly full takes only some of the bytes
            data = data[self.journal.write(data) :]

    def close(self) -> None:
        """Close the journal; no more answers can be added."""
        if self.journal is not None:
            self.journal.close()

    def finish(self, answers: Iterable[Answer]) -> None:
        """
        Write the output, which appears whole.

        A file in its place stays beside it as NAME.previous-N, unless all its answers are in the new output.

        Args:
            answers: of all rows, in their order.
        """
        answers = list(answers)
        with atomic_writer(self.path) as output:
            if separator := SEPARATORS.get(self.path.suffix.lower()):
                output.writelines(answer_table_lines(answers, separator))
            else:
                output.writelines(dump_row(answer) for answer in answers)
            output.flush()
            # The marker first: without it the answers of the output would not be known.
            self._write_marker(answers, _hash_file(Path(output.name)))
            self._set_aside(_hash_file(Path(output.name)))

    def _write_marker(self, answers: list[Answer], output_hash: str) -> None:
        hashes: list[str | None] = [None] * (answers[-1]["index"] + 1 if answers else 0)
        for answer in answers:
            if answer["finish_reason"] != "error":
                hashes[answer["index"]] = answer_hash(self.row_hashes[answer["index"]], answer)
        with atomic_writer(self.marker) as marker:
            content = {"version": JOURNAL_VERSION, "settings": self.settings, "paths": self.paths}
            content |= {"output": output_hash, "rows": hashes}
            json.dump(content, marker, ensure_ascii=False)

    def _set_aside(self, new_hash: str) -> None:
        """Keep, under another name, an old output whose answers are not all in the new one."""
        if self.overwrite or not self.path.exists() or _hash_file(self.path) in (new_hash, self.replaceable):
            return
        name = self._keep(self.path)
        print_line(f"{self.path} {self.others}: it is kept as {name}")

    def remove_journals(self) -> None:
        """Remove the journals of all processes from this process's disk."""
        for journal in self._journals():
            journal.unlink(missing_ok=True)

    def end(self) -> None:
        """Remove the journals and releases the output, once `finish` has written it."""
        self.remove_journals()
        if self.lock is not None:
            self.lock.close()

    def _journals(self) -> list[Path]:
        pattern = f"{glob.escape(self.path.name)}.partial-*"
        return sorted(path for path in self.path.parent.glob(pattern) if path.is_file())

    def _read_output(self) -> dict[int, Answer]:
        """Return the unedited answers of a finished output to rows that have not changed."""
        try:
            types = {"version": int, "settings": dict, "output": str, "rows": list}
            marker = read_json_object(self.marker, types) if self.marker.exists() else {}
        except UsageError as error:
            print_line(f"{error}: rows are answered again")
            marker = {}
        if marker.get("version") != JOURNAL_VERSION or not self.path.is_file():
            return {}
        if marker["settings"] != self.settings:
            paths = marker.get("paths") or {}
            differences = describe_differences(marker["settings"], self.settings, paths, self.paths)
            self.others = f"has answers of another command ({differences})"
            return {}
        self.others = "has answers to other rows, or was edited"
        data = self.path.read_bytes()
        hashes = dict(enumerate(marker["rows"]))
        known = {}
        for answer in self._answers_in(data):
            index = answer.get("index") if isinstance(answer, dict) else None
            if type(index) is not int or index not in self.row_hashes or hashes.get(index) is None:
                continue
            with contextlib.suppress(RecursionError):  # nested more deeply than any answer
                if hashes[index] == answer_hash(self.row_hashes[index], answer):
                    known[index] = answer
        answered = sum(row is not None for row in marker["rows"])
        if hash_of(data) == marker["output"] and len(known) == answered:
            self.replaceable = marker["output"]
        return known

    def _answers_in(self, data: bytes) -> Iterator[Any]:
        """Yield the values of an output's lines: anything, if someone edited them."""
        if separator := SEPARATORS.get(self.path.suffix.lower()):
            return read_answer_table(data, separator)
        return map(parse_json, split_objects(data, ANSWER_PREFIX))


def _hash_file(path: Path) -> str:
    return hash_of(path.read_bytes())
