"""
The tokenizers of ChatGLM2-6B and ChatGLM3-6B: one SentencePiece model (`tokenizer.model`), then special tokens.

Source: `tokenization_chatglm.py` of THUDM/chatglm2-6b and THUDM/chatglm3-6b. Quirks:
- The special tokens follow the vocabulary, and are never found in a text, however it spells them.
- ChatGLM2-6B's decoded text hides special tokens, ChatGLM3-6B's shows them.
- The first revision of ChatGLM2-6B pads with `</s>` and cleans up spaces in decoded text, later ones do neither.
- `unk_token_id` is None though there is an unk token.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from tokenizers import Tokenizer
from transformers import AddedToken

from utils.models.tokenization_base import VocabFileTokenizer

CHATGLM2_SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
EOS_ID = 2  # </s>


class ChatGLM2Tokenizer(VocabFileTokenizer):
    """
    Tokenizer of ChatGLM2-6B.

    `tokenizer(text)` prepends `[gMASK] sop`, a pair ends with `</s>`; padding is on the left.

    Args:
        vocab_file: the SentencePiece model.
        pad_with_unk: whether to pad with `<unk>` (0) and leave the spaces of decoded text alone, as later revisions
            do, which have a `pad_token_id` in `config.json`; else it pads with `</s>` (2) and cleans spaces up.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    special_pieces: tuple[str, ...] = CHATGLM2_SPECIAL_TOKENS
    opening_tokens = ("[gMASK]", "sop")

    @staticmethod
    def options_of(config: Mapping[str, Any], vocab_file: Path) -> dict[str, Any]:
        """`pad_with_unk`, which tells the revisions apart."""
        # CodeGeeX2-6B has the later tokenizer, and no pad_token_id in its config.json.
        later = "codegeex2" in str(config.get("_name_or_path")).lower().rpartition("/")[2]
        return {"pad_with_unk": later or config.get("pad_token_id") == 0}

    def __init__(self, vocab_file: str, pad_with_unk: bool = False, **kwargs):
        self.vocab_file = vocab_file
        self.pad_with_unk = pad_with_unk
        self.sp_model = sentencepiece.SentencePieceProcessor(model_file=str(vocab_file))
        self.special_ids = {piece: self.sp_model.vocab_size() + i for i, piece in enumerate(self.special_pieces)}
        # A piece of the vocabulary that is spelled like a special token becomes it, as in the released class.
        self._special_by_piece_id = {
            self.sp_model.piece_to_id(piece): index
            for piece, index in self.special_ids.items()
            if self.sp_model.piece_to_id(piece) != self.sp_model.unk_id()
        }
        self._special_by_id = {index: piece for piece, index in self.special_ids.items()}
        kwargs["added_tokens_decoder"] = self.tokens_beyond_release(
            kwargs.get("added_tokens_decoder"), self.special_ids
        )
        # None of these is a special token to transformers: nothing in a text is ever split off as one.
        for name in ("bos_token", "eos_token", "pad_token", "unk_token", "extra_special_tokens"):
            kwargs.pop(name, None)
        kwargs.setdefault("clean_up_tokenization_spaces", not pad_with_unk)
        super().__init__(pad_with_unk=pad_with_unk, **kwargs)

    @property
    def vocab_size(self) -> int:
        return self.sp_model.vocab_size() + len(self.special_ids)

    @property
    def pad_token_id(self) -> int:
        return 0 if self.pad_with_unk else EOS_ID

    @property
    def pad_token(self) -> str:
        return self.sp_model.id_to_piece(self.pad_token_id)

    @property
    def unk_token(self) -> str | None:
        return self.sp_model.id_to_piece(0) if self.pad_with_unk else None

    @property
    def unk_token_id(self) -> None:
        return None  # as the released class answers

    @property
    def eos_token_id(self) -> int:
        return EOS_ID

    @property
    def eos_token(self) -> str:
        return self.sp_model.id_to_piece(EOS_ID)

    def get_vocab(self) -> dict[str, int]:
        vocab = {self.sp_model.id_to_piece(i): i for i in range(self.sp_model.vocab_size())}
        return vocab | self.special_ids | self._added_tokens_encoder

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return self.sp_model.encode(text, out_type=str)

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self.sp_model.encode_as_numpy(list(texts), num_threads=1)  # read-only arrays
        for piece_id, index in self._special_by_piece_id.items():
            encoded = [np.where(ids == piece_id, index, ids) for ids in encoded]
        return encoded

    def _convert_token_to_id(self, token: str) -> int:
        return self.special_ids.get(token, self.sp_model.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        return "" if index in self._special_by_id else self.sp_model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.sp_model.decode([token for token in tokens if token])

    def to_tokenizers(self) -> Tokenizer:
        from utils.models.convert_sentencepiece import bpe_tokenizer  # needs protobuf, and takes a while to import

        return bpe_tokenizer(self.vocab_file)

    def tokens_beside_vocabulary(self) -> dict[int, AddedToken]:
        control = {self.sp_model.id_to_piece(i): i for i in range(EOS_ID + 1)}  # <unk>, <s>, </s>
        special = {
            # "sop" is also the start of "soprano".
            index: AddedToken(piece, normalized=False, special=True, single_word=piece.isalpha())
            for piece, index in (control | self.special_ids).items()
        }
        return super().tokens_beside_vocabulary() | special

    def get_prefix_tokens(self) -> list[int]:
        return [self.special_ids[piece] for piece in self.opening_tokens]

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None):
        ids = self.get_prefix_tokens() + token_ids_0
        return ids if token_ids_1 is None else ids + token_ids_1 + [EOS_ID]


