"""
Drops rows with a repeated or nearly repeated prompt and keeps the first of them, in bounded memory.

process_belle_1M_data.py puts in (line, prompt) pairs and gets back the lines that stay. datasketch's MinHashLSH would
hold its index in memory or in a database server; here 65 bytes a row lie in files beside the output.
"""

import hashlib
import itertools
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

SHINGLE = 4  # characters
NEAR_JACCARD = 0.8  # share of common shingles from which two prompts are near-duplicates
BANDS, BAND_HASHES = 5, 4  # a pair at 0.8 shares a band with probability 0.93, at 0.9 with 0.995, at 0.4 with 0.12
TURN_END = "\x1e"  # ASCII's record separator, which no text of a turn needs
CHUNK_ROWS = 4096  # rows hashed and written together: enough for numpy to pay off
SORT_ROWS = 1 << 20  # keys sorted together: 16 MiB with their row numbers
_PUNCTUATION = re.compile(r"[\s,.!?;:'\"()\[\]{}，。！？；：、“”‘’（）【】《》…—~`]+")
_NUMBERS = re.compile(r"\d+(?:\.\d+)?|[-+*/×÷=<>%^]")


def hash_text(text: str) -> int:
    """64-bit hash of a text, the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class Deduplicator:
    """
    Drops lines whose prompt came before.

    A prompt is a repeat if its text is the same; with `near` also if it shares 80 % of its 4-character shingles (case,
    width, blanks and punctuation ignored) with an earlier one and has the same numbers and operators in the same
    order: "3 apples" and "5 apples" are two tasks. Of a chain of near-duplicates the first stays. The text before the
    last TURN_END (system text and earlier turns) must be equal letter for letter.

    Candidates come from MinHash with banding (Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets,
    chapter 3), and each is compared as text before it is dropped. Everything that grows with the number of rows lies
    in files: the lines, with `near` the last questions too, and at most 65 bytes a row. Texts count as equal if their
    64-bit hashes are.

    Args:
        directory: for those files.
        near: drop near-duplicates too.
        chunk_rows: rows hashed and written together.
    """

    def __init__(self, directory: Path, near: bool, chunk_rows: int = CHUNK_ROWS):
        self.directory = directory
        self.near = near
        self.chunk_rows = chunk_rows
        self.exact_dropped = self.near_dropped = 0

    def __call__(self, rows: Iterable[tuple[str, str]]) -> Iterator[tuple[str, int]]:
        """
        Yield the lines that stay, in order, once all rows are read.

        Args:
            rows: (line, prompt) pairs; the line ends with "\\n" and has no other. In a prompt of several turns each
                turn but the last ends with TURN_END.

        Returns:
            (line, `hash_text` of its prompt) pairs.
        """
        count = self._store(rows)
        if not count:
            return
        with open(self.directory / "dropped", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, count)  # on a full disk an error, not a signal
        dropped = np.memmap(self.directory / "dropped", np.uint8, "r+", shape=(count,))
        keys = np.memmap(self.directory / "keys", np.uint64, "r", shape=(count, 1 + (BANDS + 1) * self.near))
        for repeats, _ in find_repeats(keys[:, 0], dropped):
            dropped[repeats] = 1
            self.exact_dropped += len(repeats)
        if self.near:
            self._drop_near(keys, dropped)
        with open(self.directory / "lines", encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file):
                if not dropped[number]:
                    yield line, int(keys[number, 0])

    def _store(self, rows: Iterable[tuple[str, str]]) -> int:
        """
        Write lines, keys and last questions; return the number of rows.

        Keys are (rows, 1 or 2 + BANDS) uint64.
        """
        count, rows = 0, iter(rows)
        with (
            open(self.directory / "lines", "w", encoding="utf-8", newline="\n") as line_file,
            open(self.directory / "keys", "wb") as key_file,
            open(self.directory / "questions", "wb") as question_file,
            open(self.directory / "question_ends", "wb") as end_file,
        ):
            question_end = 0
            while chunk := list(itertools.islice(rows, self.chunk_rows)):
                prompts = [prompt for _, prompt in chunk]
                keys = np.array([[hash_text(prompt)] for prompt in prompts], np.uint64)
                if self.near:
                    keys = np.hstack([keys, near_keys(prompts)])
                    questions = [last_question(prompt).encode() for prompt in prompts]
                    ends = question_end + np.cumsum([len(question) for question in questions], dtype=np.int64)
                    question_file.write(b"".join(questions))
                    end_file.write(ends.tobytes())
                    question_end = int(ends[-1])
                key_file.write(keys.tobytes())
                line_file.write("".join(line for line, _ in chunk))
                count += len(chunk)
        return count

    def _drop_near(self, keys: np.ndarray, dropped: np.ndarray) -> None:
        """Set `dropped`, (rows,) uint8, for near-duplicates of an earlier row."""
        ends = np.memmap(self.directory / "question_ends", np.int64, "r", shape=(len(dropped),))
        with open(self.directory / "questions", "rb") as file:

            def shingles(row: int) -> set[str]:
                start = int(ends[row - 1]) if row else 0
                file.seek(start)
                return shingle_set(file.read(int(ends[row]) - start).decode())

            for band in range(BANDS):
                for repeats, firsts in find_repeats(keys[:, 2 + band], dropped):
                    first, first_shingles = -1, set()
                    for i in np.lexsort((repeats, firsts)):
                        row = int(repeats[i])
                        if dropped[row] or keys[row, 1] != keys[firsts[i], 1]:
                            continue
                        if firsts[i] != first:
                            first, first_shingles = firsts[i], shingles(int(firsts[i]))
                        if first_shingles and jaccard(first_shingles, shingles(row)) >= NEAR_JACCARD:
                            dropped[row] = 1
                            self.near_dropped += 1


def find_repeats(
    keys: np.ndarray, skip: np.ndarray, sort_rows: int = SORT_ROWS
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """
    Yield (repeated rows, first row with the same key), each (n,) int64.

    Keys are divided into partitions by their remainder; one partition's distinct keys are in memory at a time.

    Args:
        keys: (rows,) uint64.
        skip: (rows,) uint8, 1 for rows that do not count; read when the row's partition is.
        sort_rows: keys sorted together.
    """
    partitions = 1 + len(keys) // (2 * sort_rows)
    for partition in range(partitions):
        known_keys, known_rows = np.empty(0, np.uint64), np.empty(0, np.int64)
        for start in range(0, len(keys), sort_rows):
            chunk = np.asarray(keys[start : start + sort_rows])
            is_used = (chunk % np.uint64(partitions) == partition) & (skip[start : start + sort_rows] == 0)
            used = np.flatnonzero(is_used)
            both_keys = np.concatenate([known_keys, chunk[used]])
            both_rows = np.concatenate([known_rows, used + start])
            order = np.argsort(both_keys, kind="stable")
            both_keys, both_rows = both_keys[order], both_rows[order]
            is_first = np.ones(len(order), bool)
            is_first[1:] = both_keys[1:] != both_keys[:-1]
            firsts = both_rows[is_first][np.cumsum(is_first) - 1]
            yield both_rows[~is_first], firsts[~is_first]
            known_keys, known_rows = both_keys[is_first], both_rows[is_first]


def last_question(prompt: str) -> str:
    """The text after the last TURN_END."""
    return prompt.rpartition(TURN_END)[2]


def normalise(text: str) -> str:
    """The text in one case and width, without blanks and punctuation."""
    return _PUNCTUATION.sub("", unicodedata.normalize("NFKC", text).casefold())


def shingle_set(text: str) -> set[str]:
    """Every run of SHINGLE characters of the normalised text."""
    text = normalise(text)
    return {text[i : i + SHINGLE] for i in range(max(len(text) - SHINGLE + 1, 1))} if text else set()


def jaccard(one: set[str], other: set[str]) -> float:
    """Size of the intersection over size of the union."""
    return len(one & other) / max(len(one | other), 1)


def near_keys(prompts: list[str]) -> np.ndarray:
    """
    Keys that near-duplicates share: the first and most likely one of the others.

    Returns:
        (prompts, 1 + BANDS) uint64: a hash of the earlier turns and of the last question's numbers and operators, then
        one MinHash key a band.
    """
    turns = [prompt.rpartition(TURN_END) for prompt in prompts]
    questions = [question for _, _, question in turns]
    guard = np.array(
        [
            hash_text(before + " ".join(_NUMBERS.findall(unicodedata.normalize("NFKC", question))))
            for before, _, question in turns
        ],
        np.uint64,
    )
    plain = [normalise(question) for question in questions]
    lengths = np.array([max(len(text), SHINGLE) for text in plain])
    letters = "".join(text.ljust(SHINGLE, "\0") for text in plain).encode("utf-32-le", "surrogatepass")
    codes = np.frombuffer(letters, np.uint32).astype(np.uint64)
    random = np.random.default_rng(0)  # the same hash functions in every run
    odd = random.integers(0, 1 << 63, SHINGLE + BANDS * BAND_HASHES, np.uint64) * 2 + 1
    with np.errstate(over="ignore"):
        hashed = np.zeros(len(codes) - SHINGLE + 1, np.uint64)
        for i in range(SHINGLE):
            hashed += codes[i : len(codes) - SHINGLE + 1 + i] * odd[i]
        hashed ^= hashed >> np.uint64(29)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        within = np.ones(len(codes), bool)  # whether a shingle that starts here stays in its text
        for i in range(1, SHINGLE):
            within[ends - i] = False
        hashed = hashed[within[: len(hashed)]]
        first_shingle = starts - (SHINGLE - 1) * np.arange(len(questions))
        keys = np.empty((len(questions), 1 + BANDS), np.uint64)
        keys[:, 0] = guard
        for band in range(BANDS):
            key = guard.copy()
            for i in range(BAND_HASHES):
                mixed = hashed * odd[SHINGLE + band * BAND_HASHES + i]
                key = (key ^ np.minimum.reduceat(mixed ^ (mixed >> np.uint64(32)), first_shingle)) * odd[0]
            keys[:, 1 + band] = key ^ (key >> np.uint64(32))
    return keys
