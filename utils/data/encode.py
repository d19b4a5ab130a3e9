"""Rows of a block -> their tokens as flat arrays. Single turns, nearly all rows, are laid out by columns."""

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
from utils.models.token_spans import IGNORE_INDEX, EncodedText, TokenSpan, encode_many, encode_texts, split_ending


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
    rows: Sequence[Conversation],
    max_seq_length: int | None,
    template: ChatTemplate,
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
    sizes = np.fromiter((len(span.ids) for span in spans), np.int64, len(spans))
    trained = np.fromiter((span.trained for span in spans), bool, len(spans))
    ids = _concatenate([span.ids for span in spans])
    return TokenBatch(ids, _labels(ids, trained, sizes), lengths, tokens_cut, errors)


def _encode_single_turns(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    max_seq_length: int | None,
    template: ChatTemplate,
) -> TokenBatch | None:
    """Rows whose template's tokens are all the same; None where a prompt happens to end as a template does."""
    prompt_frame, target_frame = template.single_turn(tokenizer)
    prompts = [template.render(row.messages[:1]) for row in rows]
    has_mark = bool(prompt_frame.ending)
    ending = template.prompt_ending
    if ending and any(prompt.endswith(ending) != has_mark for prompt in prompts):
        return None
    count = len(rows)
    encoded = encode_texts(tokenizer, [*prompts, *[row.messages[1].content for row in rows]])
    prompt_ids, target_ids = encoded[:count], encoded[count:]
    marks = [np.empty(0, np.int32)] * count
    if has_mark:
        mark = prompt_frame.ending_ids(tokenizer)
        pairs = [split_ending(ids, mark) for ids in prompt_ids]
        prompt_ids, marks = [text for text, _ in pairs], [found for _, found in pairs]
    frames = [*prompt_frame.opening, prompt_frame.closing, *target_frame.opening, target_frame.closing]
    fixed = sum(len(span.ids) for span in frames) + _sizes(marks)
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
        *[(span.ids, False) for span in prompt_frame.opening],
        (prompt_ids, False),
        (marks, False),
        (prompt_frame.closing.ids, False),
        *[(span.ids, True) for span in target_frame.opening],
        (target_ids, True),
        (target_frame.closing.ids, True),
    ]
    columns = [column for column in columns if len(column[0]) and (column[0] is not marks or has_mark)]
    contents = [None] * (count * len(columns))
    sizes = np.empty((count, len(columns)), np.int64)
    for place, (content, _) in enumerate(columns):
        per_row = content if isinstance(content, list) else [content] * count
        contents[place :: len(columns)] = per_row
        sizes[:, place] = _sizes(content) if isinstance(content, list) else len(content)
    ids = _concatenate(contents)
    labels = _labels(ids, np.tile([trained for _, trained in columns], count), sizes.ravel())
    batch = TokenBatch(ids, labels, lengths, tokens_cut, errors)
    if errors:  # their tokens were laid out with the others'
        usable = np.repeat(lengths > 0, sizes.sum(axis=1))
        batch = TokenBatch(ids[usable], labels[usable], lengths, tokens_cut, errors)
    return batch


def _sizes(contents: Sequence[np.ndarray]) -> np.ndarray:
    return np.fromiter(map(len, contents), np.int64, len(contents))


