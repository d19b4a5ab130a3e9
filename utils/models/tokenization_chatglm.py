"""
ChatGLM-6B's tokenizer: a SentencePiece model (`ice_text.model`) and pieces for white space.

Source: `tokenization_chatglm.py` of THUDM/chatglm-6b, its first release (which reads the model with icetk) and the
later ones. Quirks:
- Newlines, tabs and runs of spaces are replaced by pieces (`<n>`, `<|tab|>`, `<|blank_2|>`) before SentencePiece.
- The first release counts 20,000 image tokens before the pieces, and appends the special pieces to its model file.
- The released code strips white space around a special token that it finds in a text.
- `[gMASK]` and `</s>` are tokens, but not special ones to transformers.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from transformers import AddedToken

from utils.models.tokenization_base import VocabFileTokenizer

# The first release's model file lacks these pieces; its code appends them.
CONTROL_PIECES = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
FIRST_IMAGE_TOKENS = 20000  # of the first release; also the default of its code
NEWLINE_PIECE = "<n>"
TAB_PIECE = "<|tab|>"
LONGEST_BLANK = 80  # spaces that one piece stands for, as in the vocabulary
_BLANKS = re.compile(f"  [ ]{{0,{LONGEST_BLANK - 2}}}")  # two literal spaces first: searched for 5 times as fast
_BLANK_PIECE = re.compile(r"<\|blank_([1-9]\d?)\|>")


def encode_whitespace(text: str) -> str:
    """Replace newlines, tabs and runs of 2 to 80 spaces by their pieces."""
    text = text.replace("\n", NEWLINE_PIECE).replace("\t", TAB_PIECE)
    # The longest run first, each length in one pass of C: `text` may be the joined text of many rows.
    for run in sorted(set(_BLANKS.findall(text)), key=len, reverse=True):
        text = text.replace(run, f"<|blank_{len(run)}|>")
    return text


def decode_whitespace(text: str) -> str:
    """The inverse of `encode_whitespace`; pieces that a text spells become white space too."""
    text = text.replace(NEWLINE_PIECE, "\n").replace(TAB_PIECE, "\t")
    return _BLANK_PIECE.sub(
        lambda piece: " " * int(piece[1]) if 2 <= int(piece[1]) <= LONGEST_BLANK else piece[0], text
    )


def load_pieces(vocab_file: str | Path) -> sentencepiece.SentencePieceProcessor:
    """
    The SentencePiece model in `vocab_file`, completed if it is the first release's.

    Source: `SPTokenizer` in the first release's `tokenization_chatglm.py`, and the pieces of the later model file.
    """
    model = sentencepiece.SentencePieceProcessor(model_file=str(vocab_file))
    if model.piece_to_id(CONTROL_PIECES[0]) != model.unk_id():
        return model
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf, and takes a while to import

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(Path(vocab_file).read_bytes())
    kinds = proto.SentencePiece
    blanks = [TAB_PIECE, *(f"<|blank_{length}|>" for length in range(2, LONGEST_BLANK + 1))]
    appended = [(piece, kinds.CONTROL) for piece in CONTROL_PIECES]
    appended += [(piece, kinds.USER_DEFINED) for piece in blanks]
    appended += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    present = {piece.piece for piece in proto.pieces}
    for piece, kind in appended:
        if piece not in present:
            proto.pieces.add(piece=piece, score=0.0, type=kind)
    proto.trainer_spec.byte_fallback = True
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


class ChatGLMTokenizer(VocabFileTokenizer):
    """
    Tokenizer of ChatGLM-6B.

    `tokenizer(text)` appends `[gMASK] <sop>`; a pair becomes `A [gMASK] <sop> B <eop>`. Padding is on the left.
    `attention_mask` is (B, T), 0 on padding; the model derives what the released tokenizer returns as 4-D masks and
    positions. The first release (150,528 rows) calls `</s>` its eos token; here its tokens have the later names.

    Args:
        vocab_file: the SentencePiece model.
        num_image_tokens: ids before the first text piece: 20000 in the first release, 0 since.
        do_lower_case, remove_space: text normalisation, off in every release.
    """

    vocab_files_names = {"vocab_file": "ice_text.model"}

    def __init__(
        self,
        vocab_file: str,
        do_lower_case: bool = False,
        remove_space: bool = False,
        bos_token: str | AddedToken = "<sop>",
        eos_token: str | AddedToken = "<eop>",
        end_token: str = "</s>",
        mask_token: str | AddedToken = "[MASK]",
        gmask_token: str = "[gMASK]",
        pad_token: str | AddedToken = "<pad>",
        unk_token: str | AddedToken = "<unk>",
        num_image_tokens: int = 0,
        clean_up_tokenization_spaces: bool = True,
        **kwargs,
    ):
        self.vocab_file = vocab_file
        self.do_lower_case = do_lower_case
        self.remove_space = remove_space
        self.num_image_tokens = num_image_tokens
        self.end_token = end_token
        self.gmask_token = gmask_token
        self.sp_model = load_pieces(vocab_file)
        if str(eos_token) == end_token:
            eos_token = kwargs.pop("eop_token", "<eop>")

        # The released code strips the white space around a special token that it finds in the text.
        specials = {
            str(token): self._convert_token_to_id(str(token))
            for token in (bos_token, eos_token, unk_token, pad_token, mask_token)
        }
        own = self.tokens_beyond_release(kwargs.get("added_tokens_decoder"), specials)
        kwargs["added_tokens_decoder"] = own | {
            index: AddedToken(token, lstrip=True, rstrip=True, normalized=False, special=True)
            for token, index in specials.items()
        }
        kwargs.pop("model_specific_special_tokens", None)  # [gMASK] and </s> are not special to the released one
        super().__init__(
            do_lower_case=do_lower_case,
            remove_space=remove_space,
            bos_token=str(bos_token),
            eos_token=str(eos_token),
            mask_token=str(mask_token),
            pad_token=str(pad_token),
            unk_token=str(unk_token),
            num_image_tokens=num_image_tokens,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )

    @staticmethod
    def options_of(config: Mapping[str, Any], vocab_file: Path) -> dict[str, Any]:
        """
        `num_image_tokens`, which the tokenizer's files may lack.

        The id of `<sop>` in `config.json` shows it. Without that id it is the released code's default.
        """
        bos_id = config.get("bos_token_id")
        if bos_id is not None and bos_id < FIRST_IMAGE_TOKENS:
            return {"num_image_tokens": 0}
        without = bos_id == load_pieces(vocab_file).piece_to_id("<sop>")
        return {"num_image_tokens": 0 if without else FIRST_IMAGE_TOKENS}

    @property
    def vocab_size(self) -> int:
        """Image tokens and pieces."""
        return self.num_image_tokens + self.sp_model.vocab_size()

    @property
    def gmask_token_id(self) -> int:
        """The id of `[gMASK]`, where an answer's first position stays."""
        return self.convert_tokens_to_ids(self.gmask_token)

    @property
    def end_token_id(self) -> int:
        """The id of `</s>`, which ends no answer."""
        return self.convert_tokens_to_ids(self.end_token)

    def get_vocab(self) -> dict[str, int]:
        vocab = {self._convert_id_to_token(i): i for i in range(self.vocab_size)}
        return vocab | self._added_tokens_encoder

    def _normalize(self, text: str) -> str:
        if self.remove_space:
            text = " ".join(text.strip().split())
        if self.do_lower_case:
            text = text.lower()
        return encode_whitespace(text)

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return self.sp_model.encode(self._normalize(text), out_type=str)

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        # All texts at once: the pieces for white space do not reach over a "\0".
        joined = "\0".join(texts)
        if joined.count("\0") == len(texts) - 1 and not (self.remove_space or self.do_lower_case):
            normalized = encode_whitespace(joined).split("\0")
        else:
            normalized = [self._normalize(text) for text in texts]
        encoded = self.sp_model.encode_as_numpy(normalized, num_threads=1)
        return [ids + self.num_image_tokens for ids in encoded] if self.num_image_tokens else encoded

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.piece_to_id(token) + self.num_image_tokens

    def _convert_id_to_token(self, index: int) -> str:
        if index < self.num_image_tokens:
            return f"<image_{index}>"
        return self.sp_model.id_to_piece(index - self.num_image_tokens)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return decode_whitespace(self.sp_model.decode([token for token in tokens if token != self.pad_token]))

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None):
        ids = token_ids_0 + [self.gmask_token_id, self.bos_token_id]
        return ids if token_ids_1 is None else ids + token_ids_1 + [self.eos_token_id]
