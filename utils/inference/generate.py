"""The batch inference behind both inference scripts: rows of prompts -> rows of answers."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.common.errors import RunError
from utils.common.processes import is_main_process, print_once, process_rank
from utils.distributed.collectives import barrier, gather_from_all, gather_lists
from utils.inference.answer_writer import Answer, AnswerFile
from utils.inference.batch_sizing import BatchGroup, MemoryBudget, group_rows
from utils.inference.engine import can_serve
from utils.inference.engine.prefill import TokenSequence
from utils.inference.engine_generate import EngineStats, generate_by_engine
from utils.inference.hf_generate import generate_plainly
from utils.inference.prompt_reader import BASE, PromptRow
from utils.inference.sampling import GREEDY, Sampling
from utils.inference.stop_strings import StopStrings, decode
from utils.inference.work_queue import SINGLE_REPLICA, Replica, SharedCount, share_of_rows
from utils.models.templates import ChatTemplate

REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class AnswerSettings:
    """What decides an answer beside model and prompt; `sequences` is how many are sampled of a row."""

    max_new_tokens: int = 512
    sampling: Sampling = GREEDY
    sequences: int = 1
    stop: tuple[str, ...] = ()  # texts that end an answer and are no part of it
    adapters: tuple[str, ...] = ()  # names of several, in the order in which the model has them


@dataclass(frozen=True)
class Job:
    """What to answer, how, where the answers go, and those that are known, by index."""

    template: ChatTemplate
    requests: list[PromptRow]
    settings: AnswerSettings
    output: AnswerFile
    known: dict[int, Answer]
    batch_size: int


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    requests: Sequence[PromptRow],
    batch_size: int,
    max_new_tokens: int,
    device: torch.device,
    settings: AnswerSettings | None = None,
    replica: Replica = SINGLE_REPLICA,
    clock: EngineStats | None = None,
) -> Iterator[Answer]:
    """
    The answers of this replica's share of the requests, in the order in which they are done; greedy unless `settings`
    say otherwise.

    A model that lies on one device, whole or as this process's shard, is served by the engine, one that is spread over
    devices or offloaded by transformers' `generate`. Short prompts come first. Where memory does not suffice, fewer
    rows share a batch from there on, and a row that finds none alone is a row with an error.

    Raises:
        RankError: the memory of a process that holds a part of the model does not suffice, which others do not know.

    Args:
        batch_size: rows at once; 0 is as many as fit.
        max_new_tokens: of an answer, where there are no `settings`.
        device: where inputs go.
        clock: takes what time was needed for.

    Yields `{"index", "prompt", "answer", "finish_reason", "prompt_tokens", "answer_tokens"}`, where `finish_reason`
    is "stop" when the model or a stop text ended the answer and "length" when `max_new_tokens` did, with "adapter"
    where there are several, and with "answers", all of them, where a row has several; or `{"index", "prompt",
    "answer": None, "finish_reason": "error", "error"}` for a row that cannot be answered.
    """
    settings = settings or AnswerSettings(max_new_tokens)
    clock = clock or EngineStats()
    if replica.first and process_rank() == 0:
        yield from (error_answer(request, request.error) for request in requests if request.error)
    valid = sorted((request for request in requests if not request.error), key=lambda r: len(r.input_ids))
    if not valid:
        return
    by_index = {request.index: request for request in valid}
    end = StopStrings(tokenizer, settings.stop)
    numbers = {name: i for i, name in enumerate(settings.adapters, start=1)} | {BASE: 0, None: 0}
    tasks = [  # a list a row: all its answers are one replica's
        [
            TokenSequence(
                request.index * settings.sequences + sequence,
                request.input_ids,
                settings.max_new_tokens,
                numbers[request.adapter],
            )
            for sequence in range(settings.sequences)
        ]
        for request in valid
    ]
    stop_ids = template.stop_ids(tokenizer)
    room = MemoryBudget.of(model, device, replica)
    tried = [row for row in tasks if not room.strict or room.slots(row[0])]

    def serve(group: BatchGroup) -> Iterator[TokenSequence]:
        source = chain.from_iterable(share_of_rows(group.rows, replica))
        if can_serve(model):
            return generate_by_engine(model, source, group, stop_ids, settings.sampling, end, replica, clock)
        sampling, sizes = settings.sampling, clock.batch_sizes
        return generate_plainly(
            model, source, group.slots, stop_ids, tokenizer.pad_token_id, sampling, end, device, sizes
        )

    groups = group_rows(tried, room, batch_size, replica.replicas)
    refused = chain.from_iterable(share_of_rows(tasks[len(tried) :], replica))  # the longest
    parts: dict[int, list[TokenSequence]] = {}
    failed: set[int] = set()
    for task in chain(chain.from_iterable(map(serve, groups)), refused):
        request = by_index[task.number // settings.sequences]
        if request.index in failed:
            continue
        if not task.answer_ids:
            failed.add(request.index)
            yield error_answer(request, f"no memory for a prompt of {len(request.input_ids)} tokens and its answer")
            continue
        parts.setdefault(request.index, []).append(task)
        if len(parts[request.index]) == settings.sequences:
            tasks_of_row = sorted(parts.pop(request.index), key=lambda task: task.number)
            yield _answer_of(request, tasks_of_row, tokenizer, template, set(stop_ids), end)


def error_answer(request: PromptRow, error: str) -> Answer:
    return {
        "index": request.index,
        "prompt": request.prompt,
        "answer": None,
        "finish_reason": "error",
        "error": error,
    }


def _answer_of(request, tasks, tokenizer, template, stop_ids: set[int], end: StopStrings) -> Answer:
    parts = []
    for task in tasks:
        by_token = task.answer_ids[-1] in stop_ids
        text = decode(tokenizer, task.answer_ids[:-1] if by_token else task.answer_ids)
        answer = end.cut(text)
        parts.append(
            {
                "answer": template.clean(answer),
                "finish_reason": "stop" if by_token or answer != text else "length",
                "answer_tokens": len(task.answer_ids),
            }
        )
    adapter = {} if request.adapter is None else {"adapter": request.adapter}
    return {
        "index": request.index,
        "prompt": request.prompt,
        "answer": parts[0]["answer"],
        "finish_reason": parts[0]["finish_reason"],
        "prompt_tokens": len(request.input_ids),
        "answer_tokens": sum(part["answer_tokens"] for part in parts),
        **adapter,
        **({"answers": parts} if len(parts) > 1 else {}),
    }


class Progress:
    """How far all replicas are: a bar on a terminal, a line every few seconds elsewhere; on the main process."""

    def __init__(self, rows: int, replica: Replica):
        self.rows, self.started = rows, time.perf_counter()
        self.done, self.tokens = SharedCount("done", replica), SharedCount("tokens", replica)
        self.said = self.started
        shows = is_main_process() and sys.stderr.isatty()
        self.bar = tqdm(total=rows, unit="row", dynamic_ncols=True) if shows else None

    def add(self, answer: Answer) -> None:
        done, tokens = self.done.add(1), self.tokens.add(answer.get("answer_tokens", 0))
        now = time.perf_counter()
        seconds = now - self.started
        if self.bar is not None:
            self.bar.set_postfix_str(f"{tokens / seconds:,.0f} tokens/s", refresh=False)
            self.bar.update(done - self.bar.n)
        elif now - self.said > REPORT_SECONDS or done == self.rows:
            self.said = now
            left = seconds / done * (self.rows - done)
            print_once(
                f"{done}/{self.rows} rows, {done / seconds:,.1f} rows/s, {tokens / seconds:,.0f} tokens/s, "
                f"{left // 60:.0f}:{left % 60:02.0f} left"
            )

    def close(self) -> None:
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
    Answers the job's requests into its output, those alone that an earlier run of the same command has not answered,
    and prints a summary whose last line is JSON. Every process takes part.

    Raises:
        RunError: on every process: more than half of the rows could not be answered; the output is complete.
    """
    requests, known, output = job.requests, job.known, job.output
    output.open()
    waiting = [request for request in requests if request.index not in known]
    if known:
        print_once(f"{len(known)} of {len(requests)} rows were answered before: {len(waiting)} are left")
    positions = model.config.max_position_embeddings  # of ChatGLM-6B too, by its attribute map
    if longer := sum(len(request.input_ids) > positions for request in waiting):
        print_once(f"{longer} prompts have more than the {positions} tokens that the model was made for")
    clock, started = EngineStats(), time.perf_counter()
    answers: list[Answer] = []
    progress = Progress(len(waiting), replica)
    settings = job.settings
    done = generate_answers(
        model,
        tokenizer,
        job.template,
        waiting,
        job.batch_size,
        settings.max_new_tokens,
        device,
        settings,
        replica,
        clock,
    )
    for answer in done:
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
    clocks = gather_from_all(clock)
    if is_main_process():
        output.finish(sorted([*known.values(), *answers], key=lambda answer: answer["index"]))
        _print_summary(job, answers, clocks, seconds)
    barrier()
    output.end()
    if 2 * failed > len(requests):
        raise RunError(
            f"{failed} of {len(requests)} rows could not be answered: {output.path} is complete and says why in their "
            '"error"'
        )


