"""How answers compare with references: exact match, BLEU-4, chrF, ROUGE, lengths; each with a confidence interval."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.common.code_caches import user_cache
from utils.common.errors import UsageError

try:
    import jieba
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer
except ImportError as error:
    raise UsageError(f"{error.name} is not installed: pip install -r tools/requirements.txt") from None

jieba.setLogLevel(logging.WARNING)
jieba.dt.tmp_dir = str(user_cache("jieba"))  # its words, as Python objects; by default in /tmp, whoever put them there
ROUGE = ("rouge1", "rouge2", "rougeL")
CONFIDENCE = (2.5, 97.5)  # percent
RESAMPLES = 1000
PERCENT = ("exact_match", "bleu4", "chrf", *ROUGE, "stopped")


class JiebaWords:
    """The tokenizer that rouge_score asks for: the words that jieba cuts, blanks left out."""

    def tokenize(self, text: str) -> list[str]:
        return [word for word in jieba.lcut(text) if word.strip()]


@dataclass(frozen=True)
class Score:
    value: float
    low: float  # of the 95% interval, by bootstrap over rows
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def score_answers(answers: Sequence[dict[str, Any]], references: Sequence[str], seed: int = 0) -> dict[str, Score]:
    """
    Scores in percent, except `answer_tokens` and `reference_characters`, `answer_characters`, which are means.

    Args:
        answers: as `generate_answers` yields them, in the order of `references`; one that failed counts as empty.

    BLEU-4 (zh tokenisation) and chrF are sacrebleu's of the corpus; ROUGE-1/2/L is the mean F1 of rouge_score on
    jieba's words.
    """
    texts = [answer["answer"] or "" for answer in answers]
    scorer = RougeScorer(list(ROUGE), tokenizer=JiebaWords())
    rouge = [scorer.score(reference, text) for reference, text in zip(references, texts, strict=True)]
    rows: dict[str, list[float]] = {
        "exact_match": [100.0 * (a.strip() == b.strip()) for a, b in zip(texts, references, strict=True)],
        **{name: [100.0 * row[name].fmeasure for row in rouge] for name in ROUGE},
        "stopped": [100.0 * (answer["finish_reason"] == "stop") for answer in answers],
        "answer_tokens": [answer.get("answer_tokens", 0) for answer in answers],
        "answer_characters": [len(text) for text in texts],
        "reference_characters": [len(reference) for reference in references],
    }
    draws = np.random.default_rng(seed).integers(len(texts), size=(RESAMPLES, len(texts)))
    scores = {name: _mean(np.array(values), draws) for name, values in rows.items()}
    bleu = sacrebleu.BLEU(tokenize="zh")
    scores["bleu4"] = _corpus(bleu, texts, references, draws)
    scores["chrf"] = _corpus(sacrebleu.CHRF(), texts, references, draws)
    return scores


def _mean(values: np.ndarray, draws: np.ndarray) -> Score:
    low, high = np.percentile(values[draws].mean(1), CONFIDENCE)
    return Score(float(values.mean()), float(low), float(high))


def _corpus(metric, texts: Sequence[str], references: Sequence[str], draws: np.ndarray) -> Score:
    """A corpus score adds up counts of rows; a resample adds up those of its rows."""
    counts = np.array(metric._extract_corpus_statistics(texts, [references]))  # (rows, counts)
    resampled = [metric._compute_score_from_stats(counts[draw].sum(0).tolist()).score for draw in draws]
    low, high = np.percentile(resampled, CONFIDENCE)
    return Score(metric.corpus_score(texts, [references]).score, float(low), float(high))