class ChatGLM3Tokenizer(ChatGLM2Tokenizer):
    """
    Tokenizer of ChatGLM3-6B: ChatGLM2-6B's with four role tokens; it pads with `<unk>` (0).

    Args:
        vocab_file: the SentencePiece model.
        encode_special_tokens: whether to find role tokens in a text; off in the release.
    """

    special_pieces = CHATGLM2_SPECIAL_TOKENS + ROLE_TOKENS

    def __init__(self, vocab_file: str, encode_special_tokens: bool = False, **kwargs):
        self.encode_special_tokens = encode_special_tokens
        kwargs["pad_with_unk"] = True
        super().__init__(vocab_file, encode_special_tokens=encode_special_tokens, **kwargs)

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        if not self.encode_special_tokens:
            return super()._tokenize(text)
        tokens = []
        for piece in re.split("(" + "|".join(map(re.escape, ROLE_TOKENS)) + ")", text):
            if piece in ROLE_TOKENS:
                tokens.append(piece)
            elif piece:
                tokens += self.sp_model.encode(piece, out_type=str)
        return tokens

    def _convert_id_to_token(self, index: int) -> str:
        if index in self._special_by_id:
            return self._special_by_id[index]
        return "" if index <= EOS_ID else self.sp_model.id_to_piece(index)

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """`<|role|>`, metadata and newline, message, each encoded apart."""
        return [
            self.special_ids[f"<|{role}|>"],
            *self.sp_model.encode(f"{metadata}\n"),
            *self.sp_model.encode(message),
        ]

    def build_chat_input(
        self, query: str, history: list[dict[str, Any]] | None = None, role: str = "user"
    ) -> list[int]:
        """The ids of a chat up to `<|assistant|>`, as the released `build_chat_input` makes them."""
        ids = self.get_prefix_tokens()
        for item in history or []:
            content = item["content"]
            if item["role"] == "system" and "tools" in item:
                content += "\n" + json.dumps(item["tools"], indent=4, ensure_ascii=False)
            ids += self.build_single_message(item["role"], item.get("metadata", ""), content)
        ids += self.build_single_message(role, "", query)
        return [*ids, self.special_ids["<|assistant|>"]]
