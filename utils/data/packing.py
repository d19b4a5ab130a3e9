"""
Packs rows into sequences of a fixed number of tokens, no row split.

multi_gpu_fintune_belle.py calls `pack_dataset` for --packing; utils/data/collators.py makes tensors of the packs.
Packs are made once, from lengths and seed, so a pack is an item like any other, and resuming is Trainer's own. trl's
`pack_dataset` would save twenty lines, but needs all of trl.
"""

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import torch

from utils.common.numbers import ceil_div
from utils.data.arrow_reader import row_lengths

WINDOW_ROWS = 16384  # packed together: enough to fill 99 % and more, few enough to mix long and short rows


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """
    Packs of indices into `lengths`, each of at most `capacity` tokens, by best-fit decreasing.

    Each row, the longest first, goes into the pack in which it leaves the least room.

    >>> best_fit([6, 3, 5, 4], capacity=10)
    [[0, 3], [2, 1]]
    """
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(rooms, (lengths[index], -1))
        if place == len(rooms):
            room, pack = capacity, len(packs)
            packs.append([])
        else:
            room, pack = rooms.pop(place)
        packs[pack].append(index)
        bisect.insort(rooms, (room - lengths[index], pack))
    return packs


def pack_rows(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Packs of a whole dataset, decided by lengths, capacity and seed."""
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    packs = []
    for start in range(0, len(order), WINDOW_ROWS):
        window = order[start : start + WINDOW_ROWS]
        packs += [[window[i] for i in pack] for pack in best_fit([lengths[i] for i in window], capacity)]
    return packs


@dataclass(frozen=True)
class PackedRows(torch.utils.data.Dataset):
    """A dataset whose items are packs, lists of rows; `packs` holds indices into `rows`."""

    rows: datasets.Dataset
    packs: list[list[int]]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[dict[str, list[int]]]:
        batch = self.rows[self.packs[index]]
        return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


@dataclass(frozen=True)
class PackShape:
    """The shape to which every packed batch is padded, for layers that are compiled once."""

    tokens: int
    rows: int  # padding rows included
    longest: int  # tokens of a row


def pack_shape(
    lengths: Sequence[int], packs: Sequence[Sequence[int]], pack_tokens: int, packs_per_batch: int
) -> PackShape:
    """
    The shape that any batch of up to `packs_per_batch` packs fits.

    Padding rows are no longer than the longest row.
    """
    longest = max(lengths)
    rows = max(len(pack) + ceil_div(pack_tokens - sum(lengths[i] for i in pack), longest) for pack in packs)
    return PackShape(pack_tokens * packs_per_batch, rows * packs_per_batch, longest)


def pack_dataset(
    dataset: datasets.Dataset, pack_tokens: int, seed: int, packs_per_batch: int
) -> tuple[PackedRows, PackShape]:
    """
    Pack a dataset.

    Args:
        dataset: with rows of at most `pack_tokens` tokens.

    Returns:
        The packs, and the shape of any batch of `packs_per_batch` of them.
    """
    lengths = row_lengths(dataset)
    packs = pack_rows(lengths, pack_tokens, seed)
    return PackedRows(dataset, packs), pack_shape(lengths, packs, pack_tokens, packs_per_batch)
