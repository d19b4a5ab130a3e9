"""Rows laid end to end into sequences of a fixed number of tokens, no row split."""

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import torch

from utils.common.processes import print_once
from utils.data.arrow_reader import row_lengths

WINDOW = 16384  # rows packed together: enough for a fill of 99 % and more, few enough to mix long and short rows


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """
    Packs of indices into `lengths`, none above `capacity` tokens: each row, the longest first, goes where it leaves
    the least room.

    >>> best_fit([6, 3, 5, 4], capacity=10)
    [[0, 3], [2, 1]]
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(room, (lengths[index], -1))
        if place == len(room):
            left, pack = capacity, len(packs)
            packs.append([])
        else:
            left, pack = room.pop(place)
        packs[pack].append(index)
        bisect.insort(room, (left - lengths[index], pack))
    return packs


def pack_rows(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """The packs of a whole dataset, the same for the same lengths, capacity and seed."""
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    packs = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        packs += [[window[i] for i in pack] for pack in best_fit([lengths[i] for i in window], capacity)]
    return packs


@dataclass(frozen=True)
class PackedRows(torch.utils.data.Dataset):
    """A dataset whose items are packs: lists of the rows of `rows`."""

    rows: datasets.Dataset
    packs: list[list[int]]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[dict[str, list[int]]]:
        batch = self.rows[self.packs[index]]
        return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


@dataclass(frozen=True)
class PackShape:
    """What every packed batch is filled up to, for layers that are compiled for one shape."""

    tokens: int
    rows: int  # filling ones included
    longest: int  # tokens of a row


def pack_shape(
    lengths: Sequence[int], packs: Sequence[Sequence[int]], pack_tokens: int, packs_a_batch: int
) -> PackShape:
    """The shape that holds any batch of so many packs, or of fewer, filled up with rows no longer than the longest."""
    longest = max(lengths)
    rows = max(len(pack) + -(-(pack_tokens - sum(lengths[i] for i in pack)) // longest) for pack in packs)
    return PackShape(pack_tokens * packs_a_batch, rows * packs_a_batch, longest)


def pack_dataset(
    dataset: datasets.Dataset, pack_tokens: int, seed: int, packs_a_batch: int
) -> tuple[PackedRows, PackShape]:
    """The dataset, none of whose rows is longer than a pack, in packs, and the shape that holds any batch of them."""
    lengths = row_lengths(dataset)
    packs = pack_rows(lengths, pack_tokens, seed)
    filled = sum(lengths) / (len(packs) * pack_tokens)
    print_once(f"{len(lengths)} rows in {len(packs)} packs of at most {pack_tokens} tokens, {filled:.1%} filled")
    return PackedRows(dataset, packs), pack_shape(lengths, packs, pack_tokens, packs_a_batch)
