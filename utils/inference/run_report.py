"""
What batch inference prints for a person: header, placement of the model, summary, and the next commands to type.

In: the flags and what was resolved from them. Out: lines on stdout, of rank 0. utils/inference/job.py and
utils/inference/generate.py call it; the JSON object after it is theirs.
"""

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from utils.checkpoint.directory import DEFAULT_MODEL
from utils.checkpoint.model import Checkpoint
from utils.checkpoint.weight_files import weight_files
from utils.common.console import print_facts, print_next
from utils.common.numbers import counted
from utils.common.processes import world_size
from utils.data.input_facts import describe_input, describe_size, first_schema, size_of
from utils.data.row_schema import ColumnMap
from utils.inference.arguments import DEFAULT_PROMPTS, InferenceArguments
from utils.inference.engine import can_serve
from utils.inference.prompt_reader import SEPARATORS, TEXT_SUFFIX, PromptRow, Prompts
from utils.inference.work_queue import Replica

MODEL_FLAGS = ("generation", "lora_alpha", "quantize", "template")  # that a following command needs too


def print_header(args: InferenceArguments, checkpoint: Checkpoint, weights: str, prompts: Prompts | None) -> None:
    """
    Print what was resolved before the model is loaded.

    Args:
        weights: their dtype and why.
        prompts: None if no rows are answered.
    """
    size = describe_size(sum(map(size_of, weight_files(checkpoint.directory))))
    facts = {
        "model": f"{args.model_name_or_path} ({checkpoint.generation.name}, {size} of weights)",
        "weights": weights + (f", held as {args.quantize}" if args.quantize else ""),
        "adapter": "\n".join(args.adapter_path) or "none: the model alone",
        "merged to": args.merge_and_save,
    }
    if prompts:
        facts |= {
            "template": f"{prompts.template.name} ({prompts.template_reason})",
            "rows": describe_rows(args, prompts.rows),
            "answers": describe_answers(args),
            "note": describe_lengths(args, prompts.rows, checkpoint.config.max_position_embeddings),
            "output": args.output_path,
        }
    print_facts(Path(sys.argv[0]).name, facts)


def describe_rows(args: InferenceArguments, rows: Sequence[PromptRow]) -> str:
    """Return the file of the rows, their number and tokens, and how many cannot be used."""
    path = args.input_path or DEFAULT_PROMPTS
    is_json = Path(path).suffix.lower() not in (*SEPARATORS, TEXT_SUFFIX)
    file = (
        describe_input(path, ColumnMap.parse(args.columns)) if is_json else f"{path} ({describe_size(size_of(path))})"
    )
    tokens = [len(row.input_ids) for row in rows if not row.error]
    longest = max(tokens, default=0)
    lines = [file, f"{counted(len(rows), 'row')}, {sum(tokens):,} tokens of prompts, the longest {longest:,}"]
    if errors := [row.error for row in rows if row.error]:
        lines += [f"{len(errors):,} of them cannot be used; the first:", errors[0]]
    return "\n".join(lines)


def describe_answers(args: InferenceArguments) -> str:
    """Return how tokens are chosen, and what ends an answer."""
    if args.temperature == 0:
        chosen = "greedy"
    else:
        named = [(name, getattr(args, name)) for name in ("temperature", "top_k", "top_p", "seed")]
        neutral = {("top_k", 0), ("top_p", 1.0)}
        chosen = "sampled, " + ", ".join(f"{name} {value}" for name, value in named if (name, value) not in neutral)
    if args.num_return_sequences > 1:
        chosen += f", {args.num_return_sequences} answers a row"
    if args.repetition_penalty != 1:
        chosen += f", repetition_penalty {args.repetition_penalty}"
    stops = f", up to {' or '.join(map(repr, args.stop_strings))}" if args.stop_strings else ""
    return f"{chosen}; at most {args.max_new_tokens:,} new tokens{stops}"


def describe_lengths(args: InferenceArguments, rows: Sequence[PromptRow], positions: int) -> str | None:
    """
    Return which prompts or answers pass the `positions` that the model was made for; None if none can.

    Answers are not mentioned unless the user chose their limit: few are as long as the default allows.
    """
    longer = sum(len(row.input_ids) > positions for row in rows)
    if longer:
        return f"{longer:,} prompts have more than the {positions:,} tokens that the model was made for"
    longest = max((len(row.input_ids) for row in rows), default=0)
    if longest + args.max_new_tokens <= positions or args.max_new_tokens == InferenceArguments.max_new_tokens:
        return None
    return (
        f"the model was made for {positions:,} tokens, prompt and answer together: an answer that\n"
        f"--max_new_tokens {args.max_new_tokens:,} lets grow beyond may lose its sense there"
    )


