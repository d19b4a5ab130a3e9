"""
Encodes conversations into token ids and labels: `encode_rows` row by row, `encode_batch` as flat arrays.

utils/data/shards.py writes datasets with `encode_batch`; previews, benchendings and tests read single rows. A template
(utils/models/templates.py) gives texts and special tokens; the texts of all rows go to the tokenizer in one call, and
`truncate` cuts them. Nearly all rows are single turns, whose special tokens are the same: they are laid out span by
span over all rows, without objects for each row. tests/data/test_shards.py holds both paths equal.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from utils.common.errors import RowError
from utils.models.conversation import Conversation, Message
from utils.models.templates import ChatTemplate, template_for
from utils.models.token_spans import (
    IGNORE_INDEX,
    EncodedText,
    TokenSpan,
    UnencodedText,
    encode_many,
    encode_texts,
    split_ending,
)

LOSS_ON = ("last", "every")  # assistant turns that are trained on
PLAIN = Message("assistant", "")[2:]  # the other fields of a message that holds only a text
MIN_TEXT = 2  # tokens of text, one of the prompt and one of the target, below which a row teaches nothing


@dataclass(frozen=True)
class Example:
    """
    A training row as tokens.

    `labels` is IGNORE_INDEX on the prompt and equals `input_ids` on the target.
    """

    input_ids: list[int]
    labels: list[int]
    tokens_cut: int  # tokens of text that truncation removed


class EncodedRow(NamedTuple):
    """A training row as consecutive spans of token ids, each trained on or not."""

    spans: list[TokenSpan]
    length: int  # tokens of all spans
    tokens_cut: int

    def example(self) -> Example:
        """The row as lists of integers."""
        input_ids = [int(token) for span in self.spans for token in span.ids]
        trained = [span.trained for span in self.spans for _ in span.ids]
        labels = [token if loss else IGNORE_INDEX for token, loss in zip(input_ids, trained, strict=True)]
        return Example(input_ids, labels, self.tokens_cut)


@dataclass(frozen=True)
class TokenBatch:
    """
    The examples of R rows, concatenated.

    `input_ids` and `labels`: (tokens,) int32. `lengths` and `tokens_cut`: (R,) int64, a row's tokens here and those
    that truncation removed. A row in `errors` has length 0.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    tokens_cut: np.ndarray
    errors: dict[int, RowError]

    def select(self, rows: np.ndarray) -> "TokenBatch":
        """The rows where `rows`, (R,) bool, is set; none of them may have an error."""
        if rows.all():
            return self
        tokens = np.repeat(rows, self.lengths)
        return TokenBatch(
            self.input_ids[tokens], self.labels[tokens], self.lengths[rows], self.tokens_cut[rows], {}
        )  # fmt: skip


def rows_to_train(row: Conversation, template: ChatTemplate, loss_on: str) -> list[Conversation]:
    """
    The rows whose examples train on the messages that `loss_on` and the row itself name.

    Raises:
        RowError: there is no such message, or the template has no form of something in the row.
    """
    if len(row.messages) == 2 and not row.tools and row.messages[1][2:] == PLAIN:  # nearly every row
        return [row]
    trained = row.trained_messages(loss_on)
    if not trained:
        raise RowError("the last answer is not to be trained on, and --loss_on last trains on no other")
    try:
        template.check_expressible(row)
        return template.training_rows(row, trained)
    except ValueError as error:
        raise RowError(str(error)) from None


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    row: Conversation,
    max_seq_length: int | None = None,
    template: ChatTemplate | None = None,
) -> Example:
    """
    Encode one row with the loss on its last answer; see `encode_rows`.

    Raises:
        RowError: `max_seq_length` leaves no room for text besides the template and the earlier turns.
    """
    encoded = encode_rows(tokenizer, [row], max_seq_length, template)[0]
    if isinstance(encoded, RowError):
        raise encoded
    return encoded.example()


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    max_seq_length: int | None = None,
    template: ChatTemplate | None = None,
) -> list[EncodedRow | RowError]:
    """
    Encode rows in order, with the loss on their last message and the earlier ones that are `trained`.

    A RowError is in place of a row for which `max_seq_length` leaves no room, or which the template cannot express.

    Args:
        rows: as `rows_to_train` returns them.
        max_seq_length: tokens of a row at most, template included; see `truncate`.
        template: None for that of the tokenizer's generation.
    """
    template = template or template_for(tokenizer)
    drafts: list[UnencodedText] = []
    errors: dict[int, RowError] = {}
    for number, row in enumerate(rows):
        try:
            drafts += template.unencoded_row(tokenizer, row)
        except ValueError as error:
            errors[number] = RowError(str(error))
    encoded = iter(_encode_drafts(tokenizer, drafts, max_seq_length))
    return [errors[number] if number in errors else next(encoded) for number in range(len(rows))]