def _print_summary(job: Job, answers: list[Answer], clocks: list[EngineStats], seconds: float) -> None:
    """Of the answers that are new, as JSON."""
    new_tokens = sum(answer.get("answer_tokens", 0) for answer in answers)
    preparing, reading = mean(clock.preparing for clock in clocks), mean(clock.reading for clock in clocks)
    working = seconds - preparing
    batch_sizes = clocks[0].batch_sizes
    summary = {
        "output_path": str(job.output.path),
        "rows": len(job.requests),
        "errors": sum(answer["finish_reason"] == "error" for answer in answers),
        "answered_before": len(job.known),
        "batch_size": batch_sizes[-1] if batch_sizes else 0,
        "new_tokens": new_tokens,
        "prompt_tokens": sum(answer.get("prompt_tokens", 0) for answer in answers),
        "seconds": round(working, 2),
        "preparation_seconds": round(preparing, 2),
        "reading_seconds": round(reading, 2),
        "new_tokens_per_second": round(new_tokens / working, 1),
        "finish_reasons": _count(answer["finish_reason"] for answer in answers),
    }
    print(json.dumps(summary), flush=True)


def _count(values: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def settings_of(settings: AnswerSettings, **others: Any) -> dict[str, Any]:
    """As JSON has it, for `AnswerFile`."""
    return asdict(settings) | others
