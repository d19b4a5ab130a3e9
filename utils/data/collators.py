"""
Collates rows of token ids into batches of tensors, padded or packed.

Trainer calls the collators (multi_gpu_fintune_belle.py, utils/training/trainer.py); inference pads prompts with
`left_pad`. Shapes: B batch, T tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from utils.data.packing import PackShape
from utils.models.token_spans import IGNORE_INDEX


def find_targets(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Positions that predict a trained token, and those tokens.

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
    Pads the rows of a batch on the right to the longest one.

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
        Collate rows of `input_ids` and `labels`.

        Returns:
            `input_ids`, `attention_mask` and `labels`, each (B, T) int64; `real_tokens`, the number of tokens that are
            not padding; and those of `find_targets`.
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
    Concatenates the rows of packs into one sequence, each row with its own positions.

    Args:
        positions_of: (1, T) input_ids of a row -> its position_ids (1, ..., T).
        pad_token_id: token of the padding, which is rows without a target.
        shape: pad every batch to this shape, so that layers are compiled once; None pads nothing.

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
        Collate packs of rows of `input_ids` and `labels`.

        Returns:
            `input_ids` and `labels`, (1, T) int64 over all rows of all packs; `position_ids`, (1, ..., T);
            `cu_seq_lens_*`, (rows + 1,) int32, the positions at which rows begin, and `max_length_*`, the longest row,
            under transformers' names for attention over sequences of unequal length; `real_tokens` without padding;
            those of `find_targets`; and for ChatGLM-6B, whose positions tell the prefix, `prefix_tokens` and
            `cu_prefix`, see utils/layers/varlen_attention.py.
        """
        rows = [row for pack in packs for row in pack]
        ids = [torch.tensor([row["input_ids"]]) for row in rows]
        positions = [self.positions_of(row) for row in ids]
        # Nothing predicts a row's first token, least of all the row before.
        labels = [label for row in rows for label in (IGNORE_INDEX, *row["labels"][1:])]
        lengths = [len(row["input_ids"]) for row in rows]
        real = sum(lengths)
        if self.shape is not None:
            padding, longest = self.shape.tokens - real, self.shape.longest
            padding_rows = [min(longest, padding - start) for start in range(0, padding, longest)]
            lengths += padding_rows + [0] * (self.shape.rows - len(lengths) - len(padding_rows))
            ids.append(torch.full((1, padding), self.pad_token_id))
            positions.append(positions[0].new_zeros(*positions[0].shape[:-1], padding))
            labels += [IGNORE_INDEX] * padding
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        position_ids = torch.cat(positions, dim=-1)
        labels = torch.tensor([labels])
        batch = {
            "input_ids": torch.cat(ids, dim=-1),
            "position_ids": position_ids,
            "labels": labels,
            **find_targets(labels),
            "real_tokens": real,
            **{f"cu_seq_lens_{name}": starts for name in "qk"},
            **{f"max_length_{name}": self.shape.longest if self.shape else max(lengths) for name in "qk"},
        }
        if position_ids.ndim == 3:
            prefixed = (position_ids[0, 1] == 0) & (torch.arange(position_ids.shape[-1]) < real)
            batch["prefix_tokens"] = prefixed.nonzero().squeeze(1)
            batch["cu_prefix"] = torch.nn.functional.pad(prefixed.cumsum(0, dtype=torch.int32), (1, 0))[starts]
        return batch


class RowsByLength(LengthGroupedSampler):
    """
    Samples rows of similar lengths for each global batch.

    The order is random otherwise, and padding is small.

    The order of an epoch depends only on lengths, global batch, seed and epoch. transformers' own sampler draws it
    from torch's global state, which a run that resumes in the middle of an epoch does not have.
    """

    def __init__(self, lengths: list[int], global_batch: int, seed: int):
        super().__init__(global_batch, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch whose order `__iter__` yields."""
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


def left_pad(sequences: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad prompts on the left: `input_ids` and `attention_mask` of 0/1, each (B, T) int64."""
    width = max(map(len, sequences))
    return {
        "input_ids": torch.tensor([[*[pad_token_id] * (width - len(ids)), *ids] for ids in sequences]),
        "attention_mask": torch.tensor([[*[0] * (width - len(ids)), *[1] * len(ids)] for ids in sequences]),
    }
