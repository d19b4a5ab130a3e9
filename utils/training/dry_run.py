"""
`--plan`: prints what a training run will be, how fast, and which recipe fits these GPUs; then the script ends.

In: a `RunConfig`. Out: lines on stdout. The training script calls `plan`. The speed is measured in a few of the run's
own steps, in a temporary directory: the run's --output_dir is not touched.
"""

import copy
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from utils.common.console import duration, print_facts, print_line
from utils.common.errors import RankError
from utils.data.arrow_reader import row_lengths
from utils.distributed.collectives import gather_from_all
from utils.training.argument_checks import count_steps
from utils.training.batches import Batches, make_batches
from utils.training.callbacks import LossCurves
from utils.training.log_lines import LogEnds, LogLines
from utils.training.memory import GIB, USABLE_GPU_SHARE, MemoryDecision, MemoryModel, free_gib
from utils.training.recipes import advise
from utils.training.run_config import RunConfig, global_batch
from utils.training.run_report import print_run
from utils.training.trainer import make_trainer

TRIAL_STEPS = 4  # the first, which compiles layers and grows the allocator's memory, is timed separately


def plan(config: RunConfig, decision: MemoryDecision) -> None:
    """
    Print what the run will be and, if it fits, how fast.

    Every process must call it.

    Raises:
        RankError: the trial steps ran out of memory in spite of the estimate.
    """
    args, memory = config.training_args, decision.memory
    batches = make_batches(config)
    items, lengths = len(batches.items), row_lengths(config.inputs.dataset)
    steps = count_steps(items, args)
    tokens = sum(lengths) / items * steps * global_batch(args)
    print_run(config, batches, decision, {"output": "--plan writes nothing"})
    free = min(gather_from_all(free_gib(on_cpu=args.use_cpu)))
    usable = USABLE_GPU_SHARE * free
    if memory.gib() > usable:  # a hint has named the flag that makes it fit
        print_line(f"speed not measured: {memory.gib():.1f} GiB estimated do not fit in {free:.1f} GiB free")
    else:
        speed = describe_speed(try_steps(config, batches), memory, steps, tokens)
        print_facts(f"measured in {TRIAL_STEPS} steps", speed)
    if not args.use_cpu:
        print_facts("advice, the fastest recipe that fits", advise(memory, args.world_size, usable))


def try_steps(config: RunConfig, batches: Batches) -> dict[str, float]:
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
        trainer = make_trainer(replace(config, training_args=args), batches, callbacks=[])
        for callback in (LogEnds, LogLines, LossCurves):
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


def describe_speed(speed: dict[str, float], memory: MemoryModel, steps: int, tokens: float) -> dict[str, str]:
    """
    Return what `try_steps` measured, and how long the run takes.

    `steps` and `tokens` are those of the whole run.
    """
    first = speed["first_step_seconds"]
    seconds = round(first + tokens * (steps - 1) / steps / speed["tokens_per_second"])
    facts = {
        "speed": f"{speed['tokens_per_second']:,.0f} tokens/s, {speed['seconds_per_step']:.3g} s a step, "
        f"the first {first:.3g} s",
        "time": f"the run takes {duration(seconds)} ({seconds} s), loading, evaluation and checkpoints not counted",
    }
    if "peak_gib" in speed:
        facts["memory"] = f"{speed['peak_gib']:.1f} GiB at its peak, {memory.gib():.1f} estimated"
    return facts
