"""Rows of a block -> their tokens as flat arrays. Single turns, nearly all rows, are laid out by columns."""

from collections.abc import Sequence
from dataclasses import dataclass

from utils.drafts import encode_texts, split_closing
from utils.errors import RowError
from utils.prompts import (
    IGNORE_INDEX,
    MIN_TEXT,
    ChatGLMTemplate,
    cut_texts,
    encode_rows,
    no_room,
)
from utils.rows import Row

import numpy as np
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenBatch:
    """
    The examples of R rows, one behind the other: `input_ids` and `labels` (tokens,) int32; `lengths` and `tokens_cut`
    (R,) int64, tokens that a row has here and that truncation took. A row in `errors` has length 0.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    tokens_cut: np.ndarray
    errors: dict[int, RowError]

    def select(self, rows: np.ndarray) -> "TokenBatch":
        """Only the rows where `rows`, (R,) bool, is set; none of them with an error."""
        if rows.all():
            return self
        tokens = np.repeat(rows, self.lengths)
        return TokenBatch(
            self.input_ids[tokens], self.labels[tokens], self.lengths[rows], self.tokens_cut[rows], {}
        )  # fmt: skip


def encode_batch(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_seq_length: int | None,
    template: ChatGLMTemplate,
    loss_on: str,
) -> TokenBatch:
    """What `encode_rows` makes of the rows, as flat arrays."""
    if all(len(row.messages) == 2 for row in rows):
        batch = _encode_single_turns(tokenizer, rows, max_seq_length, template)
        if batch is not None:
            return batch
    encoded = encode_rows(tokenizer, rows, max_seq_length, template, loss_on)
    errors = {number: row for number, row in enumerate(encoded) if isinstance(row, RowError)}
    spans = [span for row in encoded if not isinstance(row, RowError) for span in row.spans]
    lengths = np.array([0 if isinstance(row, RowError) else row.length for row in encoded], np.int64)
    tokens_cut = np.array([0 if isinstance(row, RowError) else row.tokens_cut for row in encoded], np.int64)
    sizes = np.fromiter((len(span.content) for span in spans), np.int64, len(spans))
    trained = np.fromiter((span.trained for span in spans), bool, len(spans))
    ids = _join([span.content for span in spans])
    return TokenBatch(ids, _labels(ids, trained, sizes), lengths, tokens_cut, errors)


def _encode_single_turns(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_seq_length: int | None, template: ChatGLMTemplate
) -> TokenBatch | None:
    """Rows whose template's tokens are all the same; None where a prompt happens to end as a template does."""
    prompt_frame, target_frame = template.single_turn(tokenizer)
    prompts = [template.render(row.messages[:1]) for row in rows]
    has_mark = bool(prompt_frame.mark)
    if any(prompt.endswith(template.answer_mark) != has_mark for prompt in prompts):
        return None
    count = len(rows)
    encoded = encode_texts(tokenizer, [*prompts, *[row.messages[1].content for row in rows]])
    prompt_ids, target_ids = encoded[:count], encoded[count:]
    marks = [np.empty(0, np.int32)] * count
    if has_mark:
        mark = prompt_frame.mark_ids(tokenizer)
        pairs = [split_closing(ids, mark) for ids in prompt_ids]
        prompt_ids, marks = [text for text, _ in pairs], [found for _, found in pairs]
    frames = [*prompt_frame.opening, prompt_frame.end, *target_frame.opening, target_frame.end]
    fixed = sum(len(span.content) for span in frames) + _sizes(marks)
    lengths = _sizes(prompt_ids) + _sizes(target_ids) + fixed
    tokens_cut, errors = np.zeros(count, np.int64), {}
    if max_seq_length is not None:
        for row in np.flatnonzero(lengths > max_seq_length).tolist():
            room = max_seq_length - int(fixed[row])
            if room < MIN_TEXT:
                errors[row] = no_room(max_seq_length, int(fixed[row]))
                lengths[row] = 0
            else:
                tokens_cut[row] = lengths[row] - max_seq_length
                lengths[row] = max_seq_length
                prompt_ids[row], target_ids[row] = cut_texts(prompt_ids[row], target_ids[row], room)
    columns = [
        *[(span.content, False) for span in prompt_frame.opening],
        (prompt_ids, False),
        (marks, False),
        (prompt_frame.end.content, False),
        *[(span.content, True) for span in target_frame.opening],
        (target_ids, True),
        (target_frame.end.content, True),
    ]
    columns = [column for column in columns if len(column[0]) and (column[0] is not marks or has_mark)]
    contents = [None] * (count * len(columns))
    sizes = np.empty((count, len(columns)), np.int64)
    for place, (content, _) in enumerate(columns):
        per_row = content if isinstance(content, list) else [content] * count
        contents[place :: len(columns)] = per_row
        sizes[:, place] = _sizes(content) if isinstance(content, list) else len(content)
    ids = _join(contents)
    labels = _labels(ids, np.tile([trained for _, trained in columns], count), sizes.ravel())
    batch = TokenBatch(ids, labels, lengths, tokens_cut, errors)
    if errors:  # their tokens were laid out with the others'
        usable = np.repeat(lengths > 0, sizes.sum(axis=1))
        batch = TokenBatch(ids[usable], labels[usable], lengths, tokens_cut, errors)
    return batch


def _sizes(contents: Sequence[np.ndarray]) -> np.ndarray:
    return np.fromiter(map(len, contents), np.int64, len(contents))


def _join(contents: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(contents) if contents else np.empty(0, np.int32)


def _labels(ids: np.ndarray, trained: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The ids of the trained spans, whose sizes follow one another, and IGNORE_INDEX elsewhere."""
    return np.where(np.repeat(trained, sizes), ids, np.int32(IGNORE_INDEX))
