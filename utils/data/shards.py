"""Blocks of raw rows -> Arrow files of tokens, over several processes, in bounded memory; resumed after a kill."""

import collections
import concurrent.futures
import contextlib
import fcntl
import gc
import glob
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from utils.common.errors import RowError, RunError, UsageError
from utils.common.processes import end_with_parent
from utils.data.arrow_writer import SCHEMA, record_batch
from utils.data.dataset_report import TokenReport
from utils.data.encode import TokenBatch, encode_batch, fingerprint, rows_to_train
from utils.data.raw_reader import Block, read_blocks
from utils.data.rejections import Rejection
from utils.data.row_parser import NumberedRow, parse_row, rows_in_block
from utils.data.row_schema import NO_RENAMES, ColumnMap
from utils.models.conversation import Conversation
from utils.models.templates import ChatGLMTemplate
from utils.models.token_spans import IGNORE_INDEX
from utils.models.tokenization_base import VocabFileTokenizer

PART_BLOCKS = 8  # of a part, which is one Arrow file: about 8 MiB of raw rows
VERSION = 2  # of what is made of a row; a new one makes every dataset anew
REPORTS = "reports"  # directory of the finished parts' reports


@dataclass(frozen=True)
class TokenizeOptions:
    """What decides the tokens beside the tokenizer and the rows."""

    template: str
    max_seq_length: int
    skip_overlength: bool
    loss_on: str
    columns: ColumnMap = NO_RENAMES

    def parse(self, raw: Any) -> Conversation:
        return parse_row(raw, self.columns)


@dataclass(frozen=True)
class Part:
    """A finished Arrow file, without rows None, and what became of the raw rows of it."""

    number: int
    arrow_file: str | None
    report: TokenReport
    rejections: list[Rejection]

    def save(self, directory: Path) -> "Part":
        """Says in `directory` that the part is finished, once its file is on the disk."""
        if self.arrow_file:
            with open(directory / self.arrow_file, "rb") as file:
                os.fsync(file.fileno())
        content = {**asdict(self), "rejections": self.rejections}
        content["report"]["lengths"] = list(self.report.lengths.items())
        path = directory / REPORTS / f"{self.number}.json"
        path.with_suffix(".tmp").write_text(json.dumps(content), encoding="utf-8")
        path.with_suffix(".tmp").rename(path)
        return self

    @classmethod
    def load(cls, directory: Path, number: int) -> "Part | None":
        path = directory / REPORTS / f"{number}.json"
        if not path.is_file():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        lengths = collections.Counter(dict(content["report"].pop("lengths")))
        report = TokenReport(**content["report"], lengths=lengths)
        return cls(number, content["arrow_file"], report, [Rejection(*item) for item in content["rejections"]])


