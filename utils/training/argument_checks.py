"""
Finds values of training flags that cannot work, before a model is loaded.

`check_values` checks flags as argparse leaves them, by tables (called by preflight.py); `check_training_arguments`
checks the resolved ones, and builds optimizer and schedule once, for one parameter, with transformers' own code
(called by run_config.py). transformers itself would find most of these faults after loading the model, one at a time.
"""

import contextlib
import math
from argparse import Namespace
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from utils.common.errors import Faults, UsageError
from utils.data.arrow_reader import row_lengths
from utils.data.packing import pack_rows

SEEDS = (0, 2**32 - 1)  # what numpy takes
MAX_INT32 = 2**31 - 1  # a larger count is a typing error
# The smallest and the largest value of a flag; None, the default of some, is always accepted.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("lora_rank", "lora_alpha", "pack_tokens"), (1, MAX_INT32)),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (1, MAX_INT32)),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "eval_accumulation_steps", "torch_empty_cache_steps"), (1, MAX_INT32)
    ),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "neftune_noise_alpha"), (0, 1e30)),
    **dict.fromkeys(("warmup_steps", "save_steps", "eval_steps", "eval_delay", "save_total_limit"), (0, MAX_INT32)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 1 - 1e-12)),
    **dict.fromkeys(("seed", "data_seed"), SEEDS),
    "adam_epsilon": (0, 1),
    "max_steps": (-1, MAX_INT32),
    "logging_steps": (1e-9, MAX_INT32),
    "dataloader_num_workers": (0, 4096),
    "dataloader_prefetch_factor": (1, MAX_INT32),
    "ddp_bucket_cap_mb": (1, MAX_INT32),
    "ddp_timeout": (1, MAX_INT32),
    "local_rank": (-1, MAX_INT32),
}
HIGHEST_LEARNING_RATE = 1.0  # above it, a minus is missing ("2e5"); some optimizers, such as Prodigy, take 1
CHOICES: dict[str, tuple[Any, ...]] = {
    "metric_for_best_model": (None, "loss", "eval_loss", "perplexity", "eval_perplexity"),
}
# Flags of TrainingArguments that this training cannot serve: values that change nothing; why others cannot be used, or
# what to give instead.
UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0.0,), "the loss is computed in chunks, without logits to smooth"),
    "fsdp": (("", None, [], False), "accelerate launch --config_file configs/accelerate_fsdp2.yaml brings it"),
    "fsdp_config": ((None, "{}"), "accelerate launch --config_file configs/accelerate_fsdp2.yaml brings it"),
    "auto_find_batch_size": ((False,), "a resumed run must keep its batch size"),
    "use_liger_kernel": ((False,), "Liger knows none of these models: give --packing, which has kernels of its own"),
    "torch_compile": ((False,), "it would compile the whole model: give --compile_layers true"),
    "torch_compile_backend": ((None,), "it would compile the whole model: give --compile_layers true"),
    "torch_compile_mode": ((None,), "it would compile the whole model: give --compile_layers true"),
    "push_to_hub": ((False,), "nothing leaves this machine: upload the finished adapter (hf upload)"),
    "greater_is_better": ((None, False), "a lower loss is better"),
    "use_cache": ((False,), "training has no KV cache"),
    "fp16_full_eval": ((False,), "evaluation computes as training does"),
    "bf16_full_eval": ((False,), "evaluation computes as training does"),
    "enable_jit_checkpoint": ((False,), "this script saves a checkpoint when a signal stops it"),
}
FULL_WEIGHT_OPTIMIZERS = ("galore", "apollo", "lomo", "adalomo")  # prefixes of names of --optim
CHECKPOINTING_KEYS = {"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"}


