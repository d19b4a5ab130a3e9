"""
The base class of the family's tokenizers: one vocabulary file, saved by copying it.

They are Python tokenizers of transformers (`PreTrainedTokenizer`), because their vocabularies are SentencePiece and
tiktoken files, and because the released classes decode and pad in ways of their own. `encode_texts` is the fast way
for many texts: transformers encodes one text at a time.
"""

import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import AddedToken, PreTrainedTokenizer


class VocabFileTokenizer(PreTrainedTokenizer, ABC):
    """
    A tokenizer whose only vocabulary is `self.vocab_file`; padding is on the left.

    A fine-tuned checkpoint may have tokens of its own, in `added_tokens.json` or the `added_tokens_decoder` of
    `tokenizer_config.json`. Their ids follow the release's; those that are not special are found in every text.
    Subclasses define `_encode_texts`, and what transformers asks of a tokenizer.
    """

    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"
    opening_tokens: tuple[str, ...] = ()  # the special tokens that `tokenizer(text)` prepends

    @staticmethod
    def options_of(config: Mapping[str, Any], vocab_file: Path) -> dict[str, Any]:
        """The constructor's arguments that only a checkpoint's `config.json` tells."""
        return {}

    def tokens_beyond_release(
        self, added: Mapping[int, AddedToken] | None, released: Mapping[str, int]
    ) -> dict[int, AddedToken]:
        """
        The tokens in `added` beyond the release's, by id.

        Args:
            added: the tokens that the checkpoint's files add, by id.
            released: the special tokens of the release and their ids.

        Raises:
            ValueError: a released token under another id, or a token under an id of the release.
        """
        own: dict[int, AddedToken] = {}
        for index, token in sorted((added or {}).items()):
            expected = released.get(token.content)
            if index == expected or self._convert_token_to_id(token.content) == index < self.vocab_size:
                continue  # older libraries list the release's own tokens as added ones
            if expected is not None:
                raise ValueError(f"its files give {token.content} the id {index}, and the release {expected}")
            if index < self.vocab_size or index in released.values():
                raise ValueError(f"its files give {token.content} the id {index}, which another token has")
            if token.content in [other.content for other in own.values()]:
                raise ValueError(f"its files give {token.content} two ids")
            own[index] = token
        return own

    def to_tokenizers(self) -> Tokenizer:
        """
        The vocabulary as transformers' fast tokenizers compute it, without special tokens.

        Raises:
            ValueError: there is no form of it that computes the same ids.
        """
        raise ValueError(f"{type(self).__name__} has no form as a tokenizer.json")

    def tokens_beside_vocabulary(self) -> dict[int, AddedToken]:
        """Special tokens and the checkpoint's own, by id, for a tokenizer.json."""
        return dict(self.added_tokens_decoder)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the vocabulary file into `save_directory`; return its path."""
        name = (f"{filename_prefix}-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / name
        if Path(self.vocab_file).resolve() != target.resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """
        Token ids (int32) of each text; only the checkpoint's own tokens are special.

        Equals `encode(text, add_special_tokens=False, split_special_tokens=True)`, with many texts in one call.
        """
        own = {token.content: i for i, token in self.added_tokens_decoder.items() if not token.special}
        if not own:
            return self._encode_texts(texts)
        pattern = re.compile("(" + "|".join(map(re.escape, sorted(own, key=len, reverse=True))) + ")")
        pieces = [[piece for piece in pattern.split(text) if piece] for text in texts]
        encoded = iter(self._encode_texts([piece for cut in pieces for piece in cut if piece not in own]))
        empty = np.array([], np.int32)
        return [
            np.concatenate([empty, *(np.array([own[p]], np.int32) if p in own else next(encoded) for p in cut)])
            for cut in pieces
        ]

    @abstractmethod
    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_texts` of texts that hold none of the checkpoint's own tokens."""