class PartMaker:
    """Tokenises the blocks of one part into `directory`; what a worker process holds."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatGLMTemplate,
        options: TokenizeOptions,
        directory: Path,
    ):
        self.tokenizer = tokenizer
        self.template = template
        self.options = options
        self.directory = directory

    def __call__(self, number: int, blocks: Sequence[Block]) -> Part:
        name = f"part-{number:05d}.arrow"
        report, rejections = TokenReport(), []
        with (
            no_garbage_collection(),
            open(self.directory / name, "wb") as file,
            pa.ipc.new_stream(file, SCHEMA) as writer,
        ):
            for block in blocks:
                batch = self._encode(block, report, rejections)
                if len(batch.lengths):
                    writer.write_batch(record_batch(batch))
        if not report.written:
            (self.directory / name).unlink()
        return Part(number, name if report.written else None, report, rejections)

    def _encode(self, block: Block, report: TokenReport, rejections: list[Rejection]) -> TokenBatch:
        """The rows to write; `report` and `rejections` gain what became of all."""
        usable: list[NumberedRow] = []
        for numbered in rows_in_block(block, self.options.parse):
            try:
                if isinstance(numbered.row, RowError):
                    raise numbered.row
                rows = rows_to_train(numbered.row, self.template, self.options.loss_on)
                usable += [numbered._replace(row=row) for row in rows]
            except RowError as error:
                rejections.append(Rejection(numbered.path, numbered.line, str(error)))
        report.read += len(usable) + len(rejections) - report.rejected
        options, rows = self.options, [row for _, _, row in usable]
        batch = encode_batch(self.tokenizer, rows, options.max_seq_length, self.template, options.loss_on)
        for number, error in batch.errors.items():
            rejections.append(Rejection(usable[number].path, usable[number].line, f"--max_seq_length: {error}"))
        report.rejected = len(rejections)
        encoded, cut = batch.lengths > 0, batch.tokens_cut > 0
        lengths, counts = np.unique((batch.lengths + batch.tokens_cut)[encoded], return_counts=True)
        report.lengths.update(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))
        if options.skip_overlength:
            report.skipped_overlength += int(cut.sum())
            encoded &= ~cut
        batch = batch.select(encoded)
        report.cut += int((batch.tokens_cut > 0).sum())
        report.written += len(batch.lengths)
        report.tokens += len(batch.labels)
        report.trained_tokens += int((batch.labels != IGNORE_INDEX).sum())
        return batch


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """
    Without Python's search for cycles, of which tokens make none: with so many small objects it walks the libraries'
    millions again and again, and takes half of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def cache_key(
    tokenizer: PreTrainedTokenizerBase, template: ChatGLMTemplate, options: TokenizeOptions, paths: Sequence[str]
) -> str:
    """A hash of all that decides a dataset: the tokenizer, the template, the options, and every byte of the input."""
    digest = hashlib.sha256()
    if isinstance(tokenizer, VocabFileTokenizer):
        digest.update(Path(tokenizer.vocab_file).read_bytes())
    else:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(json.dumps([VERSION, fingerprint(tokenizer, template), asdict(options), list(paths)]).encode())
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def parts_directory(target: Path, key: str) -> Iterator[Path]:
    """
    The directory beside `target` where the parts of the dataset `key` are collected, with what an earlier run of the
    same key left there; those of other keys are removed. It stays when the run fails.

    Raises:
        UsageError: another run works there now, or the directory cannot be made.
    """
    directory = target.with_name(f".{target.name}.{key}.parts")
    try:
        (directory / REPORTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--save_path {target} cannot be written: {error.strerror}") from None
    with open(directory / "lock", "w") as lock:
        if not _lock(lock):
            raise UsageError(f"another run is writing --save_path {target} now: wait for it or choose another path")
        for other in target.parent.glob(f".{glob.escape(target.name)}.*.parts"):
            if other != directory and (other / "lock").is_file():
                with open(other / "lock", "w") as other_lock:
                    if _lock(other_lock):
                        shutil.rmtree(other)
        yield directory


def _lock(file) -> bool:
    """Locks a file for this process, until it ends or closes the file; its child processes do not hold the lock."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def make_parts(
    maker: PartMaker, paths: Sequence[str], num_proc: int, meanwhile: Callable[[], None] = lambda: None
) -> Iterator[Part]:
    """
    Yields the parts of the files in their order; one that `maker.directory` has already is not made again. With
    worker processes, `meanwhile` is called when they have the last parts, and some of them nothing more to do.

    Raises:
        RunError: a worker process was killed.
    """
    blocks = itertools.chain.from_iterable(map(read_blocks, paths))
    batches = enumerate(iter(lambda: list(itertools.islice(blocks, PART_BLOCKS)), []))
    first = list(itertools.islice(batches, 2))
    batches = itertools.chain(first, batches)
    if num_proc == 1 or len(first) < 2:
        for number, batch in batches:
            yield Part.load(maker.directory, number) or maker(number, batch).save(maker.directory)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each process encodes for itself
    with concurrent.futures.ProcessPoolExecutor(
        num_proc, multiprocessing.get_context("fork"), _start_worker, (maker,)
    ) as pool:
        waiting: collections.deque = collections.deque()
        try:
            for number, batch in batches:
                waiting.append(Part.load(maker.directory, number) or pool.submit(_make_part, number, batch))
                if len(waiting) > num_proc + 1:
                    yield _result(waiting.popleft(), maker.directory)
            meanwhile()
            while waiting:
                yield _result(waiting.popleft(), maker.directory)
        except BrokenProcessPool:
            raise RunError(
                "a worker process was killed, perhaps for want of memory: run the command again, with a lower "
                "--num_proc; what is done so far is kept"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_maker: PartMaker | None = None  # of a worker process


def _start_worker(maker: PartMaker) -> None:
    global _maker
    _maker = maker
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C


def _make_part(number: int, blocks: Sequence[Block]) -> Part:
    return _maker(number, blocks)


def _result(part: "Part | concurrent.futures.Future[Part]", directory: Path) -> Part:
    return part if isinstance(part, Part) else part.result().save(directory)
