"""
Resolves the flags of a training run into one `RunConfig`: what will run, and why.

In: the command line, and what launchers put into the environment. Out: a `RunConfig`, read by the training script,
trainer.py, memory.py, dry_run.py, run_report.py and run_log.py. `resolve_run` has the order that libraries need, each
step with its reason.
"""

import os
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from utils.checkpoint.directory import choose_generation
from utils.common.processes import (
    launched_by_accelerate_with_deepspeed,
    launched_by_accelerate_with_fsdp,
)
from utils.data.arrow_reader import fingerprint_rows
from utils.distributed.process_group import init_process_group
from utils.training.argument_checks import as_usage_error, check_training_arguments
from utils.training.argument_notes import describe_surprises
from utils.training.arguments import (
    BY_LENGTH,
    CHECKPOINTING_FLAGS,
    FinetuneArguments,
    build_arguments,
    checkpointing_flag,
    make_parser,
)
from utils.training.preflight import TrainingInputs, open_inputs
from utils.training.resume_key import ResumeKey, describe_schedule

RESUME_ADVICE = "resume with --resume_from_checkpoint latest"


@dataclass(frozen=True)
class RunConfig:
    """
    A training run: opened inputs, flags, and what was resolved from them.

    Args:
        dtype: of the base model's weights.
        checkpointing: what the flags say of gradient checkpointing; None: the memory estimate decides.
        reasons: setting ("dtype", "compile_layers") -> why it has its value.
        notes: flags whose values surprise, each with what it does.
    """

    inputs: TrainingInputs
    flags: FinetuneArguments  # `compile_layers` and `lora_target_modules` are resolved
    training_args: TrainingArguments
    dtype: torch.dtype
    resume_key: ResumeKey
    checkpointing: bool | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def pack_tokens(self) -> int | None:
        """Maximum tokens of a packed sequence; None if rows are padded."""
        return self.flags.pack_tokens if self.flags.packing else None

    @property
    def launcher(self) -> str:
        """
        How the processes share the work, for a person.

        One of "DeepSpeed ZeRO-3" or another stage, "FSDP2", "DDP" and "one process".
        """
        if self.training_args.deepspeed_plugin is not None:
            return f"DeepSpeed ZeRO-{self.training_args.deepspeed_plugin.zero_stage}"
        if launched_by_accelerate_with_fsdp():
            return "FSDP2"
        return "DDP" if self.training_args.world_size > 1 else "one process"


def resolve_run(argv: list[str], description: str) -> RunConfig:
    """
    Return the run that the command line asks for; join the processes.

    Nothing is written.

    The order is fixed, as each step changes what a later one reads.

    Raises:
        UsageError: the request cannot be served; every fault that can be found is in it.
    """
    parser = make_parser(description)
    values, faults = parser.parse_with_faults(argv)
    choose_generation(values.model_name_or_path, values.generation)  # before the checkpoint is opened
    with faults.collect():
        inputs = open_inputs(values)  # all faults at once, before processes wait for one another
    faults.report()
    checkpointing = checkpointing_flag(values)  # before TrainingArguments replaces None by False
    configure_evaluation(values)
    dtype, dtype_reason = resolve_precision(values)  # before accelerate and DeepSpeed read it from the environment
    uses_deepspeed = bool(values.deepspeed) or launched_by_accelerate_with_deepspeed()
    init_process_group(uses_deepspeed, advice=RESUME_ADVICE)  # before TrainingArguments: it says why
    configure_trainer(values)
    with as_usage_error("the training flags"):
        flags, training_args = build_arguments(parser, values)
    check_training_arguments(training_args, inputs.dataset, flags.pack_tokens if flags.packing else None)
    if values.accelerator_config is None and not values.use_cpu:
        # Batches in pinned memory are copied to the GPU during the step before.
        training_args.accelerator_config.non_blocking = training_args.dataloader_pin_memory
    flags.compile_layers, compile_reason = resolve_compile(flags, training_args)
    pack_tokens = flags.pack_tokens if flags.packing else None
    schedule = describe_schedule(training_args, dtype, pack_tokens, inputs.eval_dataset)
    return RunConfig(
        inputs=inputs,
        flags=flags,
        training_args=training_args,
        dtype=dtype,
        resume_key=ResumeKey(describe_identity(flags, inputs), schedule),
        checkpointing=checkpointing,
        reasons={"dtype": dtype_reason, "compile_layers": compile_reason},
        notes=describe_surprises(training_args, inputs, pack_tokens),
    )


