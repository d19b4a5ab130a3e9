"""What a training run will be: said before it starts, and all that --plan does."""

import math
from dataclasses import replace
from typing import Any

from utils.batching import RowsByLength
from utils.memory_estimate import FREE_SHARE, Load, ModelSizes, describe, free_gib
from utils.packing import pack_rows
from utils.preflight import Request
from utils.quantization import Quantization
from utils.token_dataset import row_lengths, trained_tokens
from utils.training import BY_LENGTH, data_seed, global_batch

import torch
from transformers import TrainingArguments

PACKS = (16384, 8192, 4096)  # tokens; a smaller pack than these costs more speed than gradient checkpointing


def padding_share(lengths: list[int], args: TrainingArguments) -> float:
    """Of the tokens of the first epoch's batches by length."""
    order = list(RowsByLength(lengths, global_batch(args), data_seed(args)))
    size = args.per_device_train_batch_size
    batches = [[lengths[row] for row in order[start : start + size]] for start in range(0, len(order), size)]
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def count_steps(items: int, args: TrainingArguments) -> int:
    """Optimizer steps over so many rows or packs, as Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    micro_batches = math.ceil(items / (args.per_device_train_batch_size * args.world_size))
    return math.ceil(args.num_train_epochs * math.ceil(micro_batches / args.gradient_accumulation_steps))


def describe_plan(request: Request, flags: Any, args: TrainingArguments, dtype: torch.dtype) -> str:
    """One line a subject; for the arguments see `Load.of`."""
    lengths = row_lengths(request.dataset)
    trained, tokens = int(trained_tokens(request.dataset).sum()), sum(lengths)
    items, batches = len(lengths), "padding not foreseen, as rows are not ordered by length"
    if flags.packing:
        items = len(pack_rows(lengths, flags.pack_tokens, args.seed))
        batches = f"{items} packs of {flags.pack_tokens} tokens, {1 - tokens / items / flags.pack_tokens:.1%} unfilled"
    elif args.train_sampling_strategy == BY_LENGTH:
        batches = f"batches padded by length, {padding_share(lengths, args):.1%} padding"
    load = replace(Load.of(request, flags, args, dtype), checkpointing=args.gradient_checkpointing)
    unit = "packs" if flags.packing else "rows"
    lines = [
        f"rows {len(lengths):,}, tokens {tokens:,}, trained on {trained:,} ({trained / tokens:.1%}); {batches}",
        f"steps {count_steps(items, args):,}, global batch {global_batch(args)} {unit}",
        f"trainable parameters {load.adapter_parameters():,}",
    ]
    if args.use_cpu:
        lines.append(f"memory {describe(load)}; no GPU here to compare it with")
    else:
        lines.append(f"advice: {advise(load, request, args.world_size, FREE_SHARE * free_gib(), dtype)}")
    return "\n".join(lines)


def advise(load: Load, request: Request, processes: int, room: float, dtype: torch.dtype) -> str:
    """The fastest recipe that fits in `room` GiB a card, in flags."""
    whole = replace(load, packing=True, compiled=True, partitions=None, offloaded=False)
    recipes = [("DDP", replace(whole, checkpointing=on), "") for on in (False, True)]
    if request.checkpoint.quantization is None:
        if processes > 1:
            sharded = replace(whole, compiled=False, partitions=processes)
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
