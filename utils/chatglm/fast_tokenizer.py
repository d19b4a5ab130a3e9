"""
The tokenizers of ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B as a `tokenizer.json` with a chat template, which transformers
and the serving engines built on it open with no code of this repository.
"""

from collections.abc import Iterable
from pathlib import Path

from utils.chatglm.tokenization_chatglm2 import EOS_ID, PREFIX, ChatGLM2Tokenizer, ChatGLM3Tokenizer
from utils.chatglm.tokenization_glm4 import PREFIX as GLM4_PREFIX
from utils.chatglm.tokenization_glm4 import ChatGLM4Tokenizer

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

BPE_TYPE = 2  # of SentencePiece's TrainerSpec
CHATGLM2_CHAT = (
    "[gMASK]sop{% for message in messages %}{% if message['role'] == 'user' %}[Round {{ loop.index0 // 2 + 1 }}]\n\n"
    "问：{{ message['content'] }}\n\n答：{% else %}{{ message['content'] }}\n\n{% endif %}{% endfor %}"
)
# The newline after a role is encoded apart from the text in ChatGLM3, where each piece of text opens with a blank.
CHATGLM3_CHAT = (
    "[gMASK]sop{% for message in messages %}<|{{ message['role'] }}|>\n {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GLM4_CHAT = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def fast_tokenizer(tokenizer: ChatGLM2Tokenizer | ChatGLM4Tokenizer) -> PreTrainedTokenizerFast:
    """
    The same tokens from transformers' own class.

    Raises:
        ValueError: a SentencePiece model of a kind that `tokenizers` does not compute exactly.
    """
    if isinstance(tokenizer, ChatGLM4Tokenizer):
        fast, prefix, chat = Tokenizer.from_str(tokenizer.bpe.to_str()), GLM4_PREFIX, GLM4_CHAT
        fast.decoder = decoders.ByteLevel()
        specials, eos, pad = tokenizer.all_special_tokens, tokenizer.eos_token, tokenizer.pad_token
    else:
        fast, prefix = _from_sentencepiece(tokenizer), PREFIX
        chat = CHATGLM3_CHAT if isinstance(tokenizer, ChatGLM3Tokenizer) else CHATGLM2_CHAT
        specials, eos, pad = list(tokenizer.special_ids), tokenizer.eos_token, tokenizer.pad_token
    # "sop" is also the start of "soprano".
    fast.add_special_tokens(
        [AddedToken(token, normalized=False, special=True, single_word=token.isalpha()) for token in specials]
    )
    fast.post_processor = TemplateProcessing(
        single=[*prefix, "$A"], special_tokens=[(token, fast.token_to_id(token)) for token in prefix]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        eos_token=eos,
        pad_token=pad,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=chat,
        model_input_names=tokenizer.model_input_names,
    )


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
    fast.add_special_tokens(list(tokenizer.special_ids))
    return fast


def _merges(pieces: dict[str, float], ids: dict[str, int]) -> Iterable[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the best-scored piece first; of one piece, in the order of the left."""
    found = []
    for piece, score in pieces.items():
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [(left, right) for left, right in cuts if left in pieces and right in pieces]
        found += [(-score, ids[left], ids[right], left, right) for left, right in pairs]
    return ((left, right) for *_, left, right in sorted(found))
