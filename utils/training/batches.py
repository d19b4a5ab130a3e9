"""
Makes what a run draws its batches from: rows that are padded, or rows packed into sequences of --pack_tokens.

In: a `RunConfig`. Out: `Batches`, items and collators for training and evaluation. trainer.py calls it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from utils.data.collators import PackingCollator, PaddingCollator
from utils.data.packing import pack_dataset
from utils.training.run_config import RunConfig


@dataclass(frozen=True)
class Batches:
    """What batches are drawn from, and the collators that make them."""

    items: Sequence  # rows, or packs of rows
    collator: Callable[[Sequence], dict[str, Any]]
    eval_items: Sequence | None
    eval_collator: Callable[[Sequence], dict[str, Any]]


def make_batches(config: RunConfig) -> Batches:
    """Return the rows padded in batches, or packed into sequences of --pack_tokens."""
    inputs, flags, args = config.inputs, config.flags, config.training_args
    pad_token_id = inputs.tokenizer.pad_token_id
    if not flags.packing:
        collator = PaddingCollator(pad_token_id)
        return Batches(inputs.dataset, collator, inputs.eval_dataset, collator)
    packs, shape = pack_dataset(inputs.dataset, flags.pack_tokens, args.seed, args.per_device_train_batch_size)
    static_shape = shape if flags.compile_layers else None  # compiled blocks see one shape
    collator = PackingCollator(inputs.checkpoint.row_positions, pad_token_id, static_shape)
    if not inputs.eval_dataset:
        return Batches(packs, collator, inputs.eval_dataset, collator)
    eval_packs, shape = pack_dataset(
        inputs.eval_dataset, flags.pack_tokens, args.seed, args.per_device_eval_batch_size
    )
    return Batches(packs, collator, eval_packs, replace(collator, shape=shape if flags.compile_layers else None))
