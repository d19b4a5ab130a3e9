"""
`--plan`: prints what a training run will be, how fast, and which recipe fits these GPUs; then the script ends.

In: a `RunConfig`. Out: lines on stdout. The training script calls `plan`. The speed is measured in a few of the run's
own
steps, in a temporary directory: the run's --output_dir is not touched.
"""

import copy
import shutil
import tempfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from utils.common.errors import RankError
from utils.common.processes import print_once
from utils.data.arrow_reader import row_lengths, trained_tokens
from utils.data.collators import RowsByLength
from utils.data.packing import pack_rows
from utils.distributed.collectives import gather_from_all
from utils.training.argument_checks import count_steps
from utils.training.arguments import BY_LENGTH
from utils.training.callbacks import LossCurves, ProgressBar
from utils.training.memory import GIB, USABLE_GPU_SHARE, MemoryModel, free_gib
from utils.training.recipes import advise
from utils.training.run_config import RunConfig, data_seed, global_batch
from utils.training.trainer import make_trainer

TRIAL_STEPS = 4  # the first, which compiles layers and grows the allocator's memory, is timed separately


def plan(config: RunConfig) -> None:
    """
    Print what the run will be and, if it fits, how fast.

    Every process must call it.

    Raises:
        RankError: the trial steps ran out of memory in spite of the estimate.
    """
    flags, args = config.flags, config.training_args
    memory = replace(MemoryModel.of(config), checkpointing=args.gradient_checkpointing)
    lengths = row_lengths(config.inputs.dataset)
    items = len(pack_rows(lengths, flags.pack_tokens, args.seed)) if flags.packing else len(lengths)
    steps = count_steps(items, args)
    tokens = sum(lengths) / items * steps * global_batch(args)
    print_once(describe_plan(config, memory, items))
    free = min(gather_from_all(free_gib(on_cpu=args.use_cpu)))
    usable = USABLE_GPU_SHARE * free
    if memory.gib() > usable:  # `resolve_checkpointing` has printed the flag that makes it fit
        print_once(f"speed not measured: {memory.gib():.1f} GiB estimated do not fit in {free:.1f} GiB free")
    else:
        print_once(describe_speed(try_steps(config), memory, steps, tokens))
    if not args.use_cpu:
        print_once(f"advice: {advise(memory, args.world_size, usable)}")


def try_steps(config: RunConfig) -> dict[str, float]:
    """
    Make TRIAL_STEPS steps of the run in a temporary directory.

    The directory is kept only if it holds rows at fault.

    Returns:
        `seconds_per_step` after the first, `first_step_seconds`, `tokens_per_second` (all processes, without padding)
        and, on a GPU, `peak_gib`.

    Raises:
        RankError: the GPU ran out of memory.
    """
    args = copy.copy(config.training_args)
    args.output_dir = tempfile.mkdtemp(prefix="plan-")
    args.max_steps, args.report_to, args.load_best_model_at_end = TRIAL_STEPS, [], False
    args.save_strategy, args.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    args.logging_strategy, args.eval_on_start = IntervalStrategy.NO, False
    try:
        trainer = make_trainer(replace(config, training_args=args), callbacks=[])
        for callback in (ProgressBar, LossCurves):
            trainer.remove_callback(callback)
        metrics = trainer.train().metrics
        return metrics | {"seconds_per_step": trainer.throughput.seconds_per_step()}
    except torch.OutOfMemoryError:
        raise RankError(
            f"the steps ran out of memory, {torch.cuda.max_memory_allocated() / GIB:.1f} GiB of it in use: give a "
            "smaller --pack_tokens or --per_device_train_batch_size, or --gradient_checkpointing"
        ) from None
    finally:
        if not any(Path(args.output_dir).glob("rows_at_fault*")):
            shutil.rmtree(args.output_dir, ignore_errors=True)


def describe_plan(config: RunConfig, memory: MemoryModel, items: int) -> str:
    """
    Return one line each on rows, steps and trained parameters.

    Without a GPU a line on memory follows. `items` are rows or packs.
    """
    flags, args, dataset = config.flags, config.training_args, config.inputs.dataset
    lengths = row_lengths(dataset)
    trained, tokens = int(trained_tokens(dataset).sum()), sum(lengths)
    if flags.packing:
        unfilled = 1 - tokens / items / flags.pack_tokens
        batches = f"{items} packs of {flags.pack_tokens} tokens, {unfilled:.1%} unfilled"
    elif args.train_sampling_strategy == BY_LENGTH:
        batches = f"batches padded by length, {padding_share(lengths, args):.1%} padding"
    else:
        batches = "padding not estimated, as rows are not ordered by length"
    unit = "packs" if flags.packing else "rows"
    lines = [
        f"rows {len(lengths):,}, tokens {tokens:,}, trained on {trained:,} ({trained / tokens:.1%}); {batches}",
        f"steps {count_steps(items, args):,}, global batch {global_batch(args)} {unit}",
        f"trainable parameters {memory.adapter_parameters():,}",
    ]
    if args.use_cpu:
        lines.append(f"memory {memory.describe()}; no GPU here to compare it with")
    return "\n".join(lines)


def padding_share(lengths: list[int], args: TrainingArguments) -> float:
    """
    Return the share of padding in the first epoch's batches.

    Rows are ordered by length.
    """
    order = list(RowsByLength(lengths, global_batch(args), data_seed(args)))
    size = args.per_device_train_batch_size
    batches = [[lengths[row] for row in order[start : start + size]] for start in range(0, len(order), size)]
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def describe_speed(speed: dict[str, float], memory: MemoryModel, steps: int, tokens: float) -> str:
    """
    Return what `try_steps` measured, and how long the run takes.

    `steps` and `tokens` are those of the whole run.
    """
    first = speed["first_step_seconds"]
    seconds = round(first + tokens * (steps - 1) / steps / speed["tokens_per_second"])
    text = (
        f"measured in {TRIAL_STEPS} steps: {speed['tokens_per_second']:,.0f} tokens/s, "
        f"{speed['seconds_per_step']:.3g} s a step, the first {first:.3g} s\n"
        f"the run takes {timedelta(seconds=seconds)} ({seconds} s), loading, evaluation and checkpoints not counted"
    )
    if "peak_gib" in speed:
        text += f"\nmemory {speed['peak_gib']:.1f} GiB at its peak, {memory.gib():.1f} estimated"
    return text
