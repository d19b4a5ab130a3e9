"""The batch inference behind both inference scripts: rows of prompts -> rows of answers."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from statistics import mean
from typing import Any

from utils.answer_files import Answer, AnswerFile
from utils.answer_text import TextEnd, decode
from utils.distributed import barrier, gather_from_all, gather_lists, is_main_process, print_once, process_rank
from utils.engine import Engine, can_serve, column_bytes
from utils.errors import RunError
from utils.plain_generation import generate_plainly, halve
from utils.prompt_packing import MOST_READ, Task
from utils.prompts import ChatGLMTemplate
from utils.requests import BASE, Request
from utils.row_queue import ALONE, Replica, SharedCount, shared_out
from utils.sampling import GREEDY, Sampling

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_SLOTS = 256
CPU_SLOTS = 16
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

    template: ChatGLMTemplate
    requests: list[Request]
    settings: AnswerSettings
    output: AnswerFile
    known: dict[int, Answer]
    batch_size: int


@dataclass
class Clock:
    """Where the seconds went."""

    preparing: float = 0.0  # compiling layers, capturing graphs
    reading: float = 0.0  # prompts
    batch_sizes: list[int] = field(default_factory=list)


def fitting_slots(model: PreTrainedModel, columns: int, rows: int) -> int:
    """How many rows of `columns` tokens can be answered at once in the memory that is free."""
    device = model.get_input_embeddings().weight.device
    if device.type != "cuda":
        return min(CPU_SLOTS, rows)
    free = (
        torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    )
    config = model.config
    inner = getattr(config, "intermediate_size", 4 * config.hidden_size)
    working = MOST_READ * (6 * config.hidden_size + 3 * inner) * model.dtype.itemsize
    slots = int((0.9 * free - working) // (column_bytes(model) * columns))
    slots = max(1, min(slots, MOST_SLOTS, rows))
    return slots - slots % 16 if slots > 16 and slots < rows else slots


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatGLMTemplate,
    requests: Sequence[Request],
    batch_size: int,
    max_new_tokens: int,
    device: torch.device,
    settings: AnswerSettings | None = None,
    replica: Replica = ALONE,
    clock: Clock | None = None,
) -> Iterator[Answer]:
    """
    The answers of this replica's share of the requests, in the order in which they are done; greedy unless `settings`
    say otherwise.

    A model that lies on one device, whole or as this process's shard, is served by the engine (utils/engine.py), one
    that is spread over devices or offloaded by transformers' `generate`. Where memory does not suffice, half as many
    rows share a batch from there on; a shard's error ends the run.

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
    clock = clock or Clock()
    if replica.first and process_rank() == 0:
        yield from (error_answer(request, request.error) for request in requests if request.error)
    valid = sorted((request for request in requests if not request.error), key=lambda r: len(r.input_ids))
    if not valid:
        return
    by_index = {request.index: request for request in valid}
    end = TextEnd(tokenizer, settings.stop)
    numbers = {name: i for i, name in enumerate(settings.adapters, start=1)} | {BASE: 0, None: 0}
    tasks = [  # a list a row: all its answers are one replica's
        [
            Task(
                request.index * settings.sequences + sequence,
                request.input_ids,
                settings.max_new_tokens,
                numbers[request.adapter],
            )
            for sequence in range(settings.sequences)
        ]
        for request in valid
    ]
    longest = len(valid[-1].input_ids) + settings.max_new_tokens
    share = -(-len(tasks) // replica.replicas) * settings.sequences
    slots = min(batch_size or replica.least(fitting_slots(model, longest, share)), share)
    stop_ids = template.stop_ids(tokenizer)
    source = chain.from_iterable(shared_out(tasks, replica))
    if can_serve(model):
        done = _serve(model, source, slots, longest, stop_ids, settings, end, replica, clock)
    else:
        sizes = clock.batch_sizes
        done = generate_plainly(
            model, source, slots, stop_ids, tokenizer.pad_token_id, settings.sampling, end, device, sizes
        )
    parts: dict[int, list[Task]] = {}
    failed: set[int] = set()
    for task in done:
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


def error_answer(request: Request, error: str) -> Answer:
    return {
        "index": request.index,
        "prompt": request.prompt,
        "answer": None,
        "finish_reason": "error",
        "error": error,
    }


def _answer_of(request, tasks, tokenizer, template, stop_ids: set[int], end: TextEnd) -> Answer:
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


def _serve(
    model: PreTrainedModel,
    source: Iterable[Task],
    slots: int,
    longest: int,
    stop_ids: Sequence[int],
    settings: AnswerSettings,
    end: TextEnd,
    replica: Replica,
    clock: Clock,
) -> Iterator[Task]:
    """By the engine. A task that finds no memory even alone comes back without an answer."""
    source = iter(source)
    while True:
        clock.batch_sizes.append(slots)
        engine = None
        try:
            engine = Engine(model, slots, longest, stop_ids, settings.sampling, end.find)
            yield from engine.answer(source)
            return
        except torch.OutOfMemoryError:
            if replica.group is not None:  # the others of a sharded model do not know of it
                raise
            left = engine.unfinished() if engine else []
            slots = halve(slots)
            if slots == 0:
                yield from left[:1] or islice(source, 1)
                left, slots = left[1:], 1
            source = chain(left, source)
        finally:
            if engine:
                clock.preparing += engine.preparing
                clock.reading += engine.reading
        del engine
        torch.cuda.empty_cache()


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
    replica: Replica = ALONE,
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
    clock, started = Clock(), time.perf_counter()
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


def _print_summary(job: Job, answers: list[Answer], clocks: list[Clock], seconds: float) -> None:
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
