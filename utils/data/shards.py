"""
Tokenises blocks of raw rows into Arrow files, over several processes, in bounded memory, resumed after a kill.

tokenize_dataset_rows_belle.py calls it. Each shard of about 8 MiB of raw rows becomes one Arrow file with a report
beside it, in a directory whose name holds a hash of tokenizer, template, options and input: a run that finds it
resumes there, and a run with anything changed does not. The complete directory becomes the dataset.

`datasets.Dataset.map(num_proc=...)` would need the whole input as a table first, one schema for all rows, and starts
anew after a kill.
"""

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
from utils.data.arrow_writer import SCHEMA, record_batch, replace_dataset
from utils.data.dataset_report import TokenReport
from utils.data.encode import TokenBatch, encode_batch, fingerprint, rows_to_train
from utils.data.raw_reader import BLOCK_BYTES, Block, read_blocks
from utils.data.rejections import Rejection
from utils.data.row_parser import NumberedRow, parse_row, rows_in_block
from utils.data.row_schema import NO_RENAMES, ColumnMap
from utils.models.conversation import Conversation
from utils.models.templates import ChatTemplate
from utils.models.token_spans import IGNORE_INDEX
from utils.models.tokenization_base import VocabFileTokenizer

SHARD_BLOCKS = 8  # blocks of an Arrow file, 8 MiB of raw rows: a few seconds of work, which a kill may cost
SHARDS_VERSION = 2  # of the tokens that a row becomes; a new one tokenises every dataset again
REPORTS_DIRECTORY = "reports"  # reports of the finished shards
SHARDS_LOCK_FILE = "lock"


@dataclass(frozen=True)
class TokenizeOptions:
    """
    What decides the tokens besides the tokenizer and the rows.

    The field names are hashed in `cache_key`.
    """

    template: str
    max_seq_length: int
    skip_overlength: bool
    loss_on: str
    columns: ColumnMap = NO_RENAMES
    chat_options: tuple[tuple[str, Any], ...] = ()  # variables of the template that flags set

    def parse(self, raw: Any) -> Conversation:
        """
        Read a training row from a raw one.

        Raises:
            RowError: the row cannot be used.
        """
        return parse_row(raw, self.columns)


@dataclass(frozen=True)
class Shard:
    """
    A finished Arrow file and what became of its raw rows.

    The file is None if no row was written. `raw_bytes` are those of its rows in the raw files.

    Format: reports/NUMBER.json has these field names as its keys.
    """

    number: int
    arrow_file: str | None
    report: TokenReport
    rejections: list[Rejection]
    raw_bytes: int

    def save(self, directory: Path) -> "Shard":
        """
        Record that the shard is finished, and return it.

        Syncs the Arrow file to the disk before it writes the report.
        """
        if self.arrow_file:
            with open(directory / self.arrow_file, "rb") as file:
                os.fsync(file.fileno())
        content = {**asdict(self), "rejections": self.rejections}
        content["report"]["lengths"] = list(self.report.lengths.items())
        path = directory / REPORTS_DIRECTORY / f"{self.number}.json"
        path.with_suffix(".tmp").write_text(json.dumps(content), encoding="utf-8")
        path.with_suffix(".tmp").rename(path)
        return self

    @classmethod
    def load(cls, directory: Path, number: int) -> "Shard | None":
        """The finished shard `number` in `directory`, or None."""
        path = directory / REPORTS_DIRECTORY / f"{number}.json"
        if not path.is_file():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        lengths = collections.Counter(dict(content["report"].pop("lengths")))
        report = TokenReport(**content["report"], lengths=lengths)
        rejections = [Rejection(*item) for item in content["rejections"]]
        return cls(number, content["arrow_file"], report, rejections, content.get("raw_bytes", 0))


