"""
The job behind both inference scripts: rows of prompts in, journal, output file and summary out.

`utils/inference/job.py` opens a `Job` and calls `answer_rows`; every process of the run takes part. Answers come from
`BatchGenerator`, lines for a person from `run_report.py`.
"""

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.common.console import Progress
from utils.common.processes import is_main_process
from utils.distributed.collectives import barrier, gather_from_all, gather_lists
from utils.inference.answer_writer import Answer, AnswerFile
from utils.inference.batch_generator import AnswerSettings, BatchGenerator, PromptCodec
from utils.inference.batch_sizing import BatchPlan
from utils.inference.engine_generate import EngineStats
from utils.inference.prompt_reader import PromptRow
from utils.inference.run_report import print_placement
from utils.inference.work_queue import SINGLE_REPLICA, Replica, SharedCount
from utils.models.templates import ChatTemplate

SHARE_SECONDS = 0.5  # between two messages of a replica about its progress
WAIT_SECONDS = 0.05  # between two looks at that of the others, which delays the end by as much


@dataclass(frozen=True)
class Job:
    """What to answer, how, where the answers go, and those known from an earlier run, by index."""

    template: ChatTemplate
    requests: list[PromptRow]
    settings: AnswerSettings
    output: AnswerFile
    known: dict[int, Answer]
    batch_size: int
    began: float = field(default_factory=time.monotonic)  # before the model was loaded


def settings_of(settings: AnswerSettings, **others: Any) -> dict[str, Any]:
    """Return the settings as `AnswerFile` records them in journals, with what else decides an answer."""
    return asdict(settings) | others


class JobProgress:
    """
    Progress of all replicas, shown by rank 0.

    Each replica counts its own answers, and adds them to the shared counts a few times a second.
    """

    def __init__(self, rows: int, known: int, replica: Replica):
        self.bar = Progress("answering", rows, "rows", known)
        self.known, self.replica = known, replica
        self.done, self.tokens = SharedCount("done", replica), SharedCount("tokens", replica)
        self.rows = self.new_tokens = 0  # not yet shared
        self.began = self.shared = time.monotonic()

    def add(self, answer: Answer) -> None:
        """Count one more answer."""
        self.rows += 1
        self.new_tokens += answer.get("answer_tokens", 0)
        if time.monotonic() - self.shared >= SHARE_SECONDS:
            self.share()

    def share(self) -> None:
        """Add this replica's counts to those of all, and show the sums."""
        done, tokens = self.done.add(self.rows), self.tokens.add(self.new_tokens)
        self.rows = self.new_tokens = 0
        self.shared = time.monotonic()
        seconds = self.shared - self.began
        self.bar.advance(self.known + done - self.bar.done, f"{tokens / max(seconds, 1e-9):,.0f} new tokens/s")

    def wait_for_others(self) -> None:
        """Share the last counts; on rank 0 also show those of the other replicas until all rows are answered."""
        self.share()
        while is_main_process() and self.bar.done < self.bar.total:
            time.sleep(WAIT_SECONDS)
            self.share()


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its summary, {} on other ranks than 0, and how many rows have no answer, on all."""

    summary: dict[str, Any]
    failed: int


def answer_rows(
    job: Job,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    replica: Replica = SINGLE_REPLICA,
) -> Outcome:
    """
    Answer the rows that an earlier run of the same command has not, and write the output.

    Every process must call it.

    Args:
        model: see `BatchGenerator`.
        device: where inputs go.
    """
    output = job.output
    output.open()
    pending = [row for row in job.requests if row.index not in job.known]
    answered, ready = (len(job.known), len(job.requests)), time.monotonic()

    def show(plan: BatchPlan) -> None:
        print_placement(model, replica, str(plan), answered, ready - job.began)

    started = time.perf_counter()
    generator = BatchGenerator(model, PromptCodec(tokenizer, job.template), job.settings, device, replica)
    progress = JobProgress(len(job.requests), len(job.known), replica)
    answers: list[Answer] = []
    with progress.bar.shown():
        for answer in generator.run(pending, job.batch_size, show):
            if replica.first:
                if answer["finish_reason"] != "error":
                    output.add(answer)
                answers.append(answer)
                progress.add(answer)
        if replica.first:
            progress.wait_for_others()
    output.close()
    failed = sum(gather_from_all(sum(answer["finish_reason"] == "error" for answer in answers)))
    answers = gather_lists(answers)
    seconds = time.perf_counter() - started
    stats = gather_from_all(generator.stats)
    summary = {}
    if is_main_process():
        output.finish(sorted([*job.known.values(), *answers], key=lambda answer: answer["index"]))
        summary = summarise(job, answers, stats, seconds)
    barrier()
    output.end()
    return Outcome(summary, failed)


def summarise(job: Job, answers: list[Answer], stats: list[EngineStats], seconds: float) -> dict[str, Any]:
    """
    Return the summary of a run.

    Args:
        answers: of this run alone.
        stats: of each process.
        seconds: from the first row to the last; "seconds" in the summary leaves out compiling.
    """
    new_tokens = sum(answer.get("answer_tokens", 0) for answer in answers)
    compile_seconds = mean(process.compile_seconds for process in stats)
    prefill_seconds = round(mean(process.prefill_seconds for process in stats), 2)
    working = seconds - compile_seconds
    batch_sizes = stats[0].batch_sizes
    return {
        "output_path": str(job.output.path),
        "rows": len(job.requests),
        "errors": sum(answer["finish_reason"] == "error" for answer in answers),
        "answered_before": len(job.known),
        "batch_size": batch_sizes[-1] if batch_sizes else 0,
        "new_tokens": new_tokens,
        "prompt_tokens": sum(answer.get("prompt_tokens", 0) for answer in answers),
        "seconds": round(working, 2),
        "compile_seconds": round(compile_seconds, 2),
        "preparation_seconds": round(compile_seconds, 2),  # its name before; for those who parse it
        "prefill_seconds": prefill_seconds,
        "reading_seconds": prefill_seconds,  # its name before
        "new_tokens_per_second": round(new_tokens / working, 1),
        "finish_reasons": dict(Counter(answer["finish_reason"] for answer in answers)),
    }
