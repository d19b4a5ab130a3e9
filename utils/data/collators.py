"""Rows of tokens -> batches of tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from utils.data.packing import PackShape
from utils.models.token_spans import IGNORE_INDEX


def find_targets(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Where in a flattened batch hidden states predict a token that is trained on, and which.

    Args:
        labels: (B, T) int64, IGNORE_INDEX where there is no loss.

    Returns:
        `target_positions` and `target_ids`, each (N,) int64: the label at t is predicted at t - 1.
    """
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    positions = (shifted != IGNORE_INDEX).nonzero().squeeze(1)
    return {"target_positions": positions, "target_ids": shifted[positions]}


@dataclass(frozen=True)
class PaddingCollator:
    """
    Pads the rows of a batch on the right to the longest of them.

    >>> PaddingCollator(pad_token_id=3)([
    ...     {"input_ids": [7, 8, 9], "labels": [-100, 8, 9]},
    ...     {"input_ids": [7, 8], "labels": [-100, 8]},
    ... ])
    {'input_ids': tensor([[7, 8, 9],
            [7, 8, 3]]), 'attention_mask': tensor([[1, 1, 1],
            [1, 1, 0]]), 'labels': tensor([[-100,    8,    9],
            [-100,    8, -100]]), 'target_positions': tensor([0, 1, 3]), 'target_ids': tensor([8, 9, 8]), \
'real_tokens': 5}
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Sequence[int]]]) -> dict[str, torch.Tensor | int]:
        """
        `input_ids`, `attention_mask` and `labels` are (B, T) int64, `real_tokens` counts those that are no padding;
        see `find_targets` for the others.
        """
        width = max(len(row["input_ids"]) for row in rows)

        def pad(values: Sequence[int], filler: int) -> list[int]:
            return [*values, *[filler] * (width - len(values))]

        labels = torch.tensor([pad(row["labels"], IGNORE_INDEX) for row in rows])
        return {
            "input_ids": torch.tensor([pad(row["input_ids"], self.pad_token_id) for row in rows]),
            "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
            "labels": labels,
            **find_targets(labels),
            "real_tokens": sum(len(row["input_ids"]) for row in rows),
        }


@dataclass(frozen=True)
class PackingCollator:
    """
    Lays the rows of packs end to end in one sequence, each with its own positions.

    Args:
        positions_of: (1, T) input_ids of a row -> its position_ids (1, ..., T).
        pad_token_id: what a batch is filled up with, as rows without a target.
        shape: what to fill up to; None leaves batches as they are.

    >>> PackingCollator(lambda ids: torch.arange(ids.shape[1])[None], pad_token_id=3)([
    ...     [{"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}, {"input_ids": [5, 6], "labels": [-100, 6]}],
    ... ])
    {'input_ids': tensor([[7, 8, 9, 5, 6]]), 'position_ids': tensor([[0, 1, 2, 0, 1]]), \
'labels': tensor([[-100,    8,    9, -100,    6]]), 'target_positions': tensor([0, 1, 3]), \
'target_ids': tensor([8, 9, 6]), 'real_tokens': 5, 'cu_seq_lens_q': tensor([0, 3, 5], dtype=torch.int32), \
'cu_seq_lens_k': tensor([0, 3, 5], dtype=torch.int32), 'max_length_q': 3, 'max_length_k': 3}
    """

    positions_of: Callable[[torch.Tensor], torch.Tensor]
    pad_token_id: int
    shape: PackShape | None = None

    def __call__(self, packs: Sequence[Sequence[dict[str, Sequence[int]]]]) -> dict[str, torch.Tensor | int]:
        """
        `input_ids` and `labels` are (1, T) int64 over all rows of all packs, `position_ids` (1, ..., T);
        `cu_seq_lens_*` (rows + 1,) int32 are where rows begin and `max_length_*` the longest, under the names that
        transformers gives them for attention over sequences of unequal length. For ChatGLM-6B, whose positions tell
        the prefix, also `prefix_tokens` and `cu_prefix`, see utils/layers/varlen_attention.py.
        """
        rows = [row for pack in packs for row in pack]
        ids = [torch.tensor([row["input_ids"]]) for row in rows]
        positions = [self.positions_of(row) for row in ids]
        # A row's first label has nothing before it to be predicted from, least of all the row before.
        labels = [label for row in rows for label in (IGNORE_INDEX, *row["labels"][1:])]
        lengths = [len(row["input_ids"]) for row in rows]
        real = sum(lengths)
        if self.shape is not None:
            left = self.shape.tokens - real
            fill = [min(self.shape.longest, left - start) for start in range(0, left, self.shape.longest)]
            lengths += fill + [0] * (self.shape.rows - len(lengths) - len(fill))
            ids.append(torch.full((1, left), self.pad_token_id))
            positions.append(positions[0].new_zeros(*positions[0].shape[:-1], left))
            labels += [IGNORE_INDEX] * left
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        position_ids = torch.cat(positions, dim=-1)
        labels = torch.tensor([labels])
        batch = {
            "input_ids": torch.cat(ids, dim=-1),
            "position_ids": position_ids,
            "labels": labels,
            **find_targets(labels),
            "real_tokens": real,
            **{f"cu_seq_lens_{side}": starts for side in "qk"},
            **{f"max_length_{side}": self.shape.longest if self.shape else max(lengths) for side in "qk"},
        }
        if position_ids.ndim == 3:
            prefixed = (position_ids[0, 1] == 0) & (torch.arange(position_ids.shape[-1]) < real)
            batch["prefix_tokens"] = prefixed.nonzero().squeeze(1)
            batch["cu_prefix"] = torch.nn.functional.pad(prefixed.cumsum(0, dtype=torch.int32), (1, 0))[starts]
        return batch


class RowsByLength(LengthGroupedSampler):
    """
    Rows in a random order in which those of a global batch are of similar length, so that little is padded. The order
    of an epoch depends on lengths, global batch, seed and epoch alone; transformers' own draws it from torch's state,
    which a run that goes on in the middle of an epoch does not have.
    """

    def __init__(self, lengths: list[int], global_batch: int, seed: int):
        super().__init__(global_batch, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


def left_pad(sequences: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Prompts padded on the left: `input_ids` and `attention_mask` of 0/1, each (B, T) int64."""
    width = max(map(len, sequences))
    return {
        "input_ids": torch.tensor([[*[pad_token_id] * (width - len(ids)), *ids] for ids in sequences]),
        "attention_mask": torch.tensor([[*[0] * (width - len(ids)), *[1] * len(ids)] for ids in sequences]),
    }