def _concatenate(contents: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(contents) if contents else np.empty(0, np.int32)


def _labels(ids: np.ndarray, trained: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The ids of the trained spans, whose sizes follow one another, and IGNORE_INDEX elsewhere."""
    return np.where(np.repeat(trained, sizes), ids, np.int32(IGNORE_INDEX))


MIN_TEXT = 2  # tokens of text, one of the prompt and one of the target, below which a row teaches nothing


@dataclass(frozen=True)
class Example:
    """A training row as tokens: `labels` is IGNORE_INDEX on the prompt and equals `input_ids` on the target."""

    input_ids: list[int]
    labels: list[int]
    tokens_cut: int  # how many tokens of text truncation took


class EncodedRow(NamedTuple):
    """An example as it is made: spans of token ids, trained or not, one behind the other."""

    spans: list[TokenSpan]
    length: int  # tokens of all spans
    tokens_cut: int

    def example(self) -> Example:
        input_ids = [int(token) for span in self.spans for token in span.ids]
        trained = [span.trained for span in self.spans for _ in span.ids]
        labels = [token if loss else IGNORE_INDEX for token, loss in zip(input_ids, trained, strict=True)]
        return Example(input_ids, labels, self.tokens_cut)


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    row: Conversation,
    max_seq_length: int | None = None,
    template: ChatTemplate | None = None,
) -> Example:
    """
    Prompt and target as a template joins them (that of the tokenizer's generation unless another is given), with the
    loss on the target and its stop token; truncation is that of `encode_rows`.

    Raises:
        RowError: `max_seq_length` leaves no room for text, because of the template or of a history before the prompt.
    """
    encoded = encode_rows(tokenizer, [row], max_seq_length, template)[0]
    if isinstance(encoded, RowError):
        raise encoded
    return encoded.example()


LOSS_ON = ("last", "every")


def rows_to_train(row: Conversation, template: ChatTemplate, loss_on: str) -> list[Conversation]:
    """
    The rows whose examples have the targets that `loss_on` names.

    Raises:
        RowError: `loss_on` names the last answer alone, and the row says that it is not trained on.
    """
    if loss_on == "every":
        return template.training_rows(row)
    if len(row.messages) - 1 in row.untrained:
        raise RowError("the last answer is not to be trained on, and no other is with --loss_on last")
    return [row]


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    max_seq_length: int | None = None,
    template: ChatTemplate | None = None,
    loss_on: str = "last",
) -> list[EncodedRow | RowError]:
    """
    Rows -> examples, or why a row has none, in the rows' order; their texts are encoded together.

    With `max_seq_length` (tokens) the texts are cut at their ends, the template's tokens never: the longer text gives
    first, and neither goes below half of the room unless it is shorter than that.

    `loss_on` "last" trains on the last answer; "every" also on the earlier ones that stand in the row's prompt as
    tokens of their own: `template.training_rows` makes rows of which that is true.
    """
    template = template or template_for(tokenizer)
    drafts = []
    for row in rows:
        drafts += (
            template.unencoded_prompt(tokenizer, row.prompt, row.untrained),
            template.unencoded_target(tokenizer, row.target),
        )
    parts = encode_many(tokenizer, drafts)
    return [_join(parts[i], parts[i + 1], max_seq_length, loss_on) for i in range(0, len(parts), 2)]


def no_room(max_seq_length: int, fixed: int) -> RowError:
    return RowError(f"{max_seq_length} tokens leave no room beside the template's {fixed}")


def cut_texts(prompt: np.ndarray, target: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """The two texts' beginnings that fill `room` tokens, which they exceed."""
    target = target[: max(room - len(prompt), room // 2)]
    return prompt[: room - len(target)], target


def _join(prompt: EncodedText, target: EncodedText, max_seq_length: int | None, loss_on: str) -> EncodedRow | RowError:
    opening, prompt_text, prompt_end = prompt
    target_opening, target_text, target_end = target
    fixed = len(prompt_end.ids) + len(target_end.ids)
    for span in (*opening, *target_opening):
        fixed += len(span.ids)
    length = fixed + len(prompt_text) + len(target_text)
    cut = 0
    if max_seq_length is not None and length > max_seq_length:
        room = max_seq_length - fixed
        if room < MIN_TEXT:
            return no_room(max_seq_length, fixed)
        cut = length - max_seq_length
        prompt_text, target_text = cut_texts(prompt_text, target_text, room)
    if loss_on == "last" and len(opening) > 1:
        opening = [TokenSpan(ids) for ids, _ in opening]
    spans = [*opening, TokenSpan(prompt_text), prompt_end, *target_opening, TokenSpan(target_text, True), target_end]
    return EncodedRow(spans, length - cut, cut)


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
    What tokenizer and template make of fixed conversations, as a hash: equal where rows tokenised with the one serve
    the other, whatever files the tokenizers were read from.
    """
    made = [
        (example.input_ids, example.labels)
        for example in (encode_example(tokenizer, p, None, template) for p in PROBES)
    ]
    version = [template.ids_version] if template.ids_version > 1 else []
    return hashlib.sha256(json.dumps([len(tokenizer), made, *version]).encode()).hexdigest()[:16]
