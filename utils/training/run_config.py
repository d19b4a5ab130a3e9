"""What a training run resolved from its flags: precision, evaluation, checkpointing, its batches."""

import os
from argparse import Namespace
from dataclasses import dataclass

import datasets
import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments

from utils.checkpoint.model import Checkpoint
from utils.common.processes import launched_by_accelerate_with_fsdp, print_once
from utils.lora.adapter import AdapterOrigin

CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")


@dataclass(frozen=True)
class TrainingRequest:
    """What the flags of a training run name, opened."""

    dataset: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase
    checkpoint: Checkpoint
    origin: AdapterOrigin  # of the adapter that will be trained
    checkpointing: bool | None = None  # what the flags say; None where they do not
    eval_dataset: datasets.Dataset | None = None


def checkpointing_flag(values: Namespace) -> bool | None:
    """Under the name that transformers had for it, or has since 5.24; None where neither was given."""
    given = (vars(values).get(name) for name in CHECKPOINTING)
    return next((value for value in given if value is not None), None)


BY_LENGTH = "group_by_length"  # what --train_sampling_strategy takes


def global_batch(args: TrainingArguments) -> int:
    """Rows, or packs, of an optimizer step over all processes."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def data_seed(args: TrainingArguments) -> int:
    """What the order of rows is drawn from."""
    return args.seed if args.data_seed is None else args.data_seed


def resolve_precision(arguments: Namespace) -> torch.dtype:
    """
    The dtype of the base model's weights; sets `arguments.fp16` and `.bf16`, and the environment that accelerate and
    DeepSpeed read, to match.

    The flags decide; without one, the precision of accelerate's config file does. float16 needs a GPU: without one
    it becomes float32, and a line says so.
    """
    source = "flag"
    if not arguments.fp16 and not arguments.bf16:
        source = "accelerate config"
        configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        arguments.fp16, arguments.bf16 = configured == "fp16", configured == "bf16"
    if arguments.fp16 and not torch.cuda.is_available():
        print_once(f"fp16 ({source}) needs a GPU and there is none: training in float32")
        arguments.fp16 = False
    precision = "fp16" if arguments.fp16 else "bf16" if arguments.bf16 else "no"
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}[precision]


def settle_evaluation(arguments: Namespace) -> None:
    """
    With rows to evaluate on: evaluates before each checkpoint unless flags say otherwise, in batches like those of
    training, and lets the checkpoint with the lowest loss be kept.
    """
    if arguments.per_device_eval_batch_size is None:
        arguments.per_device_eval_batch_size = arguments.per_device_train_batch_size
    if not (arguments.eval_dataset_path or arguments.eval_fraction):
        return
    if arguments.eval_strategy == "no":
        arguments.eval_strategy = "epoch" if arguments.save_strategy == "epoch" else "steps"
    if arguments.eval_steps is None and arguments.eval_strategy == "steps" and arguments.save_strategy == "steps":
        arguments.eval_steps = arguments.save_steps
    arguments.metric_for_best_model = arguments.metric_for_best_model or "loss"
    arguments.greater_is_better = False


def set_checkpointing(args: TrainingArguments, checkpointing: bool) -> None:
    """Under each name that this version of transformers has for it."""
    for name in set(CHECKPOINTING) & vars(args).keys():
        setattr(args, name, checkpointing)


def describe_run(
    args: TrainingArguments,
    dtype: torch.dtype,
    quantize: str | None,
    rows: int,
    packed: bool,
    trainable: int,
    total: int,
) -> str:
    """What the run resolved, one value a line, each with what decided it."""
    if args.deepspeed_plugin is not None:
        launcher = f"DeepSpeed ZeRO-{args.deepspeed_plugin.zero_stage}"
    elif launched_by_accelerate_with_fsdp():
        launcher = "FSDP2"
    else:
        launcher = "DDP" if args.world_size > 1 else "one process"
    weights = str(dtype).removeprefix("torch.")
    if quantize:
        weights = f"{quantize}, computing in {weights}"
    return (
        f"processes {args.world_size} ({launcher}, {args.device.type})\n"
        f"weights {weights}\n"
        f"{'packs' if packed else 'rows'} {rows}, global batch {global_batch(args)} = "
        f"{args.per_device_train_batch_size} a device x {args.gradient_accumulation_steps} accumulated "
        f"x {args.world_size} processes\n"
        f"trainable parameters {trainable:,} of {total:,}"
    )


def resolve_compile(wanted: bool | None, packing: bool, args: TrainingArguments) -> bool:
    """Without a wish: where batches have one shape, which packs make possible, and a GPU waits."""
    if wanted is not None:
        return wanted
    return packing and not args.use_cpu
