"""
Pieces of a prompt or target -> token ids, the texts of many rows in one call of the tokenizer.

The templates (`utils/models/templates.py`) write `UnencodedText`s, `encode_many` makes `EncodedText`s of them, and
`utils/data/encode.py` joins those to training rows. Each text is encoded apart from its neighbours, and nothing in it
is special: a row that spells out "<eop>" does not end the answer.
"""

import json
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from utils.models.tokenization_base import VocabFileTokenizer

# From GLM-4.5 on these are tokens of a chat too, though the tokenizer's files do not call them special.
TAGS = [
    f"<{end}{name}>" for name in ("think", "tool_call", "tool_response", "arg_key", "arg_value") for end in ("", "/")
]
IGNORE_INDEX = -100  # labels where there is no loss, as torch's cross_entropy has it


class TextSpan(NamedTuple):
    """A text of a conversation that is not encoded yet."""

    text: str
    trained: bool = False  # whether training on every turn takes its loss there


class TokenSpan(NamedTuple):
    """Token ids (int32) of a conversation that stand together."""

    ids: np.ndarray
    trained: bool = False  # whether training on every turn takes its loss there


NO_TOKENS = TokenSpan(np.array([], np.int32))


class UnencodedText(NamedTuple):
    """A prompt or a target before its texts are encoded."""

    opening: list[TextSpan | TokenSpan]
    text: str
    ending: str  # how `text` ends where the template ends it, or ""; its tokens belong to the closing
    closing: TokenSpan

    def ending_ids(self, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        """The tokens of `ending`, int32."""
        return encode_template_text(tokenizer, self.ending)


class EncodedText(NamedTuple):
    """A prompt or a target as tokens (int32); truncation cuts the end of `text`."""

    opening: list[TokenSpan]
    text: np.ndarray
    closing: TokenSpan

    def ids(self) -> list[int]:
        """All token ids in their order."""
        opening = [int(token) for span in self.opening for token in span.ids]
        return [*opening, *self.text.tolist(), *map(int, self.closing.ids)]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids (int32) of each text, in which nothing is special."""
    if isinstance(tokenizer, VocabFileTokenizer):
        return tokenizer.encode_texts(texts)
    if not texts:
        return []
    plain = computed_once(tokenizer, "plain", lambda: _without_control_tokens(tokenizer))
    return [np.array(each.ids, np.int32) for each in plain.encode_batch(list(texts), add_special_tokens=False)]


def _without_control_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """
    The vocabulary of a tokenizer.json without special tokens and the TAGS of chats, which texts may spell.

    TAGS are tokens that the files do not call special, so `split_special_tokens` would leave them.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if not (token["special"] or token["content"] in TAGS)
    ]
    plain = Tokenizer.from_str(json.dumps(content))
    plain.no_truncation()
    plain.no_padding()
    return plain


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of one text, in which nothing is special."""
    return encode_texts(tokenizer, [text])[0].tolist()


class _TokenizerCache:
    """
    Values computed once per tokenizer and key.

    transformers takes microseconds to look up a token, which every row would pay. The last tokenizer asked for
    is kept at hand, because the weak dictionary hashes a tokenizer as slowly.
    """

    def __init__(self):
        self._values: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # tokenizer -> {key: value}
        self._last = (lambda: None, {})  # the last tokenizer, weakly, and its values

    def __call__(self, tokenizer: PreTrainedTokenizerBase, key: Any, compute: Callable[[], Any]) -> Any:
        last, values = self._last
        if last() is not tokenizer:
            values = self._values.setdefault(tokenizer, {})
            self._last = (weakref.ref(tokenizer), values)
        if key not in values:
            values[key] = compute()
        return values[key]


computed_once = _TokenizerCache()


def encode_template_text(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Token ids (int32) of a text that a template repeats, encoded once."""
    return computed_once(tokenizer, ("text", text), lambda: np.array(encode_text(tokenizer, text), np.int32))


def token_ids(tokenizer: PreTrainedTokenizerBase, *tokens: str) -> list[int]:
    """The ids of special tokens."""
    return tokenizer.convert_tokens_to_ids(list(tokens))


def token_span(tokenizer: PreTrainedTokenizerBase, *tokens: str) -> TokenSpan:
    """Special tokens as a span, looked up once."""
    return computed_once(tokenizer, tokens, lambda: TokenSpan(np.array(token_ids(tokenizer, *tokens), np.int32)))


def encode_many(tokenizer: PreTrainedTokenizerBase, unencoded: Sequence[UnencodedText]) -> list[EncodedText]:
    """Encode prompts and targets, all their texts in one call of the tokenizer."""
    texts = []
    for opening, text, _, _ in unencoded:
        if opening:
            texts += [span.text for span in opening if isinstance(span, TextSpan)]
        texts.append(text)
    ids_of_texts = iter(encode_texts(tokenizer, texts))
    encoded = []
    for opening, _, ending, closing in unencoded:
        if opening:
            opening = [
                TokenSpan(next(ids_of_texts), span.trained) if isinstance(span, TextSpan) else span for span in opening
            ]
        text = next(ids_of_texts)
        if ending:
            text, ending_ids = split_ending(text, encode_template_text(tokenizer, ending))
            closing = TokenSpan(np.concatenate([ending_ids, closing.ids]), closing.trained)
        encoded.append(EncodedText(opening, text, closing))
    return encoded


def split_ending(ids: np.ndarray, ending: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split off the end that `ids` shares with `ending`, maybe not all of it."""
    common = 0
    while common < min(len(ids), len(ending)) and ids[-1 - common] == ending[-1 - common]:
        common += 1
    return ids[: len(ids) - common], ids[len(ids) - common :]
