"""What a training run will be, and how fast: said before it starts, and all that --plan does."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from utils.common.errors import RankError
from utils.common.processes import print_once
from utils.data.arrow_reader import row_lengths, trained_tokens
from utils.data.collators import RowsByLength
from utils.data.packing import pack_rows
from utils.distributed.collectives import gather_from_all
from utils.layers.quantization import Quantization
from utils.training.argument_checks import count_steps
from utils.training.callbacks import Bar, Curves
from utils.training.memory import FREE_SHARE, GIB, MemoryModel, ModelSizes, describe, free_gib
from utils.training.run_config import BY_LENGTH, TrainingRequest, data_seed, global_batch
from utils.training.trainer import AdapterTrainer

TRIAL_STEPS = 4  # of which the first, in which layers are compiled and memory is found, is timed apart
PACKS = (16384, 8192, 4096)  # tokens; a smaller pack than these costs more speed than gradient checkpointing


def padding_share(lengths: list[int], args: TrainingArguments) -> float:
    """Of the tokens of the first epoch's batches by length."""
    order = list(RowsByLength(lengths, global_batch(args), data_seed(args)))
    size = args.per_device_train_batch_size
    batches = [[lengths[row] for row in order[start : start + size]] for start in range(0, len(order), size)]
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def plan(
    request: TrainingRequest,
    flags: Any,
    args: TrainingArguments,
    dtype: torch.dtype,
    make_trainer: Callable[[], AdapterTrainer],
) -> None:
    """
    Says what the run will be and, where its memory suffices, how fast, from a few of its steps. Nothing is written to
    the output directory. Every process must call it. Changes `args`.

    Args:
        request, flags, args, dtype: see `MemoryModel.of`.
        make_trainer: the run's own trainer, with `args` as they are when it is called.

    Raises:
        RankError: the steps ran out of memory all the same.
    """
    load = replace(MemoryModel.of(request, flags, args, dtype), checkpointing=args.gradient_checkpointing)
    lengths = row_lengths(request.dataset)
    items = len(pack_rows(lengths, flags.pack_tokens, args.seed)) if flags.packing else len(lengths)
    steps = count_steps(items, args)
    tokens = sum(lengths) / items * steps * global_batch(args)
    print_once(describe_plan(request, load, items, flags, args))
    free = min(gather_from_all(free_gib(on_cpu=args.use_cpu)))
    room = FREE_SHARE * free
    if load.gib() > room:  # `resolve_checkpointing` has said the flag that makes it fit
        print_once(f"speed not measured: {load.gib():.1f} GiB estimated do not fit in {free:.1f} GiB free")
    else:
        print_once(describe_speed(try_steps(args, make_trainer), load, steps, tokens))
    if not args.use_cpu:
        print_once(f"advice: {advise(load, request, args.world_size, room, dtype)}")


def try_steps(args: TrainingArguments, make_trainer: Callable[[], AdapterTrainer]) -> dict[str, float]:
    """
    Makes TRIAL_STEPS steps of the run, in a directory of their own, which stays only where it holds rows at fault.

    Returns:
        `seconds_a_step` after the first, `first_step_seconds`, `tokens_per_second` over all processes, without padding
        and, on a GPU, `peak_gib`.

    Raises:
        RankError: a GPU's memory did not suffice.
    """
    args.output_dir = tempfile.mkdtemp(prefix="plan-")
    args.max_steps, args.report_to, args.load_best_model_at_end = TRIAL_STEPS, [], False
    args.save_strategy, args.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    args.logging_strategy, args.eval_on_start = IntervalStrategy.NO, False
    try:
        trainer = make_trainer()
        for callback in (Bar, Curves):
            trainer.remove_callback(callback)
        metrics = trainer.train().metrics
        return metrics | {"seconds_a_step": trainer.throughput.seconds_a_step()}
    except torch.OutOfMemoryError:
        raise RankError(
            f"the steps ran out of memory, {torch.cuda.max_memory_allocated() / GIB:.1f} GiB of it in use: give a "
            "smaller --pack_tokens or --per_device_train_batch_size, or --gradient_checkpointing"
        ) from None
    finally:
        if not any(Path(args.output_dir).glob("rows_at_fault*")):
            shutil.rmtree(args.output_dir, ignore_errors=True)


