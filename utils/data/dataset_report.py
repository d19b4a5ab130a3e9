"""
Reports on a tokenised dataset: counts of rows and tokens, lengths, advice on --max_seq_length, and a preview.

utils/data/shards.py counts each shard; tokenize_dataset_rows_belle.py adds the counts, prints them, and writes
report.json and report.png.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from utils.common.console import DIM, TRAINED, print_line, print_styled
from utils.data.encode import Example
from utils.models.token_spans import IGNORE_INDEX

ROUND_LENGTHS = (256, 384, 512, 768, *(1024 * n for n in range(1, 129)))  # limits to suggest
SUGGESTED_LOSS = 0.05  # largest share of rows that may exceed a suggested limit
REPORT_FILE, LENGTHS_FIGURE_FILE = "report.json", "report.png"
KEPT_SHARE = 0.99  # of the rows, which the advised --max_seq_length keeps whole
TRAINED_MARKS = ("⟦", "⟧")  # around trained tokens in a preview; no ordinary text has them


@dataclass
class TokenReport:
    """
    Counts of rows and tokens.

    `lengths` counts rows by their tokens before they are cut or skipped. The field names are keys of report.json and
    of the summary that the script prints.
    """

    read: int = 0
    written: int = 0
    rejected: int = 0
    skipped_overlength: int = 0
    cut: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    lengths: Counter = field(default_factory=Counter)

    def add(self, other: "TokenReport") -> None:
        """Add the counts of another report."""
        for name, value in vars(other).items():
            if name == "lengths":
                self.lengths.update(value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def counts(self) -> dict[str, int]:
        """All counts except `lengths`."""
        return {name: value for name, value in asdict(self).items() if name != "lengths"}

    def length_for(self, share: float) -> int:
        """Smallest limit that keeps `share` of the rows; 0 without rows."""
        total, seen = sum(self.lengths.values()), 0
        for length in sorted(self.lengths):
            seen += self.lengths[length]
            if seen >= share * total:
                return length
        return 0

    def share_within(self, length: int) -> float:
        """The share of rows of at most `length` tokens."""
        within = sum(count for tokens, count in self.lengths.items() if tokens <= length)
        return within / max(sum(self.lengths.values()), 1)

    def advice(self, max_seq_length: int) -> str:
        """The share of rows that the limit keeps, and a better limit."""
        kept, needed = self.share_within(max_seq_length), self.length_for(KEPT_SHARE)
        fits = f"--max_seq_length {max_seq_length} keeps {kept:.1%} of the rows whole"
        if kept < KEPT_SHARE:
            return f"{fits}; --max_seq_length {needed} would keep {KEPT_SHARE:.0%}"
        if needed <= 0.75 * max_seq_length:
            return f"{fits}; {KEPT_SHARE:.0%} would fit --max_seq_length {needed} already"
        return fits

    def describe_overlength(self, max_seq_length: int) -> str:
        """
        The number of rows that the limit affects, and a better limit.

        "" if no row is too long.
        """
        longer = self.skipped_overlength + self.cut
        if not longer:
            return ""
        total = sum(self.lengths.values())
        left_out, leave_out = ("left out", "leave out") if self.skipped_overlength else ("cut", "cut")
        sentence = f"{longer} of {total} rows ({100 * longer / total:.3g} %) are longer than --max_seq_length"
        sentence = f"{sentence} {max_seq_length} and were {left_out}"
        better = next(
            (n for n in ROUND_LENGTHS if n > max_seq_length and self.share_within(n) >= 1 - SUGGESTED_LOSS), None
        )
        if better is None or longer <= SUGGESTED_LOSS * total:
            return sentence
        share = 100 * (1 - self.share_within(better))
        return f"{sentence}; --max_seq_length {better} would {leave_out} {f'{share:.3g} %' if share else 'none'}"

    def facts(self, max_seq_length: int) -> dict[str, str]:
        """The report as facts to print, by name."""
        share = self.trained_tokens / max(self.tokens, 1)
        cut = f"; {self.cut:,} were cut" if self.cut else ""
        return {
            "rows": f"read {self.read:,} = written {self.written:,} + rejected {self.rejected:,} "
            f"+ skipped {self.skipped_overlength:,} (longer than {max_seq_length} tokens){cut}",
            "tokens": f"{self.tokens:,}, {self.trained_tokens:,} of them ({share:.1%}) trained on; "
            f"{self.tokens / max(self.written, 1):.1f} a row; longest row {max(self.lengths, default=0):,}",
            "lengths": self.describe_lengths(max_seq_length).replace("; ", "\n"),
        }

    def describe_lengths(self, max_seq_length: int) -> str:
        """The rows that the limit affects, or the share that it keeps; and a better limit if there is one."""
        overlength, advice = self.describe_overlength(max_seq_length), self.advice(max_seq_length)
        if not overlength:
            return advice
        better = advice.partition("; ")[2]
        return overlength if "; " in overlength or not better else f"{overlength}; {better}"

    def dump(self, max_seq_length: int) -> dict:
        """Content of report.json but its key; `lengths` as [tokens, rows] pairs."""
        return {
            **self.counts(),
            "max_seq_length": max_seq_length,
            "trained_share": self.trained_tokens / max(self.tokens, 1),
            "max_seq_length_for_99_percent": self.length_for(KEPT_SHARE),
            "advice": self.advice(max_seq_length),
            "lengths": sorted(self.lengths.items()),
        }

    @classmethod
    def load(cls, content: dict) -> "TokenReport":
        """The report from the content of report.json."""
        counts = {name: content[name] for name in cls().counts()}
        return cls(**counts, lengths=Counter(dict(content["lengths"])))

    def save(self, directory: Path, max_seq_length: int, key: str) -> None:
        """Write report.json, with the `cache_key` of the dataset, and report.png."""
        content = {"key": key, **self.dump(max_seq_length)}
        (directory / REPORT_FILE).write_text(json.dumps(content), encoding="utf-8")
        self.draw(directory / LENGTHS_FIGURE_FILE, max_seq_length)

    def draw(self, path: Path, max_seq_length: int) -> None:
        """Draw a histogram of the rows' lengths, the limit and the counts."""
        Figure, FigureCanvasAgg = import_matplotlib()
        figure = Figure(figsize=(9, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        # A few very long rows would squeeze all others into one bar.
        end = max(max_seq_length * 1.1, self.length_for(0.995) * 1.1, 10)
        lengths = [min(length, end) for length in self.lengths]
        axes.hist(lengths, bins=60, range=(0, end), weights=list(self.lengths.values()), color="#4878a8")
        axes.axvline(max_seq_length, color="#c03030", label=f"--max_seq_length {max_seq_length}")
        axes.set(xlabel="tokens a row before it is cut (last bar: and more)", ylabel="rows", xlim=(0, end))
        title = "\n".join(f"{name}: {fact}" for name, fact in self.facts(max_seq_length).items())
        axes.set_title(title, fontsize=8, loc="left")
        axes.legend()
        figure.savefig(path, dpi=100)


def import_matplotlib() -> tuple[type, type]:
    """matplotlib's Figure and canvas classes; the first call takes half a second."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return Figure, FigureCanvasAgg


def print_preview(tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example]) -> None:
    """Print each example as text, its trained tokens in TRAINED_MARKS and in colour."""
    for number, example in enumerate(examples, start=1):
        tokens = f"{len(example.input_ids)} tokens"
        print_line(f"--- row {number}: {tokens}; trained on between {' and '.join(TRAINED_MARKS)}", DIM)
        runs: list[tuple[bool, list[int]]] = []
        for token, label in zip(example.input_ids, example.labels, strict=True):
            trained = label != IGNORE_INDEX
            if not runs or runs[-1][0] != trained:
                runs.append((trained, []))
            runs[-1][1].append(token)
        texts = [(tokenizer.decode(ids), trained) for trained, ids in runs]
        print_styled([(text.join(TRAINED_MARKS), TRAINED) if trained else (text, None) for text, trained in texts])