def check_values(values: Namespace) -> None:
    """
    Check flags as argparse leaves them, each alone and against others.

    Raises:
        UsageError: numbers out of range, unknown names, flags that exclude each other, and flags that this training
            cannot serve.
    """
    faults = Faults()
    for name, (least, most) in RANGES.items():
        value = getattr(values, name)
        if value is not None and not least <= value <= most:
            bound = f"at most {most}" if value > most else f"at least {least}"
            faults.add(f"--{name} {value} must be {bound}")
    for name, served in CHOICES.items():
        if (value := getattr(values, name)) not in served:
            faults.add(f"--{name} {value} is unknown: give {', '.join(word for word in served if word)}")
    for name, (served, why) in UNSERVED.items():
        if getattr(values, name) not in served:
            faults.add(f"--{name} {getattr(values, name)} cannot be used here: {why}")
    if not 0 < values.learning_rate < math.inf:
        faults.add(f"--learning_rate {values.learning_rate} trains nothing: give one above 0")
    elif values.learning_rate > HIGHEST_LEARNING_RATE:
        faults.add(f"--learning_rate {values.learning_rate:g} trains nothing useful: usual are 1e-5 to 1e-3")
    if not 0 <= values.lora_dropout < 1:
        faults.add(f"--lora_dropout {values.lora_dropout} must be at least 0 and below 1")
    if values.max_steps == 0:
        faults.add("--max_steps 0 trains nothing: give more, or leave it out")
    if values.max_steps < 0 and not 0 < values.num_train_epochs <= MAX_INT32:
        faults.add(f"--num_train_epochs {values.num_train_epochs} trains nothing: give a number, or --max_steps")
    if values.optim.startswith(FULL_WEIGHT_OPTIMIZERS):
        faults.add(
            f"--optim {values.optim} cannot be used here: it trains whole weights, and an adapter has none: give "
            "adamw_torch_fused"
        )
    if values.fp16 and values.bf16:
        faults.add("--fp16 and --bf16 exclude each other: give one")
    if values.packing and values.train_sampling_strategy == "batch_rebalance":
        faults.add(
            "--train_sampling_strategy batch_rebalance cannot be used with --packing, whose packs have one length"
        )
    for check in (check_evaluation, check_reporters):
        with faults.collect():
            check(values)
    faults.report()


def check_evaluation(values: Namespace) -> None:
    """
    Check the flags of evaluation against one another.

    Raises:
        UsageError: flags of evaluation without rows to evaluate on, or with two sources of them.
    """
    faults = Faults()
    if values.eval_dataset_path and values.eval_fraction:
        faults.add("--eval_dataset_path and --eval_fraction exclude each other: give one")
    if not 0 <= values.eval_fraction < 1:
        faults.add(f"--eval_fraction {values.eval_fraction} must be at least 0 and below 1")
    asks_for_evaluation = {
        "load_best_model_at_end": values.load_best_model_at_end,
        "eval_on_start": values.eval_on_start,
        "save_strategy best": values.save_strategy == "best",
        f"eval_strategy {values.eval_strategy}": values.eval_strategy != "no",
    }
    flag = next((name for name, is_given in asks_for_evaluation.items() if is_given), None)
    if flag and not (values.eval_dataset_path or values.eval_fraction):
        faults.add(f"--{flag} needs rows to evaluate on: give --eval_dataset_path or --eval_fraction")
    faults.report()


def check_reporters(values: Namespace) -> None:
    """
    Check that what --report_to names is installed.

    Raises:
        UsageError: --report_to names something that does not exist or is not installed.
    """
    reporters = values.report_to if isinstance(values.report_to, list) else [values.report_to]
    named = set(reporters) - {"none", "all", None}
    if unknown := sorted(named - set(INTEGRATION_TO_CALLBACK)):
        known = ", ".join(INTEGRATION_TO_CALLBACK)
        raise UsageError(f"--report_to {' '.join(unknown)} is unknown: give none, or some of {known}")
    if missing := sorted(named - set(get_available_reporting_integrations())):
        names = " ".join(missing)
        # With later versions of swanlab transformers' callback asks for a run that does not exist yet.
        packages = names.replace("swanlab", '"swanlab<0.8"')
        raise UsageError(f"--report_to {names}: not installed; pip install {packages}, or give none")


@contextlib.contextmanager
def as_usage_error(flags: str) -> Iterator[None]:
    """
    Turn a library's error about the values of `flags` into a UsageError.

    The block must do nothing but check the values.

    Raises:
        UsageError: the library refused the values; with its reason.
    """
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, NotImplementedError,
            ImportError, OSError) as error:  # fmt: skip
        raise UsageError(f"{flags}: {' '.join(str(error).split()) or type(error).__name__}") from error


