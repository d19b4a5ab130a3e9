"""
What a training run says of itself: before its first step what was resolved and why, after its last what lies where.

In: a `RunConfig` with its batches and its memory. Out: the header of the run (`print_run`), facts for the summary, and
the commands to type next. Called by the training script and, for --plan, by dry_run.py.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from utils.checkpoint.directory import DEFAULT_MODEL
from utils.common.console import WARNING, duration, print_facts, print_line
from utils.common.numbers import counted, format_loss
from utils.common.processes import is_main_process, local_rank, process_rank, world_size
from utils.data.arrow_reader import row_lengths, trained_tokens
from utils.data.collators import RowsByLength
from utils.data.input_facts import describe_size
from utils.training.argument_checks import count_steps
from utils.training.arguments import BY_LENGTH
from utils.training.batches import Batches
from utils.training.callbacks import LOSS_FIGURE_FILE, METRICS_FILE
from utils.training.checkpoints import list_checkpoints
from utils.training.memory import MemoryDecision
from utils.training.run_config import RunConfig, data_seed, global_batch
from utils.training.run_log import LOG_FILE, RUN_FILE

HELD_OUT_ROWS = "HELD_OUT_ROWS.json"  # in place of a file that the reader has


def short_count(number: int) -> str:
    """
    Return a number in three digits and a letter.

    >>> [short_count(number) for number in (999, 3438080, 6243584000)]
    ['999', '3.44M', '6.24B']
    """
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def print_run(config: RunConfig, batches: Batches, decision: MemoryDecision, places: dict[str, str | None]) -> None:
    """
    Print the header of a run: what it resolved and why, `places`, and what may surprise.

    Other machines than the first print one line, which says that they take part.
    """
    if local_rank() == 0 and not is_main_process():
        print(f"rank {process_rank()} of {world_size()} has started: rank 0 prints the progress", flush=True)
    print_facts(Path(sys.argv[0]).name, describe_run(config, batches, decision) | places)
    for note in (*config.notes, *decision.hints):
        print_line(f"note: {note}", WARNING)


def describe_run(config: RunConfig, batches: Batches, decision: MemoryDecision) -> dict[str, str | None]:
    """Return what a run resolved, and why."""
    flags, args, inputs, reasons = config.flags, config.training_args, config.inputs, config.reasons
    sizes = decision.memory.sizes
    trainable = decision.memory.adapter_parameters()
    targets = ", ".join(flags.lora_target_modules)
    layers = "compiled" if flags.compile_layers else "not compiled"
    where = "CPU" if args.use_cpu else "GPU"
    return {
        "model": f"{flags.model_name_or_path} ({inputs.checkpoint.generation.name}, "
        f"{short_count(sizes.parameters)} parameters)",
        "adapter": f"LoRA of rank {flags.lora_rank} on {targets}: {trainable:,} trainable parameters, "
        f"{trainable / sizes.parameters:.2%}",
        "data": _describe_data(config),
        "evaluation": _describe_evaluation(config),
        "processes": f"{args.world_size} ({config.launcher}, {where})",
        "weights": f"{_describe_weights(config)} ({reasons['dtype']})",
        "layers": f"{layers} ({reasons['compile_layers']})",
        "batches": _describe_batches(config, batches),
        "global batch": f"{counted(global_batch(args), _unit(config))} = {args.per_device_train_batch_size} a device "
        f"x {args.gradient_accumulation_steps} accumulated x {counted(args.world_size, 'process')}",
        "steps": _describe_steps(config, len(batches.items)),
        "checkpointing": f"{'on' if decision.checkpointing else 'off'} ({decision.reason})",
        "memory": decision.describe(),
    }


def _unit(config: RunConfig) -> str:
    """Return the noun of what a batch is made of."""
    return "pack" if config.flags.packing else "row"


def _describe_weights(config: RunConfig) -> str:
    dtype, quantization = str(config.dtype).removeprefix("torch."), config.inputs.checkpoint.quantization
    if not quantization and not config.flags.quantize:
        return dtype
    stored = f"int{quantization.bits}" if quantization else config.flags.quantize
    return f"{stored}, computing in {dtype}"


def _describe_data(config: RunConfig) -> str:
    lengths, trained = row_lengths(config.inputs.dataset), int(trained_tokens(config.inputs.dataset).sum())
    tokens = sum(lengths)
    return (
        f"{config.flags.dataset_path}: {counted(len(lengths), 'row')}, {tokens:,} tokens "
        f"({trained / tokens:.0%} trained on), longest row {max(lengths):,}"
    )


def _describe_evaluation(config: RunConfig) -> str | None:
    args, flags, dataset = config.training_args, config.flags, config.inputs.eval_dataset
    if not dataset:
        return None
    source = flags.eval_dataset_path or f"held out by --eval_fraction {flags.eval_fraction:g}"
    every = "epoch" if args.eval_strategy == IntervalStrategy.EPOCH else counted(int(args.eval_steps), "step")
    return f"{counted(len(dataset), 'row')}, {source}; every {every} and at the end"


def _describe_batches(config: RunConfig, batches: Batches) -> str:
    lengths, pack_tokens = row_lengths(config.inputs.dataset), config.pack_tokens
    if pack_tokens:
        packs = len(batches.items)
        unfilled = 1 - sum(lengths) / packs / pack_tokens
        return f"{counted(packs, 'pack')} of at most {pack_tokens:,} tokens, {unfilled:.1%} unfilled"
    if config.training_args.train_sampling_strategy == BY_LENGTH:
        return f"rows padded, ordered by length: {padding_share(lengths, config.training_args):.1%} padding"
    return "rows padded, not ordered by length (--packing pads none)"


def padding_share(lengths: list[int], args: TrainingArguments) -> float:
    """
    Return the share of padding in the first epoch's batches.

    Rows are ordered by length.
    """
    order = list(RowsByLength(lengths, global_batch(args), data_seed(args)))
    size = args.per_device_train_batch_size
    batches = [[lengths[row] for row in order[start : start + size]] for start in range(0, len(order), size)]
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def _describe_steps(config: RunConfig, items: int) -> str:
    args = config.training_args
    steps = count_steps(items, args)
    if args.max_steps > 0:
        source = f"--max_steps, {steps * global_batch(args) / items:.3g} epochs"
    else:
        source = f"--num_train_epochs {args.num_train_epochs:g}"
    if args.save_strategy == SaveStrategy.STEPS:
        saved = f"a checkpoint every {counted(int(args.save_steps), 'step')} and at the end"
    else:
        saved = {
            SaveStrategy.NO: "no checkpoints",
            SaveStrategy.EPOCH: "a checkpoint every epoch",
            SaveStrategy.BEST: "a checkpoint when the evaluation is the best",
        }[args.save_strategy]
    return f"{steps:,} ({source}); {saved}"


def describe_result(
    args: TrainingArguments, state: TrainerState, metrics: dict[str, Any]
) -> tuple[str, dict[str, str | None]]:
    """
    Return the summary of a run whose adapter is written: its title, and what lies where.

    Args:
        metrics: of the run, as its last JSON has them.
    """
    directory = Path(args.output_dir)
    title = f"done: {counted(state.global_step, 'step')}"
    if "train_runtime" in metrics:
        title += f" in {duration(metrics['train_runtime'])}"
    if "train_loss" in metrics:
        title += f", mean loss {format_loss(metrics['train_loss'])}"
    checkpoints = ", ".join(path.name for path in list_checkpoints(directory))
    adapter, best = f"{directory} ({describe_size((directory / SAFETENSORS_WEIGHTS_NAME).stat().st_size)})", None
    if state.best_model_checkpoint:
        best = f"{state.best_model_checkpoint} (eval loss {format_loss(state.best_metric)})"
        adapter += ", that of the best checkpoint" if args.load_best_model_at_end else ", that of the last step"
    return title, {
        "adapter": adapter,
        "best": best,
        "checkpoints": checkpoints or None,
        "curves": str(directory / LOSS_FIGURE_FILE),
        "metrics": str(directory / METRICS_FILE),
        "log": str(directory / LOG_FILE),
        "settings": str(directory / RUN_FILE),
    }


def next_commands(model_name_or_path: str, output_dir: str) -> list[tuple[str, str]]:
    """Return what a user does with an adapter, each as (what it does, the command)."""
    model = [] if model_name_or_path == DEFAULT_MODEL else ["--model_name_or_path", model_name_or_path]
    used = shlex.join([*model, "--adapter_path", output_dir])
    merged = shlex.quote(f"{output_dir.rstrip('/')}_merged")
    return [
        ("answer prompts with it", f"python chatglm_milti_gpu_inference.py {used}"),
        (
            "compare it with the base on rows of yours that it was not trained on",
            f"python tools/evaluate.py {used} --input_path {HELD_OUT_ROWS}",
        ),
        ("talk to it", f"python tools/chat.py {used}"),
        ("merge it into the base", f"python chatglm_milti_gpu_inference.py {used} --merge_and_save {merged}"),
    ]