def configure_evaluation(values: Namespace) -> None:
    """
    Set the flags of evaluation that were not given, in `values`.

    Batches are like those of training. With rows to evaluate on, each checkpoint follows an evaluation, and the lowest
    loss is the best.
    """
    if values.per_device_eval_batch_size is None:
        values.per_device_eval_batch_size = values.per_device_train_batch_size
    if not (values.eval_dataset_path or values.eval_fraction):
        return
    if values.eval_strategy == "no":
        values.eval_strategy = "epoch" if values.save_strategy == "epoch" else "steps"
    if values.eval_steps is None and values.eval_strategy == "steps" and values.save_strategy == "steps":
        values.eval_steps = values.save_steps
    values.metric_for_best_model = values.metric_for_best_model or "loss"
    values.greater_is_better = False


def resolve_precision(values: Namespace) -> tuple[torch.dtype, str]:
    """
    Return the dtype of the base model's weights and what decided it.

    Sets `values.fp16` and `.bf16`, and the environment that accelerate and DeepSpeed read, to match: flag,
    accelerate's ACCELERATE_MIXED_PRECISION and DeepSpeed's "auto" then agree. The flags decide; without one,
    accelerate's config file does. float16 needs a GPU: without one it becomes float32.
    """
    source = "flag"
    if not values.fp16 and not values.bf16:
        source = "accelerate config"
        configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        values.fp16, values.bf16 = configured == "fp16", configured == "bf16"
    precision = "fp16" if values.fp16 else "bf16" if values.bf16 else "no"
    reason = "no --fp16 or --bf16" if precision == "no" else f"{precision} by {source}"
    if values.fp16 and not torch.cuda.is_available():
        values.fp16, precision, reason = False, "no", f"fp16 by {source} needs a GPU and there is none"
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}[precision], reason


def configure_trainer(values: Namespace) -> None:
    """Set, in `values`, the flags of TrainingArguments that this training decides itself."""
    values.use_cpu = values.use_cpu or not torch.cuda.is_available()  # else accelerate makes each process a world of 1
    if values.dataloader_num_workers is None:  # for a GPU, a process of its own prepares batches ahead
        values.dataloader_num_workers = 0 if values.use_cpu else 1
    values.ddp_broadcast_buffers = False  # no buffer changes in training
    values.ddp_find_unused_parameters = False  # every weight of the adapter is used in every step
    values.logging_nan_inf_filter = False  # a loss that is not finite ends the run
    values.remove_unused_columns = False  # the dataset has only the columns that the collator reads
    if values.packing and values.train_sampling_strategy == BY_LENGTH:  # packs all have one length
        values.train_sampling_strategy = "random"


def resolve_compile(flags: FinetuneArguments, args: TrainingArguments) -> tuple[bool, str]:
    """
    Return whether decoder blocks are compiled, and why.

    Default of --compile_layers: on if batches have a static shape (packing) and training runs on a GPU.
    """
    if flags.compile_layers is not None:
        return flags.compile_layers, "by --compile_layers"
    if not flags.packing:
        return False, "batches of varying shape, no --packing"
    return not args.use_cpu, "no GPU" if args.use_cpu else "packing on a GPU"


def describe_identity(flags: FinetuneArguments, inputs: TrainingInputs) -> dict[str, Any]:
    """Return the identity of a run's resume key: what it trains."""
    return {
        "lora_rank": flags.lora_rank,
        "lora_alpha": flags.lora_alpha,
        "lora_dropout": flags.lora_dropout,
        "lora_target_modules": flags.lora_target_modules,
        "base": inputs.origin.base,
        "template": inputs.origin.template,
        "rows": fingerprint_rows(inputs.dataset),
        "quantize": flags.quantize,
        "generation": inputs.checkpoint.generation.name,
    }


def global_batch(args: TrainingArguments) -> int:
    """Return the rows, or packs, of an optimizer step over all processes."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def data_seed(args: TrainingArguments) -> int:
    """Return the seed of the order of rows."""
    return args.seed if args.data_seed is None else args.data_seed


def set_gradient_checkpointing(args: TrainingArguments, checkpointing: bool) -> None:
    """Set gradient checkpointing under both of its names."""
    for name in CHECKPOINTING_FLAGS:
        if hasattr(args, name):
            setattr(args, name, checkpointing)
