"""
The job behind both inference scripts: rows of prompts in, journal, output file and summary out.

`utils/inference/job.py` opens a `Job` and calls `answer_rows`; every process of the run takes part. Answers come from
`BatchGenerator`.
"""

import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.common.errors import RunError
from utils.common.processes import is_main_process, print_once
from utils.distributed.collectives import barrier, gather_from_all, gather_lists
from utils.inference.answer_writer import Answer, AnswerFile
from utils.inference.batch_generator import AnswerSettings, BatchGenerator, PromptCodec
from utils.inference.engine_generate import EngineStats
from utils.inference.prompt_reader import PromptRow
from utils.inference.work_queue import SINGLE_REPLICA, Replica, SharedCount
from utils.models.templates import ChatTemplate

REPORT_SECONDS = 10.0  # between two lines of progress where there is no terminal


@dataclass(frozen=True)
class Job:
    """What to answer, how, where the answers go, and those known from an earlier run, by index."""

    template: ChatTemplate
    requests: list[PromptRow]
    settings: AnswerSettings
    output: AnswerFile
    known: dict[int, Answer]
    batch_size: int


def settings_of(settings: AnswerSettings, **others: Any) -> dict[str, Any]:
    """Return the settings as `AnswerFile` records them in journals, with what else decides an answer."""
    return asdict(settings) | others


class Progress:
    """Progress of all replicas, on the main process: a bar on a terminal, else a line every few seconds."""

    def __init__(self, rows: int, replica: Replica):
        self.rows, self.started = rows, time.perf_counter()
        self.done, self.tokens = SharedCount("done", replica), SharedCount("tokens", replica)
        self.reported = self.started
        has_bar = is_main_process() and sys.stderr.isatty()
        self.bar = tqdm(total=rows, unit="row", dynamic_ncols=True) if has_bar else None

    def add(self, answer: Answer) -> None:
        """Count one more answer, and print the progress if it is time."""
        done, tokens = self.done.add(1), self.tokens.add(answer.get("answer_tokens", 0))
        now = time.perf_counter()
        seconds = now - self.started
        if self.bar is not None:
            self.bar.set_postfix_str(f"{tokens / seconds:,.0f} tokens/s", refresh=False)
            self.bar.update(done - self.bar.n)
        elif now - self.reported > REPORT_SECONDS or done == self.rows:
            self.reported = now
            remaining = seconds / done * (self.rows - done)
            print_once(
                f"{done}/{self.rows} rows, {done / seconds:,.1f} rows/s, {tokens / seconds:,.0f} tokens/s, "
                f"{remaining // 60:.0f}:{remaining % 60:02.0f} left"
            )

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()


def answer_rows(
    job: Job,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    replica: Replica = SINGLE_REPLICA,
) -> None:
    """
    Answer the rows that an earlier run of the same command has not, and print a summary whose last line is JSON.

    Every process must call it.

    Args:
        model: see `BatchGenerator`.
        device: where inputs go.

    Raises:
        RunError: on every process: more than half of the rows could not be answered; the output is complete.
    """
    output = job.output
    output.open()
    pending = [row for row in job.requests if row.index not in job.known]
    if job.known:
        print_once(f"{len(job.known)} of {len(job.requests)} rows were answered before: {len(pending)} are left")
    positions = model.config.max_position_embeddings  # ChatGLM-6B has it by its attribute map
    if longer := sum(len(row.input_ids) > positions for row in pending):
        print_once(f"{longer} prompts have more than the {positions} tokens that the model was made for")
    started = time.perf_counter()
    generator = BatchGenerator(model, PromptCodec(tokenizer, job.template), job.settings, device, replica)
    progress = Progress(len(pending), replica)
    answers: list[Answer] = []
    for answer in generator.run(pending, job.batch_size):
        if replica.first:
            if answer["finish_reason"] != "error":
                output.add(answer)
            answers.append(answer)
            progress.add(answer)
    progress.close()
    output.close()
    failed = sum(gather_from_all(sum(answer["finish_reason"] == "error" for answer in answers)))
    answers = gather_lists(answers)
    seconds = time.perf_counter() - started
    stats = gather_from_all(generator.stats)
    if is_main_process():
        output.finish(sorted([*job.known.values(), *answers], key=lambda answer: answer["index"]))
        print(json.dumps(summarise(job, answers, stats, seconds)), flush=True)
    barrier()
    output.end()
    if 2 * failed > len(job.requests):
        raise RunError(
            f"{failed} of {len(job.requests)} rows could not be answered: {output.path} is complete and says why in "
            'their "error"'
        )


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