def _encode_drafts(
    tokenizer: PreTrainedTokenizerBase, drafts: Sequence[UnencodedText], max_seq_length: int | None
) -> list[EncodedRow | RowError]:
    """Encode rows, each a prompt and a target in `drafts`."""
    encoded = encode_many(tokenizer, drafts)
    prompts, targets = encoded[::2], encoded[1::2]
    template_tokens = np.array(
        [_template_tokens(p) + _template_tokens(t) for p, t in zip(prompts, targets, strict=True)], np.int64
    )
    texts = truncate([text.text for text in prompts], [text.text for text in targets], template_tokens, max_seq_length)
    encoded_rows: list[EncodedRow | RowError] = []
    for number, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        if number in texts.errors:
            encoded_rows.append(texts.errors[number])
            continue
        spans = [
            *prompt.opening,
            TokenSpan(texts.prompts[number]),
            prompt.closing,
            *target.opening,
            TokenSpan(texts.targets[number], True),
            target.closing,
        ]
        encoded_rows.append(EncodedRow(spans, int(texts.lengths[number]), int(texts.tokens_cut[number])))
    return encoded_rows


def _template_tokens(encoded: EncodedText) -> int:
    """Number of tokens around the text."""
    return sum(len(span.ids) for span in encoded.opening) + len(encoded.closing.ids)


def encode_batch(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    max_seq_length: int | None,
    template: ChatTemplate,
) -> TokenBatch:
    """Encode rows as `encode_rows` does, into flat arrays."""
    texts = [template.single_turn_texts(row) for row in rows]
    if None not in texts:
        batch = _encode_single_turns(tokenizer, texts, max_seq_length, template)
        if batch is not None:
            return batch
    encoded = encode_rows(tokenizer, rows, max_seq_length, template)
    errors = {number: row for number, row in enumerate(encoded) if isinstance(row, RowError)}
    lengths, tokens_cut = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    spans: list[TokenSpan] = []
    for number, row in enumerate(encoded):
        if number not in errors:
            spans += row.spans
            lengths[number], tokens_cut[number] = row.length, row.tokens_cut
    contents = [span.ids for span in spans]
    input_ids, labels = _concatenate(contents, _sizes(contents), np.array([span.trained for span in spans], bool))
    return TokenBatch(input_ids, labels, lengths, tokens_cut, errors)


def _encode_single_turns(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, str]],
    max_seq_length: int | None,
    template: ChatTemplate,
) -> TokenBatch | None:
    """
    Encode rows of one prompt and one answer, whose template tokens are the same.

    Args:
        texts: question and answer of each row, as `single_turn_texts` gives them.

    Returns:
        None if a prompt happens to end as the template does: then its last tokens belong to the template.
    """
    prompt_frame, target_frame = template.single_turn(tokenizer)
    prompts = [prompt for prompt, _ in texts]
    has_ending = bool(prompt_frame.ending)
    ending = template.prompt_ending
    if ending and any(prompt.endswith(ending) != has_ending for prompt in prompts):
        return None
    count = len(texts)
    encoded = encode_texts(tokenizer, [*prompts, *[answer for _, answer in texts]])
    prompt_ids, target_ids = encoded[:count], encoded[count:]
    endings = [np.empty(0, np.int32)] * count
    if has_ending:  # its first token may be one with the prompt's last character
        ending_ids = prompt_frame.ending_ids(tokenizer)
        pairs = [split_ending(ids, ending_ids) for ids in prompt_ids]
        prompt_ids, endings = [text for text, _ in pairs], [ending for _, ending in pairs]
    constants = [*prompt_frame.opening, prompt_frame.closing, *target_frame.opening, target_frame.closing]
    template_tokens = sum(len(span.ids) for span in constants) + _sizes(endings)
    cut = truncate(prompt_ids, target_ids, template_tokens, max_seq_length)
    # (content of each row, or of all rows; whether it is trained on)
    layout = [
        *[(span.ids, False) for span in prompt_frame.opening],
        (cut.prompts, False),
        *([(endings, False)] if has_ending else []),
        (prompt_frame.closing.ids, False),
        *[(span.ids, True) for span in target_frame.opening],
        (cut.targets, True),
        (target_frame.closing.ids, True),
    ]
    layout = [(content, trained) for content, trained in layout if len(content)]
    contents = [None] * (count * len(layout))
    sizes = np.empty((count, len(layout)), np.int64)
    for place, (content, _) in enumerate(layout):
        is_constant = isinstance(content, np.ndarray)
        contents[place :: len(layout)] = [content] * count if is_constant else content
        sizes[:, place] = len(content) if is_constant else _sizes(content)
    input_ids, labels = _concatenate(contents, sizes.ravel(), np.tile([trained for _, trained in layout], count))
    if cut.errors:  # their tokens were laid out with the others'
        usable = np.repeat(cut.lengths > 0, sizes.sum(axis=1))
        input_ids, labels = input_ids[usable], labels[usable]
    return TokenBatch(input_ids, labels, cut.lengths, cut.tokens_cut, cut.errors)


