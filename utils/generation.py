"""The batch inference engine behind both inference scripts: rows of prompts -> rows of answers."""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from utils.batching import left_pad
from utils.checkpoint import DEFAULT_MODEL
from utils.distributed import is_main_process, print_once
from utils.errors import UsageError
from utils.jsonl import atomic_writer, dump_row
from utils.lora import read_origin
from utils.prompts import TEMPLATES, ChatGLMTemplate, encode_prompt, template_for
from utils.rows import RowError, parse_prompt, read_rows

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_PROMPTS = "data/sample_prompts.jsonl"
DEFAULT_ANSWERS = "output/answers.jsonl"


def add_inference_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that both inference scripts share."""
    parser.add_argument(
        "--model_name_or_path", default=DEFAULT_MODEL, help="checkpoint directory or hub id (%(default)s)"
    )
    parser.add_argument("--adapter_path", help="PEFT directory saved by the training")
    parser.add_argument("--input_path", default=DEFAULT_PROMPTS, help="JSON Lines or JSON array of rows (%(default)s)")
    parser.add_argument("--output_path", default=DEFAULT_ANSWERS, help="JSON Lines, one a row (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts answered at once (%(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="tokens of an answer (%(default)s)")
    parser.add_argument(
        "--template", choices=TEMPLATES, help="form of the prompts (the one the adapter was trained with, else native)"
    )
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--fp16", action="store_true", help="float16 weights: the default on a GPU")
    precision.add_argument("--bf16", action="store_true", help="bfloat16 weights")
    precision.add_argument("--fp32", action="store_true", help="float32 weights: the default without a GPU")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it


def check_inference_arguments(args: argparse.Namespace) -> None:
    """
    Raises:
        UsageError: a size is below 1.
    """
    for name in ("batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)} must be at least 1")


def resolve_dtype(args: argparse.Namespace) -> torch.dtype:
    """The weights' dtype; float16 needs a GPU, and a line says so where there is none."""
    gpu = torch.cuda.is_available()
    if args.fp32 or args.bf16:
        dtype, why = torch.float32 if args.fp32 else torch.bfloat16, "flag"
    elif gpu:
        dtype, why = torch.float16, "flag" if args.fp16 else "default on a GPU"
    else:
        dtype, why = torch.float32, "--fp16 needs a GPU and there is none" if args.fp16 else "default without a GPU"
    print_once(f"weights {str(dtype).removeprefix('torch.')} ({why})")
    return dtype


def resolve_template(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> ChatGLMTemplate:
    """The flag decides; without it, what the adapter was trained with; without an adapter, the model's own."""
    name, why = args.template, "flag"
    if name is None:
        origin = read_origin(args.adapter_path) if args.adapter_path else None
        name, why = (origin.template, "the adapter's") if origin else ("native", "default")
    print_once(f"template {name} ({why})")
    return template_for(tokenizer, name)


@dataclass(frozen=True)
class Request:
    """One input row: its prompt as text and tokens, or why it has none."""

    index: int
    prompt: str | None
    input_ids: list[int]
    error: str | None = None


def read_requests(input_path: str, tokenizer: PreTrainedTokenizerBase, template: ChatGLMTemplate) -> list[Request]:
    """
    Raises:
        UsageError: no such file, or no rows in it.
    """
    requests = []
    for index, (_, number, row) in enumerate(read_rows(input_path, parse_prompt)):
        if isinstance(row, RowError):
            requests.append(Request(index, None, [], error=f"{input_path}:{number}: {row}"))
        else:
            input_ids = encode_prompt(tokenizer, row.messages, template)
            requests.append(Request(index, template.render(row.messages), input_ids))
    if not requests:
        raise UsageError(f"--input_path {input_path} has no rows")
    return requests


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatGLMTemplate,
    requests: list[Request],
    batch_size: int,
    max_new_tokens: int,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """
    Greedy answers, one a request, in the order in which they are done: prompts of like length share a batch.

    Yields `{"index", "prompt", "answer", "finish_reason", "prompt_tokens", "answer_tokens"}`, where `finish_reason`
    is "stop" when the model ended the answer and "length" when `max_new_tokens` did; or `{"index", "prompt",
    "answer": None, "finish_reason": "error", "error"}` for a row that has no prompt.
    """
    for request in requests:
        if request.error:
            yield {
                "index": request.index,
                "prompt": request.prompt,
                "answer": None,
                "finish_reason": "error",
                "error": request.error,
            }
    stop_ids = set(template.stop_ids(tokenizer))
    waiting = sorted((request for request in requests if not request.error), key=lambda r: len(r.input_ids))
    for start in range(0, len(waiting), batch_size):
        batch = waiting[start : start + batch_size]
        inputs = left_pad([request.input_ids for request in batch], tokenizer.pad_token_id)
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=template.stop_ids(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
        new_ids = output[:, inputs["input_ids"].shape[1] :].tolist()
        for request, ids in zip(batch, new_ids, strict=True):
            end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
            stopped = end is not None
            ids = ids[:end]
            yield {
                "index": request.index,
                "prompt": request.prompt,
                "answer": template.clean(decode(tokenizer, ids)),
                "finish_reason": "stop" if stopped else "length",
                "prompt_tokens": len(request.input_ids),
                "answer_tokens": len(ids) + stopped,
            }


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of generated tokens. The embedding has rows that the tokenizer does not use; they have no text."""
    return tokenizer.decode([i for i in ids if i < len(tokenizer)], skip_special_tokens=True)


def answer_file(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, device: torch.device
) -> None:
    """
    Answers the rows of `args.input_path` into `args.output_path`, one line a row in input order, and prints a summary
    whose last line is JSON. Every process takes part; the main process writes.
    """
    template = resolve_template(args, tokenizer)
    requests = read_requests(args.input_path, tokenizer, template)
    started = time.perf_counter()
    answers: list[dict[str, Any] | None] = [None] * len(requests)
    done = generate_answers(model, tokenizer, template, requests, args.batch_size, args.max_new_tokens, device)
    for count, answer in enumerate(done, start=1):
        answers[answer["index"]] = answer
        if count % args.batch_size == 0 or count == len(requests):
            print_once(f"{count}/{len(requests)} rows")
    seconds = time.perf_counter() - started
    if not is_main_process():
        return
    with atomic_writer(args.output_path) as output:
        output.writelines(dump_row(answer) for answer in answers)
    new_tokens = sum(answer.get("answer_tokens", 0) for answer in answers)
    summary = {
        "output_path": args.output_path,
        "rows": len(answers),
        "errors": sum(answer["finish_reason"] == "error" for answer in answers),
        "new_tokens": new_tokens,
        "seconds": round(seconds, 2),
        "new_tokens_per_second": round(new_tokens / seconds, 1),
    }
    print(json.dumps(summary, ensure_ascii=False), flush=True)
