"""
The tokenizers of ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B as a `tokenizer.json` with a chat template, which transformers
and the serving engines built on it open with no code of this repository.
"""

from collections.abc import Iterable
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from utils.models.jinja_templates import chat_template, keep_apart
from utils.models.tokenization_chatglm2 import CHATGLM2_PREFIX, EOS_ID, ChatGLM2Tokenizer
from utils.models.tokenization_glm4 import GLM4_PREFIX, ChatGLM4Tokenizer

BPE_TYPE = 2  # of SentencePiece's TrainerSpec


def fast_tokenizer(
    tokenizer: ChatGLM2Tokenizer | ChatGLM4Tokenizer, alpaca_opening: str | None = None
) -> PreTrainedTokenizerFast:
    """
    The same tokens from transformers' own class, with the chat template that `chat_template` makes.

    Raises:
        ValueError: a SentencePiece model of a kind that `tokenizers` does not compute exactly, or ids with gaps.
    """
    tokens = dict(tokenizer.added_tokens_decoder)
    if isinstance(tokenizer, ChatGLM4Tokenizer):
        fast, prefix = Tokenizer.from_str(tokenizer.bpe.to_str()), GLM4_PREFIX
        fast.decoder = decoders.ByteLevel()
    else:
        fast, prefix = _from_sentencepiece(tokenizer), CHATGLM2_PREFIX
        tokens |= {
            # "sop" is also the start of "soprano".
            index: AddedToken(token, normalized=False, special=True, single_word=token.isalpha())
            for token, index in tokenizer.special_ids.items()
        }
    for index, token in sorted(tokens.items()):
        (fast.add_special_tokens if token.special else fast.add_tokens)([token])
        if fast.token_to_id(token.content) != index:
            raise ValueError(f"{token.content} has the id {index}, which a tokenizer.json cannot give it")
    keep_apart(fast)
    fast.post_processor = TemplateProcessing(
        single=[*prefix, "$A"], special_tokens=[(token, fast.token_to_id(token)) for token in prefix]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=chat_template(tokenizer, special_tokens(fast), alpaca_opening),
        model_input_names=tokenizer.model_input_names,
    )


def special_tokens(tokenizer: Tokenizer) -> list[str]:
    """The tokens that `tokenizer` takes for special where a text spells them."""
    return [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]


def _from_sentencepiece(tokenizer: ChatGLM2Tokenizer) -> Tokenizer:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(Path(tokenizer.vocab_file).read_bytes())
    kind, normalizer = model.trainer_spec, model.normalizer_spec
    if kind.model_type != BPE_TYPE or not kind.byte_fallback or normalizer.remove_extra_whitespaces:
        raise ValueError(f"{tokenizer.vocab_file} is no byte-fallback BPE that keeps blanks")
    steps = [normalizers.Replace(" ", "▁")]
    if normalizer.add_dummy_prefix:
        steps.insert(0, normalizers.Prepend("▁"))
    if normalizer.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(normalizer.precompiled_charsmap))
    pieces = {piece.piece: piece.score for piece in model.pieces}
    ids = {piece: i for i, piece in enumerate(pieces)}
    fast = Tokenizer(
        BPE(ids, list(_merges(pieces, ids)), unk_token=model.pieces[0].piece, fuse_unk=True, byte_fallback=True)
    )
    fast.normalizer = normalizers.Sequence(steps)
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens(
        [AddedToken(model.pieces[i].piece, normalized=False, special=True) for i in range(EOS_ID + 1)]
    )
    return fast


def _merges(pieces: dict[str, float], ids: dict[str, int]) -> Iterable[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the best-scored piece first; of one piece, in the order of the left."""
    found = []
    for piece, score in pieces.items():
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [(left, right) for left, right in cuts if left in pieces and right in pieces]
        found += [(-score, ids[left], ids[right], left, right) for left, right in pairs]
    return ((left, right) for *_, left, right in sorted(found))
