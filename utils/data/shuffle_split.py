"""
Shuffles lines by a seed in bounded memory, and splits them by a hash of their prompt.

process_belle_1M_data.py calls it. A shuffle in memory would need all rows there; this one needs one of 32 files.
"""

import contextlib
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from utils.common.errors import UsageError

BUCKETS = 32
BUCKET_BYTES = 64 << 20  # largest bucket that is shuffled in memory
SPLITS = ("train", "valid", "test")


def shuffle_lines(lines: Iterable[str], directory: Path, seed: int, bucket_bytes: int = BUCKET_BYTES) -> Iterator[str]:
    """
    Yield the lines in a random order.

    The order is uniform, and the same for the same lines and seed.

    Lines fall at random into BUCKETS files in `directory`, which it makes; each file is shuffled in memory, one after
    another, and one above `bucket_bytes` is distributed over further files first.
    """
    directory.mkdir()
    draw = random.Random(seed)
    with contextlib.ExitStack() as stack:
        paths = [directory / str(i) for i in range(BUCKETS)]
        files = [stack.enter_context(path.open("w", encoding="utf-8", newline="\n")) for path in paths]
        for line in lines:
            draw.choice(files).write(line)
    for path in paths:
        with path.open(encoding="utf-8", newline="\n") as file:
            if path.stat().st_size > bucket_bytes:
                deeper = path.with_name(f"{path.name}_")
                yield from shuffle_lines(file, deeper, draw.getrandbits(32), bucket_bytes)
            else:
                bucket = list(file)
                draw.shuffle(bucket)
                yield from bucket
        path.unlink()


def parse_split(text: str) -> list[float]:
    """
    Parse "0.98,0.01,0.01" into the upper bounds of the splits: [0.98, 0.99, 1.0].

    Raises:
        UsageError: not two or three positive numbers whose sum is 1.
    """
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    if not 2 <= len(shares) <= len(SPLITS) or not all(share > 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise UsageError(f"--split {text}: give two or three positive shares whose sum is 1, such as 0.98,0.01,0.01")
    return [*itertools.accumulate(shares[:-1]), 1.0]


def split_of(prompt_hash: int, bounds: Sequence[float]) -> int:
    """
    Index into SPLITS of a prompt.

    Its 64-bit hash alone decides: it stays there when other rows are added or removed.

    Args:
        bounds: what `parse_split` returns.
    """
    position = prompt_hash / 2**64
    return next((split for split, bound in enumerate(bounds) if position < bound), len(bounds) - 1)


def split_paths(output: str, count: int) -> list[str]:
    """The outputs of `count` splits: data/rows.json -> data/rows.train.json, data/rows.valid.json, ..."""
    path = Path(output)
    stem = path.stem.removesuffix(".train")
    return [str(path.with_name(f"{stem}.{split}{path.suffix}")) for split in SPLITS[:count]]