def print_placement(
    model: PreTrainedModel, replica: Replica, batches: str, answered: tuple[int, int], seconds: float
) -> None:
    """
    Print where the model is and how it answers.

    Args:
        batches: the batch size and why.
        answered: rows that an earlier run has answered, and all rows.
        seconds: that loading took.
    """
    known, rows = answered
    facts = {
        "answered": f"{known:,} of {rows:,} rows before, by this command; {rows - known:,} are left"
        if known
        else None,
        "placement": describe_placement(model, replica),
        "engine": "batched decoding, a KV cache in pages"
        if can_serve(model)
        else "transformers' generate, because the model is not on one device",
        "batch size": batches,
    }
    print_facts(f"loaded in {timedelta(seconds=round(seconds))}", facts)


def describe_placement(model: PreTrainedModel, replica: Replica) -> str:
    """Return the devices of the model, and how many processes hold it."""
    devices = Counter(getattr(model, "hf_device_map", {"": model.device}).values())
    names = {device: f"cuda:{device}" if isinstance(device, int) else str(device) for device in devices}
    if len(devices) > 1:
        placed = ", ".join(f"{count} modules on {names[device]}" for device, count in devices.items())
    else:
        placed = next(iter(names.values()))
        if placed.startswith("cuda"):
            placed += f" ({torch.cuda.get_device_name(torch.device(placed))})"
    if world_size() == 1:
        return placed
    replicas = f"{replica.replicas} replica{'s' * (replica.replicas > 1)} of the model"
    each = f"{'each ' * (replica.replicas > 1)}on {replica.processes} process{'es' * (replica.processes > 1)}"
    return f"{placed.partition(':')[0]}: {replicas}, {each}\n({replica.reason})"


def print_summary(args: InferenceArguments, summary: dict[str, Any], seconds: float) -> None:
    """Print how many rows were answered, where the answers are, and what to do with them; `summary` as JSON has it."""
    rows, errors, before = summary["rows"], summary["errors"], summary["answered_before"]
    ends = summary["finish_reasons"]
    sampled = f"{summary['new_tokens']:,} new, {summary['new_tokens_per_second']:,.0f} a second"
    facts = {
        "rows": f"{rows - errors:,} of {rows:,} have an answer"
        + (f" ({before:,} of them from before)" if before else "")
        + ('; the others say why in their "error"' if errors else ""),
        "tokens": f"{sampled}; {summary['prompt_tokens']:,} of prompts" if summary["new_tokens"] else None,
        "ended": f"{ends.get('stop', 0):,} by themselves, "
        f"{ends['length']:,} at --max_new_tokens {args.max_new_tokens:,}"
        if ends.get("length")
        else None,
        "output": f"{args.output_path} ({describe_size(size_of(args.output_path))})",
    }
    print_facts(f"done in {timedelta(seconds=round(seconds))}", facts)
    print_next(next_commands(args))


def next_commands(args: InferenceArguments) -> list[tuple[str, str]]:
    """Return what to do with the answers: score them where the rows have targets, else talk to the model."""
    path = args.input_path or DEFAULT_PROMPTS
    schema = None if Path(path).suffix.lower() == TEXT_SUFFIX else first_schema(path, ColumnMap.parse(args.columns))
    if schema and schema.answers:
        columns = ["--columns", args.columns] if args.columns else []
        command = ["tools/evaluate.py", "--input_path", path, *columns]
        return [("score such answers beside the targets", _command(command, args))]
    return [("talk to the model", _command(["tools/chat.py"], args, most_adapters=1))]


def _command(words: list[str], args: InferenceArguments, most_adapters: int | None = None) -> str:
    """Return a command with the model of `args`."""
    if args.model_name_or_path != DEFAULT_MODEL:
        words = [*words, "--model_name_or_path", args.model_name_or_path]
    for name in MODEL_FLAGS:
        if getattr(args, name) is not None:
            words = [*words, f"--{name}", str(getattr(args, name))]
    if args.adapter_path:
        words = [*words, "--adapter_path", *args.adapter_path[:most_adapters]]
    return shlex.join(["python", *words])


def print_merged(args: InferenceArguments, seconds: float) -> None:
    """Print where the merged checkpoint is, and how to answer rows with it."""
    target = args.merge_and_save
    facts = {"checkpoint": f"{target} ({describe_size(size_of(target))}); it needs no adapter"}
    print_facts(f"merged in {timedelta(seconds=round(seconds))}", facts)
    if not args.answers_rows:
        command = shlex.join(["python", "chatglm_milti_gpu_inference.py", "--model_name_or_path", target])
        print_next([("answer rows with it, or serve it (docs/serving.md)", command)])
