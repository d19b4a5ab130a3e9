"""
Hashes of whole files.

Answers record the hash of their model and adapters, so that weights that were changed in place count as other weights.
Only a hash of every byte shows that: a file's size and time can stay the same, and its ends or samples say nothing
about its middle. Reading costs little, because the model that is loaded next reads the same pages from memory.
"""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHUNK_BYTES = 64 << 20  # hashed by one thread at a time; recorded hashes depend on it
HASH_THREADS = 16  # SHA-256 reaches about 1 GB/s on a core


def hash_files(files: Iterable[Path]) -> str:
    """
    Return a hash of the names and the contents of `files`, 32 hexadecimal digits.

    A hash over the SHA-256 of each chunk of `CHUNK_BYTES`, in the order of the file names.

    Raises:
        OSError: a file cannot be read.
    """
    chunks = [
        (file, start)
        for file in sorted(files, key=lambda file: file.name)
        for start in range(0, max(file.stat().st_size, 1), CHUNK_BYTES)
    ]
    total = hashlib.sha256()
    with ThreadPoolExecutor(min(HASH_THREADS, os.cpu_count() or 1)) as threads:
        for (file, start), digest in zip(chunks, threads.map(_hash_chunk, chunks), strict=True):
            total.update(f"{file.name}\0{start}\0".encode() + digest)
    return total.hexdigest()[:32]


def _hash_chunk(chunk: tuple[Path, int]) -> bytes:
    file, start = chunk
    digest, remaining = hashlib.sha256(), CHUNK_BYTES
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        while remaining and (data := stream.read(min(remaining, 1 << 20))):
            digest.update(data)
            remaining -= len(data)
    return digest.digest()
