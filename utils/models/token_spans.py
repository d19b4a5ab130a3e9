"""Texts and tokens of a prompt, unjoined -> token ids, the texts of many prompts in one call of the tokenizer."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from utils.models.tokenization_base import VocabFileTokenizer


class Span(NamedTuple):
    """A stretch of a conversation: token ids, or a text that is yet to be encoded, apart from its neighbours."""

    content: Sequence[int] | str
    trained: bool = False  # whether training on every turn takes its loss there


NO_TOKENS = Span(np.array([], np.int32))


class UnencodedText(NamedTuple):
    """A prompt or a target before its texts are encoded; `EncodedText` is what comes of it."""

    opening: list[Span]
    text: str
    mark: str  # how `text` ends where the template ends it; its tokens belong to the closing
    end: Span

    def mark_ids(self, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        return encode_constant(tokenizer, self.mark)


class EncodedText(NamedTuple):
    """A prompt or a target as tokens (int32); truncation takes from the end of `text` alone."""

    opening: list[Span]
    text: np.ndarray
    end: Span

    @property
    def closing(self) -> list[int]:
        return [int(token) for token in self.end.content]

    def ids(self) -> list[int]:
        opening = [int(token) for span in self.opening for token in span.content]
        return [*opening, *self.text.tolist(), *self.closing]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Tokens, int32, of texts in which nothing is special: a row that spells out "<eop>" does not end the answer."""
    if isinstance(tokenizer, VocabFileTokenizer):
        return tokenizer.encode_texts(texts)
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
    return [np.array(ids, np.int32) for ids in encoded["input_ids"]]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of one text in which nothing is special."""
    return encode_texts(tokenizer, [text])[0].tolist()


class _Constants:
    """
    What the templates need of one tokenizer again and again: to look up a token takes transformers microseconds, which
    every row would pay.
    """

    def __init__(self):
        self._of: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # tokenizer -> {key: what was made of it}
        self._last = (lambda: None, {})  # the tokenizer last asked about and its values

    def __call__(self, tokenizer: PreTrainedTokenizerBase, key: Any, make: Callable[[], Any]) -> Any:
        last, known = self._last
        if last() is not tokenizer:
            known = self._of.setdefault(tokenizer, {})
            self._last = (weakref.ref(tokenizer), known)
        if key not in known:
            known[key] = make()
        return known[key]


constant = _Constants()


def encode_constant(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Tokens of a text that the templates repeat."""
    return constant(tokenizer, text, lambda: np.array(encode_text(tokenizer, text), np.int32))


def token_ids(tokenizer: PreTrainedTokenizerBase, *tokens: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(tokens))


def token_span(tokenizer: PreTrainedTokenizerBase, *tokens: str) -> Span:
    return constant(tokenizer, tokens, lambda: Span(np.array(token_ids(tokenizer, *tokens), np.int32)))


def encode_drafts(tokenizer: PreTrainedTokenizerBase, drafts: Sequence[UnencodedText]) -> list[EncodedText]:
    """Encodes the texts of all drafts at once."""
    texts = []
    for opening, text, _, _ in drafts:
        if opening:
            texts += [span.content for span in opening if isinstance(span.content, str)]
        texts.append(text)
    encoded = iter(encode_texts(tokenizer, texts))
    made = []
    for opening, _, mark, end in drafts:
        if opening:
            opening = [
                Span(next(encoded), span.trained) if isinstance(span.content, str) else span for span in opening
            ]
        text = next(encoded)
        if mark:
            text, marked = split_closing(text, encode_constant(tokenizer, mark))
            end = Span(np.concatenate([marked, end.content]), end.trained)
        made.append(EncodedText(opening, text, end))
    return made


def split_closing(ids: np.ndarray, closing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts off the end that `ids` has in common with `closing`."""
    common = 0
    while common < min(len(ids), len(closing)) and ids[-1 - common] == closing[-1 - common]:
        common += 1
    return ids[: len(ids) - common], ids[len(ids) - common :]


IGNORE_INDEX = -100  # labels where there is no loss
