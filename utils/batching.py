"""Rows of tokens -> batches of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

from utils.prompts import IGNORE_INDEX

import torch


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
            [-100,    8, -100]])}
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """Each value is (B, T) int64."""
        width = max(len(row["input_ids"]) for row in rows)

        def pad(values: Sequence[int], filler: int) -> list[int]:
            return [*values, *[filler] * (width - len(values))]

        return {
            "input_ids": torch.tensor([pad(row["input_ids"], self.pad_token_id) for row in rows]),
            "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
            "labels": torch.tensor([pad(row["labels"], IGNORE_INDEX) for row in rows]),
        }


def left_pad(sequences: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Prompts padded on the left: `input_ids` and `attention_mask` of 0/1, each (B, T) int64."""
    width = max(map(len, sequences))
    return {
        "input_ids": torch.tensor([[*[pad_token_id] * (width - len(ids)), *ids] for ids in sequences]),
        "attention_mask": torch.tensor([[*[0] * (width - len(ids)), *[1] * len(ids)] for ids in sequences]),
    }
