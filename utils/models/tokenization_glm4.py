"""
GLM-4-9B's tokenizer: byte-level BPE from `tokenizer.model`, which is tiktoken's text and not a SentencePiece model.

Source: `tokenization_chatglm.py` of THUDM/glm-4-9b-chat. The `tokenizers` library computes it, which transformers
needs anyway, and not tiktoken. Quirks:
- tiktoken's ranks name no merges: every split of a token into two tokens is one (`merges_of`).
- Special tokens in a text become tokens in `tokenizer(text)`, but not in chats, which encode texts apart.
- An id past the special tokens repeats the text before it in decoded text.
"""

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AddedToken
from transformers.convert_slow_tokenizer import bytes_to_unicode

from utils.models.tokenization_base import VocabFileTokenizer

# How a text is cut before BPE: `pat_str` of the released tokenizer.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
# They follow the vocabulary in this order; a checkpoint's `added_tokens_decoder` may have others under these ids.
GLM4_SPECIAL_TOKENS = (
    "<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|> "
    "<|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|>"
)
END_OF_TEXT = "<|endoftext|>"
# What the released template puts before the tools of a system message.
TOOLS_PREAMBLE = (
    "你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。"
)


def is_tiktoken_file(path: Path) -> bool:
    """Whether a `tokenizer.model` is tiktoken's text, lines of "base64 rank"."""
    with open(path, "rb") as file:
        parts = file.readline().split()
    try:
        return len(parts) == 2 and parts[1].isdigit() and bool(base64.b64decode(parts[0], validate=True))
    except binascii.Error:
        return False


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """The rank of each token, by its bytes."""
    with open(path, "rb") as file:
        return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in file if line.strip())}


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """
    The merges of tiktoken's ranks: every split of a token into two tokens.

    Lowest rank first. tiktoken joins any two neighbours that form the token of the lowest rank, however training
    formed it, and a token may have a lower rank than its halves. The order of one token's splits made no difference in
    180,000 texts against tiktoken 0.14.
    """
    return [
        (token[:end], token[end:])
        for token in sorted(ranks, key=ranks.__getitem__)
        for end in range(1, len(token))
        if token[:end] in ranks and token[end:] in ranks
    ]


class ChatGLM4Tokenizer(VocabFileTokenizer):
    """
    Tokenizer of GLM-4-9B.

    `tokenizer(text)` prepends `[gMASK] <sop>` and finds special tokens in the text; it pads on the left with
    `<|endoftext|>`.

    Args:
        vocab_file: lines of "base64 rank".
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    opening_tokens = ("[gMASK]", "<sop>")

    def __init__(
        self, vocab_file: str, padding_side: str = "left", clean_up_tokenization_spaces: bool = False, **kwargs
    ):
        self.vocab_file = vocab_file
        ranks = read_ranks(vocab_file)
        letters = bytes_to_unicode()
        self._bytes_of = {rank: token for token, rank in ranks.items()}
        self._letter_bytes = {letter: bytes([byte]) for byte, letter in letters.items()}

        def spell(token: bytes) -> str:
            return "".join(letters[byte] for byte in token)

        self._ids = {spell(token): rank for token, rank in ranks.items()}
        self._pieces = {rank: piece for piece, rank in self._ids.items()}
        merges = [(spell(left), spell(right)) for left, right in merges_of(ranks)]
        self.bpe = Tokenizer(BPE(vocab=self._ids, merges=merges, ignore_merges=True))
        self.bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        released = {
            len(ranks) + i: AddedToken(token, normalized=False, special=True)
            for i, token in enumerate(GLM4_SPECIAL_TOKENS.split())
        }
        added = released | {int(index): token for index, token in kwargs.get("added_tokens_decoder", {}).items()}
        kwargs["added_tokens_decoder"] = self.tokens_beyond_release(added, {})
        specials = [token.content for token in kwargs["added_tokens_decoder"].values() if token.special]
        kwargs.pop("additional_special_tokens", None)
        kwargs["extra_special_tokens"] = specials
        super().__init__(
            padding_side=padding_side,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            eos_token=END_OF_TEXT,
            pad_token=END_OF_TEXT,
            **{key: value for key, value in kwargs.items() if key not in ("eos_token", "pad_token")},
        )

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return self._ids | self._added_tokens_encoder

    def encode_ordinary(self, text: str) -> list[int]:
        """Token ids of a text in which nothing is special."""
        return self.bpe.encode(text, add_special_tokens=False).ids

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self.bpe.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encoded]

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return self.bpe.encode(text, add_special_tokens=False).tokens

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces.get(index, "")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        text, spelled = "", b""
        for token in tokens:
            if not token:  # an id past the special tokens: the released code repeats the text before it
                text += spelled.decode("utf-8", errors="replace")
            spelled += b"".join(self._letter_bytes[letter] for letter in token)
        return text + spelled.decode("utf-8", errors="replace")

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
        **kwargs,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        texts, ordinary = [], []  # decoded runs and special tokens; the run so far
        for token in self.convert_ids_to_tokens(ids, skip_special_tokens=skip_special_tokens):
            if token in self._added_tokens_encoder:
                if ordinary:
                    texts.append(self.convert_tokens_to_string(ordinary))
                    ordinary = []
                texts.append(token)
            else:
                ordinary.append(token)
        if ordinary:
            texts.append(self.convert_tokens_to_string(ordinary))
        return (" " if spaces_between_special_tokens else "").join(texts)

    def to_tokenizers(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self.bpe.to_str())
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def get_prefix_tokens(self) -> list[int]:
        return self.convert_tokens_to_ids(list(self.opening_tokens))

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None):
        if token_ids_1 is not None:
            raise ValueError("GLM-4-9B has no form for a pair of texts: encode the two apart")
        return self.get_prefix_tokens() + token_ids_0

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """`<|role|>`, metadata and newline, message, each encoded apart."""
        return [
            self.convert_tokens_to_ids(f"<|{role}|>"),
            *self.encode_ordinary(f"{metadata}\n"),
            *self.encode_ordinary(message),
        ]

    def build_chat_input(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation, tools included, as the released class's `apply_chat_template` makes them."""
        ids = self.get_prefix_tokens()
        for message in messages:
            if message.get("tools"):
                ids += self.build_single_message("system", "", tools_text(message["tools"]))
            if message["content"]:
                ids += self.build_single_message(message["role"], message.get("metadata", ""), message["content"])
        return [*ids, self.convert_tokens_to_ids("<|assistant|>")] if add_generation_prompt else ids


def tools_text(tools: list[dict[str, Any]]) -> str:
    """The system message that describes functions to the model."""
    text = TOOLS_PREAMBLE
    for tool in tools:
        function = tool["function"]
        text += f"\n\n## {function['name']}\n\n{json.dumps(function, ensure_ascii=False, indent=4)}"
        text += "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
    return text