class TruncatedTexts(NamedTuple):
    """
    Texts of R rows as tokens, (T,) int32 each, after truncation.

    `TokenBatch` describes the other fields.
    """

    prompts: list[np.ndarray]
    targets: list[np.ndarray]
    lengths: np.ndarray
    tokens_cut: np.ndarray
    errors: dict[int, RowError]


def truncate(
    prompts: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    template_tokens: np.ndarray,
    max_seq_length: int | None,
) -> TruncatedTexts:
    """
    Cut texts so that no row exceeds `max_seq_length` tokens.

    Texts lose their ends. None allows any length.

    The template's tokens, (R,) int64 for each row, stay whole. The longer text is cut first, and neither to less than
    half of the room unless it is shorter than that. A row with room for fewer than MIN_TEXT tokens is an error.
    """
    prompts, targets = list(prompts), list(targets)
    lengths = _sizes(prompts) + _sizes(targets) + template_tokens
    tokens_cut, errors = np.zeros(len(lengths), np.int64), {}
    if max_seq_length is not None:
        for row in np.flatnonzero(lengths > max_seq_length).tolist():
            room = max_seq_length - int(template_tokens[row])
            if room < MIN_TEXT:
                errors[row] = RowError(
                    f"{max_seq_length} tokens leave no room beside the template's {template_tokens[row]}"
                )
                lengths[row] = 0
                continue
            tokens_cut[row] = lengths[row] - max_seq_length
            lengths[row] = max_seq_length
            targets[row] = targets[row][: max(room - len(prompts[row]), room // 2)]
            prompts[row] = prompts[row][: room - len(targets[row])]
    return TruncatedTexts(prompts, targets, lengths, tokens_cut, errors)


def _sizes(contents: Sequence[np.ndarray]) -> np.ndarray:
    """Number of tokens of each: (spans,) int64."""
    return np.fromiter(map(len, contents), np.int64, len(contents))


def _concatenate(
    contents: Sequence[np.ndarray], sizes: np.ndarray, trained: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """
    Join spans to input_ids and labels, each (tokens,) int32.

    Spans have no loss unless `trained`, (spans,) bool, is set.
    """
    input_ids = np.concatenate(contents) if contents else np.empty(0, np.int32)
    return input_ids, np.where(np.repeat(trained, sizes), input_ids, np.int32(IGNORE_INDEX))


# Chinese, English, digits, rare letters, blanks and special tokens as text: whatever tokenizers treat differently.
PROBES = (
    Conversation((Message("user", "你好，今天天气怎么样？"), Message("assistant", "晴，28.5 °C。\n\n\t出门走走吧！"))),
    Conversation(
        (
            Message("user", "Translate: 龘靐  café naïve"),
            Message("assistant", "<eop> is text, 3.14159 × 2 = 6.28318"),
            Message("user", "😀 def f(x):\r\n    return x**2  # 注释"),
            Message("assistant", "ok"),
        )
    ),
)


def fingerprint(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> str:
    """
    A hash of what tokenizer and template make of fixed conversations.

    Equal if rows tokenised with the one serve the other, whatever files the tokenizers were loaded from.
    """
    examples = [encode_example(tokenizer, probe, None, template) for probe in PROBES]
    tokens = [(example.input_ids, example.labels) for example in examples]
    version = [template.ids_version] if template.ids_version > 1 else []
    return hashlib.sha256(json.dumps([len(tokenizer), tokens, *version]).encode()).hexdigest()[:16]
