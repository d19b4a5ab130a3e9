"""
Hashes of whole files: what answers records of a model and its adapters, so that one changed in place is another.

Nothing less than every byte will do: a file's size and time can stay what they were, and ends or samples of a weight
say nothing of its middle. Reading costs little, for a model that is loaded next is read from the same pages of memory.
"""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PIECE = 64 << 20  # bytes that one thread hashes at a time; a file's hash is that of its pieces' hashes
THREADS = 16  # SHA-256 makes about 1 GB/s on a core


def hash_files(files: Iterable[Path]) -> str:
    """
    A hash of the names and the content of `files`, 32 hexadecimal digits.

    Raises:
        OSError: one cannot be read.
    """
    pieces = [
        (file, start)
        for file in sorted(files, key=lambda file: file.name)
        for start in range(0, max(file.stat().st_size, 1), PIECE)
    ]
    total = hashlib.sha256()
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
        for (file, start), digest in zip(pieces, threads.map(_hash_piece, pieces), strict=True):
            total.update(f"{file.name}\0{start}\0".encode() + digest)
    return total.hexdigest()[:32]


def _hash_piece(piece: tuple[Path, int]) -> bytes:
    file, start = piece
    digest, left = hashlib.sha256(), PIECE
    with file.open("rb", buffering=0) as opened:
        opened.seek(start)
        while left and (data := opened.read(min(left, 1 << 20))):
            digest.update(data)
            left -= len(data)
    return digest.digest()