def count_steps(items: int, args: TrainingArguments) -> int:
    """
    Return the optimizer steps over `items` rows or packs.

    Trainer counts them in the same way.
    """
    if args.max_steps > 0:
        return args.max_steps
    whole = math.floor if args.dataloader_drop_last else math.ceil
    micro_batches = whole(items / (args.per_device_train_batch_size * args.world_size))
    return math.ceil(args.num_train_epochs * math.ceil(micro_batches / args.gradient_accumulation_steps))


def check_training_arguments(args: TrainingArguments, dataset: datasets.Dataset, pack_tokens: int | None) -> None:
    """
    Check the resolved arguments of Trainer.

    Args:
        pack_tokens: None if rows are padded.

    Raises:
        UsageError: no step can be made; optimizer or schedule cannot be built, or give a learning rate that is not a
            number; a DeepSpeed file contradicts the flags; or a fault that libraries would find after loading the
            model.
    """
    faults, items = Faults(), len(dataset)
    if args.dataloader_drop_last:
        items = len(pack_rows(row_lengths(dataset), pack_tokens, args.seed)) if pack_tokens else items
        if items < (batch := args.per_device_train_batch_size * args.world_size):
            unit = "packs" if pack_tokens else "rows"
            faults.add(f"--dataloader_drop_last leaves no batch of {items} {unit}, as one has {batch}: leave it out")
    if args.dataloader_num_workers == 0:
        for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
            if getattr(args, name):
                faults.add(f"--{name} {getattr(args, name)} needs --dataloader_num_workers 1 or more")
    with faults.collect():
        check_schedule(args, max(count_steps(items, args), 1))
    config = getattr(args, "hf_deepspeed_config", None)
    mismatches = config.mismatches if config else []
    for mismatch in mismatches:
        text = mismatch.removeprefix("- ds ").replace(" vs hf ", " does not fit ")
        faults.add(f'--deepspeed {args.deepspeed}: {text} of the flags: write "auto" there, or change the flag')
    if args.save_only_model and args.load_best_model_at_end and args.deepspeed_plugin is not None:
        faults.add("--save_only_model and --load_best_model_at_end exclude each other under DeepSpeed: drop one")
    kwargs = args.gradient_checkpointing_kwargs or {}
    if not isinstance(kwargs, dict) or (unknown := set(kwargs) - CHECKPOINTING_KEYS):
        named = ", ".join(sorted(unknown)) if isinstance(kwargs, dict) else kwargs
        faults.add(f"--gradient_checkpointing_kwargs {named}: give some of {', '.join(sorted(CHECKPOINTING_KEYS))}")
    faults.report()


def check_schedule(args: TrainingArguments, steps: int) -> None:
    """
    Build optimizer and schedule for one parameter, and follow the schedule.

    Raises:
        UsageError: see `check_training_arguments`.
    """
    module = torch.nn.Module()
    module.register_parameter("weight", torch.nn.Parameter(torch.zeros(2, 2)))
    trainer = SimpleNamespace(  # what Trainer's create_optimizer and create_scheduler read and write
        args=args, model=module, optimizer=None, lr_scheduler=None, optimizer_cls_and_kwargs=None,
        get_decay_parameter_names=lambda _: ["weight"],
        get_optimizer_cls_and_kwargs=Trainer.get_optimizer_cls_and_kwargs,
    )  # fmt: skip
    with as_usage_error(
        f"--optim {args.optim.value}" + (f" --optim_args {args.optim_args}" if args.optim_args else "")
    ):
        Trainer.create_optimizer(trainer)
    flags = f"--lr_scheduler_type {args.lr_scheduler_type.value}"
    if args.lr_scheduler_kwargs:
        flags += f" --lr_scheduler_kwargs {args.lr_scheduler_kwargs}"
    with as_usage_error(flags):
        Trainer.create_scheduler(trainer, steps)
        sampled_steps = sorted({(steps - 1) * number // 32 for number in range(33)})
        factors = [
            factor(step) for factor in getattr(trainer.lr_scheduler, "lr_lambdas", ()) for step in sampled_steps
        ]
    if factors and not (all(map(math.isfinite, factors)) and min(factors) >= 0 < max(factors)):
        raise UsageError(
            f"{flags}: --learning_rate would be multiplied by {min(factors):g} to {max(factors):g} in all {steps} "
            "steps: give other --lr_scheduler_kwargs, or fewer --warmup_steps"
        )
