"""
Score answers against references, each score with a confidence interval.

Exact match, BLEU-4, chrF, ROUGE, lengths. Called by tools/evaluate.py. BLEU and chrF are sacrebleu's, ROUGE is
rouge_score's on jieba's words; only the bootstrap is ours, for neither library resamples rows for all of them.
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from utils.common.code_caches import user_cache
from utils.common.errors import UsageError

try:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        import jieba
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer
except ImportError as error:
    raise UsageError(f"{error.name} is not installed: pip install -r tools/requirements.txt") from None

jieba.setLogLevel(logging.WARNING)
jieba.dt.tmp_dir = str(user_cache("jieba"))  # of its parsed dictionary; the default, /tmp, anybody can write to
ROUGE = ("rouge1", "rouge2", "rougeL")
PERCENTILES = (2.5, 97.5)  # ends of the 95% interval
RESAMPLES = 1000


class JiebaWords:
    """The tokenizer for rouge_score, whose own keeps only Latin letters and digits."""

    def tokenize(self, text: str) -> list[str]:
        """Return jieba's words, without blanks."""
        return [word for word in jieba.lcut(text) if word.strip()]


@dataclass(frozen=True)
class Score:
    """A score and the ends of its 95% interval, by bootstrap over rows; `rows` are the rows' own, if they have any."""

    value: float
    low: float
    high: float
    rows: tuple[float, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def score_answers(answers: Sequence[dict[str, Any]], references: Sequence[str], seed: int = 0) -> dict[str, Score]:
    """
    Return scores by name: in percent, except the means `answer_tokens`, `answer_characters`, `reference_characters`.

    BLEU-4 (zh tokenisation) and chrF are those of the corpus; ROUGE-1/2/L is the mean F1.

    Args:
        answers: lines of an answer file, in the order of `references`; one with an error counts as empty.
        seed: of the bootstrap.
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
    low, high = np.percentile(values[draws].mean(1), PERCENTILES)
    return Score(float(values.mean()), float(low), float(high), tuple(values.tolist()))


def _corpus(metric, texts: Sequence[str], references: Sequence[str], draws: np.ndarray) -> Score:
    """Resample a corpus score by the counts of its rows, which add up to it."""
    counts = np.array(metric._extract_corpus_statistics(texts, [references]))  # (rows, counts)
    resampled = [metric._compute_score_from_stats(counts[draw].sum(0).tolist()).score for draw in draws]
    low, high = np.percentile(resampled, PERCENTILES)
    return Score(metric.corpus_score(texts, [references]).score, float(low), float(high))
