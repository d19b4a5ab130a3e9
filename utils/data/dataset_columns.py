"""
Columns of a tokenised dataset, of this toolkit or another -> `input_ids` and `labels`, checked row by row.

utils/data/arrow_reader.py calls it with a table whose memory is safe to read (utils/data/arrow_table.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from utils.common.errors import UsageError
from utils.models.token_spans import IGNORE_INDEX

LOSS_MASKS = ("loss_mask", "completion_mask", "assistant_masks")  # 1 where there is a loss; two of the names are TRL's
LISTS = ("input_ids", "labels", "attention_mask", *LOSS_MASKS, "position_ids")
# Columns that mean another training, and the one value at which they mean the same; None: there is none.
UNUSED: Mapping[str, int | None] = {
    "token_type_ids": 0,
    **dict.fromkeys(("weight", "weights", "sample_weight", "loss_weight", "loss_weights"), 1),
    **dict.fromkeys(("segment_ids", "document_ids", "sequence_ids", "seq_lengths", "cu_seqlens", "seq_idx")),
    **dict.fromkeys(("pixel_values", "images", "inputs_embeds", "decoder_input_ids")),
}
COLUMNS = frozenset((*LISTS, "seq_len", *UNUSED))
ROWS_AT_ONCE = 16384  # of so many the tokens are counted in 32 bits, as rows are


@dataclass(frozen=True)
class Vocabulary:
    """What ids may be: below `size`; and `pad_token_id`, which rows do not begin with."""

    size: int
    pad_token_id: int


@dataclass(frozen=True)
class Lists:
    """A column of lists: the `values` of all rows, (T,), and the `offsets` at which rows begin, (rows + 1,) from 0."""

    values: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def places(self) -> np.ndarray:
        """(T,) int64: the place of each value in its row, from 0."""
        return np.arange(len(self.values)) - np.repeat(self.offsets[:-1], self.lengths)

    def first_row(self, wrong: np.ndarray) -> tuple[int, int] | None:
        """The first place where `wrong`, (T,) bool, is set: its row and the value there."""
        if not wrong.any():
            return None
        place = int(wrong.argmax())
        return int(np.searchsorted(self.offsets, place, side="right")) - 1, self.values[place].item()

    def select(self, kept: np.ndarray) -> "Lists":
        """Only the values where `kept`, (T,) bool, is set."""
        return Lists(self.values[kept], np.concatenate([[0], np.cumsum(kept)])[self.offsets])

    def to_arrow(self) -> pa.ListArray:
        """Without a copy of the values, unless they are unsigned."""
        values = self.values.astype(np.int32) if self.values.dtype.kind == "u" else self.values
        return pa.ListArray.from_arrays(pa.array(self.offsets, pa.int32()), pa.array(values))


class _RowFault(Exception):
    """Arguments: the number of a row in its batch, and what is wrong with it."""


def to_examples(table: pa.Table, vocabulary: Vocabulary | None) -> pa.Table:
    """
    The columns `input_ids` and `labels`: lists of signed integers, of one length in each row.

    A token whose `attention_mask` is 0 is left out, so that a row trains as if it had never been padded. A token whose
    loss mask (`LOSS_MASKS`) is 0, and the first `seq_len` where there are no labels, have no loss. Without `labels`
    these decide alone. Columns that need none of this stay in their file's memory.

    Args:
        table: with `input_ids` and at least one of `labels`, `seq_len` and `LOSS_MASKS`.
        vocabulary: None where the model is not known; ids are then only checked for being numbers.

    Raises:
        UsageError: a column of another type, or values that cannot be, or that mean another training. The message
            names the column and, where it is one row's fault, the row, counted from 0.
    """
    for name in table.column_names:
        _check_type(name, table[name])
    batches = list(_read_batches(table, vocabulary))
    return pa.Table.from_batches(batches) if batches else table.select(["input_ids", "labels"])


def _check_type(name: str, column: pa.ChunkedArray) -> None:
    """
    Raises:
        UsageError: see `to_examples`.
    """
    types, values = pa.types, column.type
    is_list = types.is_list(values) or types.is_large_list(values) or types.is_fixed_size_list(values)
    if is_list:
        values = values.value_type
    is_mask = name == "attention_mask" or name in LOSS_MASKS
    if name == "position_ids" and not (is_list and types.is_integer(values)):
        raise UsageError(_unused(name))
    if name in UNUSED:
        numbers = pa.compute.list_flatten(column) if is_list else column
        is_number = types.is_integer(values) or types.is_floating(values)
        if UNUSED[name] is None or not is_number or column.null_count or numbers.null_count:
            raise UsageError(_unused(name))
        if set(pa.compute.min_max(numbers).as_py().values()) - {UNUSED[name], None}:
            raise UsageError(f"{_unused(name)} (where it is {UNUSED[name]} everywhere it may stay)")
    elif is_list == (name == "seq_len") or not (types.is_integer(values) or is_mask and types.is_boolean(values)):
        wanted = "integers" if name == "seq_len" else "lists of integers"
        raise UsageError(
            f"column {name} holds {column.type}, not {wanted}: tokenise the rows again, or save it as such (datasets: "
            "cast_column)"
        )


def _unused(name: str) -> str:
    return (
        f"column {name} is not used, and the rows mean another training with it: remove it (datasets: remove_columns)"
    )


def _read_batches(table: pa.Table, vocabulary: Vocabulary | None) -> Iterator[pa.RecordBatch]:
    first = 0
    for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE):
        try:
            ids, labels = _read_batch(batch, vocabulary)
        except _RowFault as error:
            row, fault = error.args
            raise UsageError(f"row {first + row}: {fault}") from None
        yield pa.RecordBatch.from_arrays([ids.to_arrow(), labels.to_arrow()], ["input_ids", "labels"])
        first += len(batch)


def _read_batch(batch: pa.RecordBatch, vocabulary: Vocabulary | None) -> tuple[Lists, Lists]:
    """`input_ids` and `labels` of the rows of a batch; see `to_examples`."""
    columns = {name: _read_lists(name, batch.column(name)) for name in LISTS if name in batch.schema.names}
    ids = columns["input_ids"]
    for name, column in columns.items():
        if len(differing := np.flatnonzero(column.lengths != ids.lengths)):
            row = int(differing[0])
            raise _RowFault(
                row,
                f"{name} has {column.lengths[row]} values and input_ids has {ids.lengths[row]}: give one for each "
                "token" + (", -100 where there is no loss" if name == "labels" else ""),
            )
    masks = {name: _read_mask(name, columns[name]) for name in columns if name in ("attention_mask", *LOSS_MASKS)}
    silent = [~masks[name] for name in LOSS_MASKS if name in masks]
    # Source: mymusise/ChatGLM-Tuning, tokenize_dataset_rows.py and the collator in finetune.py. That collator labels
    # one token more, `<sop>` after `[gMASK]`, which every prompt brings along and no answer needs.
    if "labels" not in columns and "seq_len" in batch.schema.names:
        silent.append(ids.places() < np.repeat(_read_prompt_lengths(batch.column("seq_len"), ids), ids.lengths))
    labels = columns.get("labels", ids)
    if silent:
        values = np.where(np.logical_or.reduce(silent), np.int32(IGNORE_INDEX), labels.values)
        labels = Lists(values, labels.offsets)
    kept = masks.get("attention_mask")
    positions = columns.get("position_ids")
    if kept is not None and not kept.all():
        ids, labels = ids.select(kept), labels.select(kept)
        positions = positions and positions.select(kept)
    if positions and (wrong := positions.first_row(positions.values != positions.places())):
        raise _RowFault(wrong[0], f"{_unused('position_ids')} (where it counts from 0 in every row it may stay)")
    _check_values(ids, labels, vocabulary)
    return ids, labels


def _read_lists(name: str, array: pa.Array) -> Lists:
    """
    Raises:
        _RowFault: a row or a value is null.
    """
    if array.null_count:
        raise _RowFault(int(np.argmax(array.is_null())), f"{name} is null: leave the row out, or tokenise it again")
    if pa.types.is_fixed_size_list(array.type):
        offsets = np.arange(len(array) + 1) * array.type.list_size
    else:
        offsets = array.offsets.to_numpy().astype(np.int64)
        offsets -= offsets[0]
    values = array.flatten()
    if values.null_count:
        row, _ = Lists(np.ones(len(values)), offsets).first_row(np.array(values.is_null()))
        raise _RowFault(
            row, f"{name} holds a null, where {'-100 or a token' if name == 'labels' else 'a number'} is due"
        )
    return Lists(values.to_numpy(zero_copy_only=False), offsets)


def _read_mask(name: str, column: Lists) -> np.ndarray:
    """
    (T,) bool.

    Raises:
        _RowFault: a value is neither 0 nor 1.
    """
    mask = column.values.astype(bool)
    if wrong := column.first_row(column.values != mask):
        raise _RowFault(wrong[0], f"{name} holds {wrong[1]}, which is neither 0 nor 1")
    return mask


def _read_prompt_lengths(array: pa.Array, ids: Lists) -> np.ndarray:
    """
    (rows,) how many tokens of each row are its prompt's.

    Raises:
        _RowFault: there are fewer, or none is said.
    """
    if array.null_count:
        raise _RowFault(int(np.argmax(array.is_null())), "seq_len is null, where the prompt's tokens are counted")
    prompts = array.to_numpy(zero_copy_only=False)
    if len(wrong := np.flatnonzero((prompts < 0) | (prompts > ids.lengths))):
        row = int(wrong[0])
        raise _RowFault(row, f"seq_len is {prompts[row]}, and the row has {ids.lengths[row]} tokens")
    return prompts


def _check_values(ids: Lists, labels: Lists, vocabulary: Vocabulary | None) -> None:
    """
    Raises:
        _RowFault: an id or a label that the vocabulary does not have, or padding that nothing masks.
    """
    if not len(ids.values):
        return
    end = vocabulary.size if vocabulary else 2**31
    known = f"the model has the tokens 0 to {end - 1}"
    if wrong := ids.first_row((ids.values < 0) | (ids.values >= end)):
        raise _RowFault(wrong[0], f"input_ids holds {wrong[1]}, and {known}: tokenise the rows with its tokenizer")
    if wrong := labels.first_row((labels.values >= end) | (labels.values < 0) & (labels.values != IGNORE_INDEX)):
        raise _RowFault(wrong[0], f"labels holds {wrong[1]}, which is not -100 (no loss), and {known}")
    if vocabulary:
        starts = ids.offsets[:-1][ids.lengths > 1]
        padded = (ids.values[starts] == vocabulary.pad_token_id) & (ids.values[starts + 1] == vocabulary.pad_token_id)
        if padded.any():
            row = int(np.flatnonzero(ids.lengths > 1)[padded.argmax()])
            raise _RowFault(
                row,
                f"input_ids begins with padding ({vocabulary.pad_token_id}) that no attention_mask masks: add that "
                "column, or leave the padding out",
            )
