"""The Trainer as this toolkit needs it, and how a run's precision is settled."""

import json
import os
from argparse import Namespace

from utils.checkpoint import Checkpoint
from utils.distributed import launched_by_accelerate_with_deepspeed, print_once
from utils.errors import UsageError
from utils.lora import AdapterOrigin, save_adapter
from utils.packing import PackedRows, pack_rows
from utils.quantization import Quantization
from utils.token_dataset import row_lengths

import datasets
import torch
from transformers import Trainer, TrainingArguments


def resolve_precision(arguments: Namespace) -> torch.dtype:
    """
    The dtype of the base model's weights; sets `arguments.fp16` and `.bf16`, and the environment that accelerate and
    DeepSpeed read, to match.

    The flags decide; without one, the precision of accelerate's config file does. float16 needs a GPU: without one
    it becomes float32, and a line says so.

    Raises:
        UsageError: both flags are given.
    """
    if arguments.fp16 and arguments.bf16:
        raise UsageError("--fp16 and --bf16 exclude each other: give one")
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


def uses_deepspeed(arguments: Namespace) -> bool:
    """
    Raises:
        UsageError: --deepspeed names no file or one that is not JSON, or accelerate brings a DeepSpeed of its own.
    """
    if not arguments.deepspeed:
        return launched_by_accelerate_with_deepspeed()
    if launched_by_accelerate_with_deepspeed():
        raise UsageError(
            "--deepspeed under an accelerate config that configures DeepSpeed itself: drop one of the two"
        )
    try:
        with open(arguments.deepspeed, encoding="utf-8") as file:
            json.load(file)
    except OSError as error:
        raise UsageError(f"--deepspeed {arguments.deepspeed}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"--deepspeed {arguments.deepspeed} is not JSON: {error}") from None
    return True


def check_quantization(checkpoint: Checkpoint, args: TrainingArguments) -> None:
    """
    Raises:
        UsageError: a quantised base under ZeRO-3, which partitions floating-point weights alone.
    """
    if checkpoint.quantization and args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        raise UsageError(
            "a quantised base cannot be partitioned by ZeRO-3: run it under DDP (no --deepspeed) or ZeRO-2, or train "
            "on the checkpoint in full precision without --quantize"
        )


class AdapterTrainer(Trainer):
    """Saves the adapter, gathered and verified, where Trainer would save a model; the same under every launcher."""

    def __init__(self, *args, origin: AdapterOrigin, **kwargs):
        super().__init__(*args, **kwargs)
        self.origin = origin

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        save_adapter(self.model, output_dir or self.args.output_dir, self.origin, self.args.should_save)


def pack_dataset(dataset: datasets.Dataset, pack_tokens: int, seed: int) -> PackedRows:
    """
    Raises:
        UsageError: a row is longer than a pack.
    """
    lengths = row_lengths(dataset)
    if max(lengths) > pack_tokens:
        raise UsageError(
            f"--pack_tokens {pack_tokens}: the longest row has {max(lengths)} tokens; give at least that many, or "
            f"tokenise with a smaller --max_seq_length"
        )
    packs = pack_rows(lengths, pack_tokens, seed)
    filled = sum(lengths) / (len(packs) * pack_tokens)
    print_once(f"{len(lengths)} rows in {len(packs)} packs of at most {pack_tokens} tokens, {filled:.1%} filled")
    return PackedRows(dataset, packs)


def describe_run(
    args: TrainingArguments,
    dtype: torch.dtype,
    quantization: Quantization | None,
    rows: int,
    packed: bool,
    trainable: int,
    total: int,
) -> str:
    """What the run resolved, one value a line, each with what decided it."""
    rows_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.deepspeed_plugin is not None:
        launcher = f"DeepSpeed ZeRO-{args.deepspeed_plugin.zero_stage}"
    else:
        launcher = "DDP" if args.world_size > 1 else "one process"
    weights = str(dtype).removeprefix("torch.")
    if quantization:
        weights = f"int{quantization.bits}, computing in {weights}"
    return (
        f"processes {args.world_size} ({launcher}, {args.device.type})\n"
        f"weights {weights}\n"
        f"{'packs' if packed else 'rows'} {rows}, global batch {rows_a_step} = "
        f"{args.per_device_train_batch_size} a device x {args.gradient_accumulation_steps} accumulated "
        f"x {args.world_size} processes\n"
        f"trainable parameters {trainable:,} of {total:,}"
    )
