"""The batch inference engine behind both inference scripts: rows of prompts -> rows of answers."""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from utils.batching import left_pad
from utils.checkpoint import DEFAULT_MODEL, Checkpoint
from utils.distributed import gather_lists, is_main_process, print_once, process_rank
from utils.errors import UsageError
from utils.export import merge_and_save, read_template
from utils.jsonl import atomic_writer, dump_row
from utils.lora import check_base, load_adapter, merge_adapter, read_origin
from utils.prompts import TEMPLATES, ChatGLMTemplate, encode_prompt, template_for
from utils.quantization import BITS
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
    parser.add_argument(
        "--adapter_path",
        help="adapter: a PEFT directory, of this training or of the remote code, or a chatglm-lora.pt",
    )
    parser.add_argument("--lora_alpha", type=int, help="of a chatglm-lora.pt, which does not record it (32)")
    parser.add_argument(
        "--any_base", action="store_true", help="apply the adapter although it was trained on other weights"
    )
    parser.add_argument("--quantize", choices=BITS, help="hold the weights in 8 or 4 bits")
    parser.add_argument(
        "--merge_and_save",
        metavar="DIR",
        help="write the model with the adapter in its weights to DIR; answers rows only if --input_path is given too",
    )
    parser.add_argument("--input_path", help=f"JSON Lines or JSON array of rows ({DEFAULT_PROMPTS})")
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
        UsageError: a size is below 1, or a flag needs another that is not there.
    """
    for name in ("batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.merge_and_save and not args.adapter_path:
        raise UsageError(f"--merge_and_save {args.merge_and_save} needs an adapter to merge: give --adapter_path too")
    if args.merge_and_save and args.quantize:
        raise UsageError("--merge_and_save writes full weights: give it without --quantize")
    if args.lora_alpha is not None and not args.adapter_path:
        raise UsageError(f"--lora_alpha {args.lora_alpha} is an adapter's: give --adapter_path too")


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


def export_or_answer(args: argparse.Namespace, dtype: torch.dtype) -> bool:
    """Writes the merged checkpoint if `args` ask for it, and says whether there are rows to answer."""
    if not args.merge_and_save:
        return True
    if is_main_process():
        if not args.any_base:
            check_base(args.adapter_path, Checkpoint.open(args.model_name_or_path))
        merge_and_save(args.model_name_or_path, args.adapter_path, args.merge_and_save, dtype, args.lora_alpha)
        print(json.dumps({"merged_checkpoint": args.merge_and_save}, ensure_ascii=False), flush=True)
    return args.input_path is not None


def adapter_of(args: argparse.Namespace, merge: bool) -> Callable[[PreTrainedModel], PreTrainedModel]:
    """
    What puts the adapter of `args` on a model: into its weights with `merge`, which an offloaded model cannot take.

    Raises:
        UsageError: see `check_base`; and, from what is returned, `load_adapter`.
    """
    if not args.adapter_path:
        return lambda model: model
    if not args.any_base:
        check_base(args.adapter_path, Checkpoint.open(args.model_name_or_path))
    return lambda model: (merge_adapter if merge else load_adapter)(model, args.adapter_path, args.lora_alpha)


def resolve_template(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> ChatGLMTemplate:
    """The flag decides; without it, what the adapter was trained with; without an adapter, the model's own."""
    name, why = args.template, "flag"
    if name is None:
        origin = read_origin(args.adapter_path) if args.adapter_path else None
        merged = read_template(args.model_name_or_path)
        name, why = (origin.template, "the adapter's") if origin else ("native", "default")
        if merged and not origin:
            name, why = merged, "the merged adapter's"
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: argparse.Namespace,
    device: torch.device,
    replicas: int = 1,
) -> None:
    """
    Answers the rows of `args.input_path` into `args.output_path`, one line a row in input order, and prints a summary
    whose last line is JSON. Every process takes part, and with `replicas` answers its share; the main process writes.
    """
    template = resolve_template(args, tokenizer)
    requests = read_requests(args.input_path or DEFAULT_PROMPTS, tokenizer, template)
    if replicas > 1:  # of each length as many to every process
        requests = sorted(requests, key=lambda request: len(request.input_ids))[process_rank() :: replicas]
    started = time.perf_counter()
    answers: list[dict[str, Any]] = []
    done = generate_answers(model, tokenizer, template, requests, args.batch_size, args.max_new_tokens, device)
    for answer in done:
        answers.append(answer)
        if len(answers) % args.batch_size == 0 or len(answers) == len(requests):
            print_once(f"{len(answers)}/{len(requests)} rows" + (" of this process" if replicas > 1 else ""))
    if replicas > 1:
        answers = gather_lists(answers)
    seconds = time.perf_counter() - started
    if not is_main_process():
        return
    answers.sort(key=lambda answer: answer["index"])
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