def describe_speed(speed: dict[str, float], load: MemoryModel, steps: int, tokens: float) -> str:
    """What `try_steps` found, and how long a run of so many steps and tokens takes by that."""
    first = speed["first_step_seconds"]
    seconds = round(first + tokens * (steps - 1) / steps / speed["tokens_per_second"])
    found = (
        f"measured in {TRIAL_STEPS} steps: {speed['tokens_per_second']:,.0f} tokens/s, "
        f"{speed['seconds_a_step']:.3g} s a step, the first {first:.3g} s\n"
        f"the run takes {timedelta(seconds=seconds)} ({seconds} s), loading, evaluation and checkpoints not counted"
    )
    if "peak_gib" in speed:
        found += f"\nmemory {speed['peak_gib']:.1f} GiB at its peak, {load.gib():.1f} estimated"
    return found


def describe_plan(request: TrainingRequest, load: MemoryModel, items: int, flags: Any, args: TrainingArguments) -> str:
    """One line a subject, of a run over so many rows or packs; for the other arguments see `plan`."""
    lengths = row_lengths(request.dataset)
    trained, tokens = int(trained_tokens(request.dataset).sum()), sum(lengths)
    batches = "padding not foreseen, as rows are not ordered by length"
    if flags.packing:
        batches = f"{items} packs of {flags.pack_tokens} tokens, {1 - tokens / items / flags.pack_tokens:.1%} unfilled"
    elif args.train_sampling_strategy == BY_LENGTH:
        batches = f"batches padded by length, {padding_share(lengths, args):.1%} padding"
    unit = "packs" if flags.packing else "rows"
    lines = [
        f"rows {len(lengths):,}, tokens {tokens:,}, trained on {trained:,} ({trained / tokens:.1%}); {batches}",
        f"steps {count_steps(items, args):,}, global batch {global_batch(args)} {unit}",
        f"trainable parameters {load.adapter_parameters():,}",
    ]
    if args.use_cpu:
        lines.append(f"memory {describe(load)}; no GPU here to compare it with")
    return "\n".join(lines)


def advise(load: MemoryModel, request: TrainingRequest, processes: int, room: float, dtype: torch.dtype) -> str:
    """The fastest recipe that fits in `room` GiB a card, in flags."""
    whole = replace(
        load, packing=True, compiled=True, partitions=None, offloaded=False, fsdp=False, optimizer_partitions=1
    )
    kinds = [("DDP", whole, "")]
    if processes > 1:
        spread = replace(whole, optimizer_partitions=processes)
        kinds.append(("ZeRO-2", spread, "configs/deepspeed_zero2.json"))
    recipes = [(name, replace(kind, checkpointing=on), file) for on in (False, True) for name, kind, file in kinds]
    if request.checkpoint.quantization is None:
        if processes > 1:
            sharded = replace(spread, partitions=processes)
            recipes += [("ZeRO-3", replace(sharded, checkpointing=on), "ds_config_zero3.json") for on in (False, True)]
        integers = replace(request.checkpoint, quantization=Quantization(4), quantizes=True)
        small = replace(whole, sizes=ModelSizes.of(integers, dtype), checkpointing=True)
        recipes.append(("DDP over 4 bits", small, ""))
    for name, recipe, config in recipes:
        for tokens in PACKS:
            fits = replace(recipe, tokens=max(tokens, recipe.longest))
            if fits.gib() <= room:
                flags = f"--packing --per_device_train_batch_size 1 --pack_tokens {fits.tokens}"
                flags += " --quantize int4" if "4 bits" in name else f" --deepspeed {config}" if config else ""
                flags += " --gradient_checkpointing" if recipe.checkpointing else ""
                return f"{name}, {flags} ({fits.gib():.1f} GiB)"
    return "accelerate launch --config_file accelerate_ds_zero3_cpu_offload_config.yaml, the weights in CPU memory"
