"""
A SentencePiece BPE model -> the same vocabulary for the `tokenizers` library, as a tokenizer.json holds it.

`ChatGLM2Tokenizer.to_tokenizers` calls it. transformers' own converter for such models builds a class of another
family (Llama), which treats leading spaces and special tokens differently from the released ChatGLM code.
"""

from collections.abc import Iterable
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

BPE_MODEL_TYPE = 2  # `ModelType.BPE` in SentencePiece's TrainerSpec


def bpe_tokenizer(vocab_file: str | Path) -> Tokenizer:
    """
    The pieces, merges, normalisation and decoding of a SentencePiece model, without special tokens.

    Raises:
        ValueError: a model of a kind that `tokenizers` does not compute exactly.
    """
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(Path(vocab_file).read_bytes())
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != BPE_MODEL_TYPE or not trainer.byte_fallback or normalizer.remove_extra_whitespaces:
        raise ValueError(f"{vocab_file} is not a byte-fallback BPE that keeps blanks")
    steps = [normalizers.Replace(" ", "▁")]
    if normalizer.add_dummy_prefix:
        steps.insert(0, normalizers.Prepend("▁"))
    if normalizer.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(normalizer.precompiled_charsmap))
    scores = {piece.piece: piece.score for piece in model.pieces}
    ids = {piece: i for i, piece in enumerate(scores)}
    bpe = BPE(ids, list(merges(scores, ids)), unk_token=model.pieces[0].piece, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def merges(scores: dict[str, float], ids: dict[str, int]) -> Iterable[tuple[str, str]]:
    """
    All pairs of pieces that join to a piece, in SentencePiece's order.

    The piece with the best score comes first; pairs of one piece come in the order of their left half's id.
    """
    ranked = []
    for piece, score in scores.items():
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [(left, right) for left, right in halves if left in scores and right in scores]
        ranked += [(-score, ids[left], ids[right], left, right) for left, right in pairs]
    return ((left, right) for *_, left, right in sorted(ranked))
