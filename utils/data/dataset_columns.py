"""
Reads the columns of a tokenised dataset, of this toolkit or another, as `input_ids` and `labels`, checked row by row.

utils/data/arrow_reader.py calls `to_examples` with a table whose memory is safe to read (utils/data/arrow_table.py).
A column that means another training is refused, not ignored.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from utils.common.errors import UsageError
from utils.models.token_spans import IGNORE_INDEX

LOSS_MASKS = ("loss_mask", "completion_mask", "assistant_masks")  # 1 for tokens with loss; two names are TRL's
LIST_COLUMNS = ("input_ids", "labels", "attention_mask", *LOSS_MASKS, "position_ids")
# Columns that mean another training -> the one value at which they change nothing, or None.
UNSUPPORTED_COLUMNS: Mapping[str, int | None] = {
    "token_type_ids": 0,
    **dict.fromkeys(("weight", "weights", "sample_weight", "loss_weight", "loss_weights"), 1),
    **dict.fromkeys(("segment_ids", "document_ids", "sequence_ids", "seq_lengths", "cu_seqlens", "seq_idx")),
    **dict.fromkeys(("pixel_values", "images", "inputs_embeds", "decoder_input_ids")),
}
KNOWN_COLUMNS = frozenset((*LIST_COLUMNS, "seq_len", *UNSUPPORTED_COLUMNS))
BATCH_ROWS = 16384  # checked together: few enough that their tokens are counted in 32 bits


@dataclass(frozen=True)
class Vocabulary:
    """The model's token ids: those below `size`, and `pad_token_id`, with which no row begins."""

    size: int
    pad_token_id: int


