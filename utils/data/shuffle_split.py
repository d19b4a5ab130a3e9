"""Lines in another order, or on several sides: a seeded shuffle in bounded memory, and a split by hash."""

import contextlib
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from utils.common.errors import UsageError
from utils.data.dedup import hash_text

BUCKETS = 32
BUCKET_BYTES = 64 << 20  # what is shuffled in memory
SIDES = ("train", "valid", "test")


def shuffle_lines(lines: Iterable[str], directory: Path, seed: int) -> Iterator[str]:
    """
    A uniformly random order of the lines, the same for the same lines and seed. Lines fall at random into files in
    `directory`, which are shuffled in memory one by one; a file too large for that is spread over further files.
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
            if path.stat().st_size > BUCKET_BYTES:
                yield from shuffle_lines(file, path.with_name(f"{path.name}_"), draw.getrandbits(32))
            else:
                bucket = list(file)
                draw.shuffle(bucket)
                yield from bucket
        path.unlink()


def parse_split(text: str) -> list[float]:
    """
    "0.98,0.01,0.01" as the ends of each side's share: [0.98, 0.99, 1.0].

    Raises:
        UsageError: not two or three positive numbers whose sum is 1.
    """
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    if not 2 <= len(shares) <= len(SIDES) or not all(share > 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise UsageError(f"--split {text}: two or three positive shares whose sum is 1, such as 0.98,0.01,0.01")
    return [*itertools.accumulate(shares[:-1]), 1.0]


def side_of(prompt: str, ends: Sequence[float]) -> int:
    """Which side a prompt is on: by its hash alone, so that it stays there when other rows come or go."""
    place = hash_text(prompt) / 2**64
    return next((side for side, end in enumerate(ends) if place < end), len(ends) - 1)


def side_paths(output: str, ends: Sequence[float]) -> list[str]:
    """data/rows.json -> data/rows.train.json, data/rows.valid.json, ..."""
    path = Path(output)
    stem = path.stem.removesuffix(".train")
    return [str(path.with_name(f"{stem}.{side}{path.suffix}")) for side in SIDES[: len(ends)]]
