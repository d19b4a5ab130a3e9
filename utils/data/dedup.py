"""Rows with a repeated or nearly repeated prompt are dropped, the first of them kept, in bounded memory."""

import hashlib
import itertools
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

SHINGLE = 4  # characters
THRESHOLD = 0.8  # of the shingles of two prompts, the share in common (Jaccard) from which they are near-duplicates
BANDS, BAND_HASHES = 5, 4  # a pair at 0.8 shares a band with probability 0.93, at 0.9 with 0.995, at 0.4 with 0.12
TURN_END = "\x1e"
CHUNK_ROWS = 4096
SORTED_ROWS = 1 << 20  # rows looked at together when repeats are sought
_MARKS = re.compile(r"[\s,.!?;:'\"()\[\]{}，。！？；：、“”‘’（）【】《》…—~`]+")
_NUMBERS = re.compile(r"\d+(?:\.\d+)?|[-+*/×÷=<>%^]")


def hash_text(text: str) -> int:
    """64 bits, the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class Deduplicator:
    """
    Drops lines whose prompt came before: the same text, or with `near` one that shares 80 % of its 4-character
    shingles (case, width, blanks and punctuation aside) and has the same numbers and operators in the same order:
    "3 apples" and "5 apples" are two tasks. Of a chain of near-duplicates the first stays. What stands before the
    last TURN_END, system text and earlier turns, must be the same letter for letter.

    Candidates come from MinHash with banding (Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets,
    chapter 3), and each is compared as text before it is dropped. Everything that grows with the number of rows lies
    in files: the lines, and 65 bytes a row. Texts are equal where 64-bit hashes are.

    Args:
        directory: for those files.
        prompt_of: the prompt of a line; of several turns, those before the last question each with TURN_END behind.
        near: drop near-duplicates too.
    """

    def __init__(self, directory: Path, prompt_of: Callable[[str], str], near: bool):
        self.directory = directory
        self.prompt_of = prompt_of
        self.near = near
        self.exact_dropped = self.near_dropped = 0

    def __call__(self, lines: Iterable[str]) -> Iterator[str]:
        rows = self._store(lines)
        if not rows:
            return
        with open(self.directory / "dropped", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, rows)  # on a full disk an error, not a signal
        dropped = np.memmap(self.directory / "dropped", np.uint8, "r+", shape=(rows,))
        keys = np.memmap(self.directory / "keys", np.uint64, "r", shape=(rows, 1 + (BANDS + 1) * self.near))
        for repeats, _ in repeated(keys[:, 0], dropped):
            dropped[repeats] = 1
            self.exact_dropped += len(repeats)
        if self.near:
            self._drop_near(keys, dropped)
        with open(self.directory / "lines", encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file):
                if not dropped[number]:
                    yield line

    def _store(self, lines: Iterable[str]) -> int:
        """Writes lines, where each starts, and keys (rows, 1 or 2 + BANDS) uint64; returns the number of rows."""
        rows = offset = 0
        lines = iter(lines)
        with (
            open(self.directory / "lines", "wb") as line_file,
            open(self.directory / "starts", "wb") as start_file,
            open(self.directory / "keys", "wb") as key_file,
        ):
            while chunk := list(itertools.islice(lines, CHUNK_ROWS)):
                prompts = [self.prompt_of(line) for line in chunk]
                keys = np.array([[hash_text(prompt)] for prompt in prompts], np.uint64)
                if self.near:
                    keys = np.hstack([keys, near_keys(prompts)])
                key_file.write(keys.tobytes())
                encoded = [line.encode() for line in chunk]
                ends = offset + np.cumsum([len(line) for line in encoded], dtype=np.int64)
                start_file.write(np.concatenate([[offset], ends[:-1]]).astype(np.int64).tobytes())
                line_file.write(b"".join(encoded))
                offset, rows = int(ends[-1]), rows + len(chunk)
        return rows

    def _drop_near(self, keys: np.ndarray, dropped: np.ndarray) -> None:
        starts = np.memmap(self.directory / "starts", np.int64, "r", shape=(len(dropped),))
        with open(self.directory / "lines", "rb") as file:

            def shingles(row: int) -> set[str]:
                file.seek(int(starts[row]))
                return shingle_set(self.prompt_of(file.readline().decode()).rpartition(TURN_END)[2])

            for band in range(BANDS):
                for repeats, firsts in repeated(keys[:, 2 + band], dropped):
                    first, known = -1, set()
                    for i in np.lexsort((repeats, firsts)):
                        row = int(repeats[i])
                        if dropped[row] or keys[row, 1] != keys[firsts[i], 1]:
                            continue
                        if firsts[i] != first:
                            first, known = firsts[i], shingles(int(firsts[i]))
                        if known and jaccard(known, shingles(row)) >= THRESHOLD:
                            dropped[row] = 1
                            self.near_dropped += 1


def repeated(keys: np.ndarray, skip: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """
    Yields (rows whose key an earlier row has, the first row with that key), each (n,) int64, of `keys` (rows,) uint64.
    Rows with `skip` set when their part is read do not count. A part of the keys is held at a time.
    """
    parts = 1 + len(keys) // (2 * SORTED_ROWS)
    for part in range(parts):
        known_keys, known_rows = np.empty(0, np.uint64), np.empty(0, np.int64)
        for start in range(0, len(keys), SORTED_ROWS):
            chunk = np.asarray(keys[start : start + SORTED_ROWS])
            chosen = np.flatnonzero((chunk % np.uint64(parts) == part) & (skip[start : start + SORTED_ROWS] == 0))
            both_keys = np.concatenate([known_keys, chunk[chosen]])
            both_rows = np.concatenate([known_rows, chosen + start])
            order = np.argsort(both_keys, kind="stable")
            both_keys, both_rows = both_keys[order], both_rows[order]
            is_first = np.ones(len(order), bool)
            is_first[1:] = both_keys[1:] != both_keys[:-1]
            firsts = both_rows[is_first][np.cumsum(is_first) - 1]
            yield both_rows[~is_first], firsts[~is_first]
            known_keys, known_rows = both_keys[is_first], both_rows[is_first]


def normalise(text: str) -> str:
    return _MARKS.sub("", unicodedata.normalize("NFKC", text).casefold())


def shingle_set(text: str) -> set[str]:
    text = normalise(text)
    return {text[i : i + SHINGLE] for i in range(max(len(text) - SHINGLE + 1, 1))} if text else set()


def jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / max(len(one | other), 1)


def near_keys(prompts: list[str]) -> np.ndarray:
    """
    (prompts, 1 + BANDS) uint64: a hash of the earlier turns and of the last question's numbers and operators, then one
    key a band; prompts that are near-duplicates have the first and, most likely, one of the others in common.
    """
    parts = [prompt.rpartition(TURN_END) for prompt in prompts]
    texts = [question for _, _, question in parts]
    numbers = [
        hash_text(before + " ".join(_NUMBERS.findall(unicodedata.normalize("NFKC", question))))
        for before, _, question in parts
    ]
    guard = np.array(numbers, np.uint64)
    plain = [normalise(text) for text in texts]
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
        first_shingle = starts - (SHINGLE - 1) * np.arange(len(texts))
        bands = np.empty((len(texts), 1 + BANDS), np.uint64)
        bands[:, 0] = guard
        for band in range(BANDS):
            key = guard.copy()
            for i in range(BAND_HASHES):
                mixed = hashed * odd[SHINGLE + band * BAND_HASHES + i]
                key = (key ^ np.minimum.reduceat(mixed ^ (mixed >> np.uint64(32)), first_shingle)) * odd[0]
            bands[:, 1 + band] = key ^ (key >> np.uint64(32))
    return bands