@dataclass(frozen=True)
class ShardTokenizer:
    """
    Tokenises the blocks of a shard into an Arrow file in `directory`.

    Each worker process has a ShardTokenizer.
    """

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    options: TokenizeOptions
    directory: Path

    def __call__(self, number: int, blocks: Sequence[Block]) -> Shard:
        """Write the Arrow file of shard `number`."""
        name = f"part-{number:05d}.arrow"
        report, rejections = TokenReport(), []
        with (
            no_garbage_collection(),
            open(self.directory / name, "wb") as file,
            pa.ipc.new_stream(file, SCHEMA) as writer,
        ):
            for block in blocks:
                batch = self.encode_block(block, report, rejections)
                if len(batch.lengths):
                    writer.write_batch(record_batch(batch))
        if not report.written:
            (self.directory / name).unlink()
        raw_bytes = sum(block.raw_bytes for block in blocks)
        return Shard(number, name if report.written else None, report, rejections, raw_bytes)

    def encode_block(self, block: Block, report: TokenReport, rejections: list[Rejection]) -> TokenBatch:
        """The rows to write; adds what became of all rows to `report` and `rejections`."""
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
        batch = encode_batch(self.tokenizer, rows, options.max_seq_length, self.template)
        for number, error in batch.errors.items():
            rejections.append(Rejection(usable[number].path, usable[number].line, f"--max_seq_length: {error}"))
        report.rejected = len(rejections)
        is_written, is_cut = batch.lengths > 0, batch.tokens_cut > 0
        lengths, counts = np.unique((batch.lengths + batch.tokens_cut)[is_written], return_counts=True)
        report.lengths.update(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))
        if options.skip_overlength:
            report.skipped_overlength += int(is_cut.sum())
            is_written &= ~is_cut
        batch = batch.select(is_written)
        report.cut += int((batch.tokens_cut > 0).sum())
        report.written += len(batch.lengths)
        report.tokens += len(batch.labels)
        report.trained_tokens += int((batch.labels != IGNORE_INDEX).sum())
        return batch


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """
    Turn off Python's search for reference cycles: tokens make none.

    The many small objects would start it again and again; it walks the libraries' millions and takes half of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def cache_key(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, options: TokenizeOptions, paths: Sequence[str]
) -> str:
    """
    A hash of all that decides a dataset.

    That is the tokenizer, the template, the options, and every byte of the input.
    """
    digest = hashlib.sha256()
    if isinstance(tokenizer, VocabFileTokenizer):
        digest.update(Path(tokenizer.vocab_file).read_bytes())
    else:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(
        json.dumps([SHARDS_VERSION, fingerprint(tokenizer, template), asdict(options), list(paths)]).encode()
    )
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def shards_directory(target: Path, key: str) -> Iterator[Path]:
    """
    Make and lock the directory that collects a dataset's shards.

    It is beside `target`, with `key` in its name.

    It keeps the shards of an earlier run with the same key, and stays if the run fails. Those of other keys are
    removed. `publish_dataset` or `discard_shards` ends it.

    Raises:
        UsageError: another run works there now, or the directory cannot be made.
    """
    directory = target.with_name(f".{target.name}.{key}.parts")
    try:
        (directory / REPORTS_DIRECTORY).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--save_path {target} cannot be written: {error.strerror}") from None
    with open(directory / SHARDS_LOCK_FILE, "w") as lock:
        if not _lock(lock):
            raise UsageError(f"another run is writing --save_path {target} now: wait for it or choose another path")
        for other in target.parent.glob(f".{glob.escape(target.name)}.*.parts"):
            if other != directory and (other / SHARDS_LOCK_FILE).is_file():
                with open(other / SHARDS_LOCK_FILE, "w") as other_lock:
                    if _lock(other_lock):
                        shutil.rmtree(other)
        yield directory


def _lock(file) -> bool:
    """
    Lock a file for this process; False if another holds it.

    The lock ends with the process or with the file; child processes do not hold it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def count_finished(directory: Path) -> int:
    """Number of finished shards in a shards directory."""
    return len(list((directory / REPORTS_DIRECTORY).glob("*.json")))


def publish_dataset(directory: Path, target: Path) -> None:
    """
    Move a complete dataset from its shards directory to `target`.

    The lock and the shards' reports are removed.
    """
    replace_dataset(directory, target)
    (target / SHARDS_LOCK_FILE).unlink()
    shutil.rmtree(target / REPORTS_DIRECTORY)


def discard_shards(directory: Path) -> None:
    """Remove a shards directory from which no dataset can be made."""
    shutil.rmtree(directory)


def make_shards(
    shard_tokenizer: ShardTokenizer, paths: Sequence[str], num_proc: int, meanwhile: Callable[[], None] = lambda: None
) -> Iterator[Shard]:
    """
    Yield the shards of the files in order.

    A shard that an earlier run finished is loaded.

    Args:
        meanwhile: called once if there are worker processes, when they have the last shards and some are idle.

    Raises:
        RunError: a worker process was killed.
    """
    blocks = itertools.chain.from_iterable(read_blocks(path, BLOCK_BYTES) for path in paths)
    batches = enumerate(iter(lambda: list(itertools.islice(blocks, SHARD_BLOCKS)), []))
    first_two = list(itertools.islice(batches, 2))
    batches = itertools.chain(first_two, batches)
    directory = shard_tokenizer.directory
    if num_proc == 1 or len(first_two) < 2:
        for number, batch in batches:
            yield Shard.load(directory, number) or shard_tokenizer(number, batch).save(directory)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each process encodes for itself
    with concurrent.futures.ProcessPoolExecutor(
        num_proc, multiprocessing.get_context("fork"), _start_worker, (shard_tokenizer,)
    ) as pool:
        pending: collections.deque = collections.deque()
        try:
            for number, batch in batches:
                pending.append(Shard.load(directory, number) or pool.submit(_tokenize_shard, number, batch))
                if len(pending) > num_proc + 1:
                    yield _finish(pending.popleft(), directory)
            meanwhile()
            while pending:
                yield _finish(pending.popleft(), directory)
        except BrokenProcessPool:
            raise RunError(
                "a worker process was killed, perhaps because memory ran out: run the command again with a lower "
                "--num_proc; finished shards are kept"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


# Of a worker process, set as it starts: an argument of each task would be pickled each time, with its vocabulary.
_worker_tokenizer: ShardTokenizer | None = None


def _start_worker(shard_tokenizer: ShardTokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = shard_tokenizer
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C


def _tokenize_shard(number: int, blocks: Sequence[Block]) -> Shard:
    return _worker_tokenizer(number, blocks)


def _finish(shard: "Shard | concurrent.futures.Future[Shard]", directory: Path) -> Shard:
    return shard if isinstance(shard, Shard) else shard.result().save(directory)