@dataclass(frozen=True)
class ListColumn:
    """
    A column of lists.

    `values` of all rows are (tokens,); `offsets`, at which rows begin, are (rows + 1,) from 0.
    """

    values: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Values of each row, (rows,)."""
        return np.diff(self.offsets)

    def positions(self) -> np.ndarray:
        """Position of each value in its row, from 0: (tokens,) int64."""
        return np.arange(len(self.values)) - np.repeat(self.offsets[:-1], self.lengths)

    def first_row(self, wrong: np.ndarray) -> tuple[int, int] | None:
        """
        Row and value of the first entry that is wrong, or None.

        `wrong` is (tokens,) bool.
        """
        if not wrong.any():
            return None
        index = int(wrong.argmax())
        return int(np.searchsorted(self.offsets, index, side="right")) - 1, self.values[index].item()

    def select(self, kept: np.ndarray) -> "ListColumn":
        """The column with only the values where `kept`, (tokens,) bool, is set."""
        return ListColumn(self.values[kept], np.concatenate([[0], np.cumsum(kept)])[self.offsets])

    def to_arrow(self) -> pa.ListArray:
        """The column as an Arrow array, which shares the values unless they are unsigned."""
        values = self.values.astype(np.int32) if self.values.dtype.kind == "u" else self.values
        return pa.ListArray.from_arrays(pa.array(self.offsets, pa.int32()), pa.array(values))


class _RowProblem(Exception):
    """A row cannot be trained on. Arguments: its number in its batch, and the message."""


def to_examples(table: pa.Table, vocabulary: Vocabulary | None) -> pa.Table:
    """
    Convert the columns of any tool to `input_ids` and `labels`.

    Both are lists of signed integers, of equal length in each row.

    Tokens whose `attention_mask` is 0 are removed, so that a row trains as if it had never been padded. Tokens whose
    loss mask (`LOSS_MASKS`) is 0 have no loss. Without `labels` every other token has, but the first `seq_len`.
    Columns that need no change stay in their file's memory.

    Args:
        table: with `input_ids` and at least one of `labels`, `seq_len` and `LOSS_MASKS`.
        vocabulary: None if the model is unknown; ids are then only checked to be token numbers.

    Raises:
        UsageError: a column of another type, or values that are impossible or mean another training. The message names
            the column and, for a fault of one row, the row, counted from 0.
    """
    for name in table.column_names:
        _check_type(name, table[name])
    batches = list(_read_batches(table, vocabulary))
    return pa.Table.from_batches(batches) if batches else table.select(["input_ids", "labels"])


def _check_type(name: str, column: pa.ChunkedArray) -> None:
    """
    Check the type of a column.

    Raises:
        UsageError: see `to_examples`.
    """
    types, values = pa.types, column.type
    is_list = types.is_list(values) or types.is_large_list(values) or types.is_fixed_size_list(values)
    if is_list:
        values = values.value_type
    is_mask = name == "attention_mask" or name in LOSS_MASKS
    if name == "position_ids" and not (is_list and types.is_integer(values)):
        raise UsageError(_describe_unsupported(name))
    if name in UNSUPPORTED_COLUMNS:
        numbers = pa.compute.list_flatten(column) if is_list else column
        is_number = types.is_integer(values) or types.is_floating(values)
        if UNSUPPORTED_COLUMNS[name] is None or not is_number or column.null_count or numbers.null_count:
            raise UsageError(_describe_unsupported(name))
        if set(pa.compute.min_max(numbers).as_py().values()) - {UNSUPPORTED_COLUMNS[name], None}:
            raise UsageError(f"{_describe_unsupported(name)} (a column of only {UNSUPPORTED_COLUMNS[name]} may stay)")
    elif is_list == (name == "seq_len") or not (types.is_integer(values) or is_mask and types.is_boolean(values)):
        wanted = "integers" if name == "seq_len" else "lists of integers"
        raise UsageError(
            f"column {name} holds {column.type}, not {wanted}: tokenise the rows again, or convert it (datasets: "
            "cast_column)"
        )


def _describe_unsupported(name: str) -> str:
    return f"column {name} is not supported and means another training: remove it (datasets: remove_columns)"


def _read_batches(table: pa.Table, vocabulary: Vocabulary | None) -> Iterator[pa.RecordBatch]:
    first = 0
    for batch in table.to_batches(max_chunksize=BATCH_ROWS):
        try:
            ids, labels = _read_batch(batch, vocabulary)
        except _RowProblem as error:
            row, fault = error.args
            raise UsageError(f"row {first + row}: {fault}") from None
        yield pa.RecordBatch.from_arrays([ids.to_arrow(), labels.to_arrow()], ["input_ids", "labels"])
        first += len(batch)


def _read_batch(batch: pa.RecordBatch, vocabulary: Vocabulary | None) -> tuple[ListColumn, ListColumn]:
    """`input_ids` and `labels` of a batch of rows; see `to_examples`."""
    columns = {name: _read_lists(name, batch.column(name)) for name in LIST_COLUMNS if name in batch.schema.names}
    ids = columns["input_ids"]
    for name, column in columns.items():
        if len(differing := np.flatnonzero(column.lengths != ids.lengths)):
            row = int(differing[0])
            raise _RowProblem(
                row,
                f"{name} has {column.lengths[row]} values and input_ids has {ids.lengths[row]}: give one for each "
                "token" + (", -100 for no loss" if name == "labels" else ""),
            )
    masks = {name: _read_mask(name, columns[name]) for name in columns if name in ("attention_mask", *LOSS_MASKS)}
    without_loss = [~masks[name] for name in LOSS_MASKS if name in masks]
    # Source: mymusise/ChatGLM-Tuning, tokenize_dataset_rows.py and the collator in finetune.py. That collator also
    # labels `<sop>` after `[gMASK]`, which every prompt has and no answer needs.
    if "labels" not in columns and "seq_len" in batch.schema.names:
        without_loss.append(
            ids.positions() < np.repeat(_read_prompt_lengths(batch.column("seq_len"), ids), ids.lengths)
        )
    labels = columns.get("labels", ids)
    if without_loss:
        values = np.where(np.logical_or.reduce(without_loss), np.int32(IGNORE_INDEX), labels.values)
        labels = ListColumn(values, labels.offsets)
    kept = masks.get("attention_mask")
    positions = columns.get("position_ids")
    if kept is not None and not kept.all():
        ids, labels = ids.select(kept), labels.select(kept)
        positions = positions and positions.select(kept)
    if positions and (wrong := positions.first_row(positions.values != positions.positions())):
        raise _RowProblem(
            wrong[0], f"{_describe_unsupported('position_ids')} (a column that counts from 0 in each row may stay)"
        )
    _check_values(ids, labels, vocabulary)
    return ids, labels


def _read_lists(name: str, array: pa.Array) -> ListColumn:
    """
    Read a column of lists of numbers.

    Raises:
        _RowProblem: a row or a value is null.
    """
    if array.null_count:
        raise _RowProblem(int(np.argmax(array.is_null())), f"{name} is null: remove the row, or tokenise it again")
    if pa.types.is_fixed_size_list(array.type):
        offsets = np.arange(len(array) + 1) * array.type.list_size
    else:
        offsets = array.offsets.to_numpy().astype(np.int64)
        offsets -= offsets[0]
    values = array.flatten()
    if values.null_count:
        row, _ = ListColumn(np.ones(len(values)), offsets).first_row(np.array(values.is_null()))
        raise _RowProblem(row, f"{name} holds a null: give {'-100 or a token' if name == 'labels' else 'a number'}")
    return ListColumn(values.to_numpy(zero_copy_only=False), offsets)


def _read_mask(name: str, column: ListColumn) -> np.ndarray:
    """
    Read a column of 0 and 1 as (tokens,) bool.

    Raises:
        _RowProblem: a value is neither 0 nor 1.
    """
    mask = column.values.astype(bool)
    if wrong := column.first_row(column.values != mask):
        raise _RowProblem(wrong[0], f"{name} holds {wrong[1]}, which is neither 0 nor 1")
    return mask


def _read_prompt_lengths(array: pa.Array, ids: ListColumn) -> np.ndarray:
    """
    Read the number of prompt tokens of each row: (rows,).

    Raises:
        _RowProblem: a row has fewer tokens, or the number is null.
    """
    if array.null_count:
        raise _RowProblem(int(np.argmax(array.is_null())), "seq_len is null: give the number of the prompt's tokens")
    prompts = array.to_numpy(zero_copy_only=False)
    if len(wrong := np.flatnonzero((prompts < 0) | (prompts > ids.lengths))):
        row = int(wrong[0])
        raise _RowProblem(row, f"seq_len is {prompts[row]}, and the row has {ids.lengths[row]} tokens")
    return prompts


def _check_values(ids: ListColumn, labels: ListColumn, vocabulary: Vocabulary | None) -> None:
    """
    Check ids and labels against the vocabulary.

    Raises:
        _RowProblem: an id or a label that the vocabulary does not have, or padding that nothing masks.
    """
    if not len(ids.values):
        return
    end = vocabulary.size if vocabulary else 2**31
    known = f"the model has the tokens 0 to {end - 1}"
    if wrong := ids.first_row((ids.values < 0) | (ids.values >= end)):
        raise _RowProblem(wrong[0], f"input_ids holds {wrong[1]}, and {known}: tokenise the rows with its tokenizer")
    if wrong := labels.first_row((labels.values >= end) | (labels.values < 0) & (labels.values != IGNORE_INDEX)):
        raise _RowProblem(wrong[0], f"labels holds {wrong[1]}, which is not -100 (no loss), and {known}")
    if vocabulary:
        starts = ids.offsets[:-1][ids.lengths > 1]
        padded = (ids.values[starts] == vocabulary.pad_token_id) & (ids.values[starts + 1] == vocabulary.pad_token_id)
        if padded.any():
            row = int(np.flatnonzero(ids.lengths > 1)[padded.argmax()])
            raise _RowProblem(
                row,
                f"input_ids begins with padding ({vocabulary.pad_token_id}) that no attention_mask masks: add that "
                "column, or remove the padding",
            )
