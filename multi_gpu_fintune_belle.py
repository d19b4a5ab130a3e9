"""
torchrun --nproc_per_node=2 multi_gpu_fintune_belle.py --dataset_path data/alpaca --lora_rank 8 \\
    --per_device_train_batch_size 1 --gradient_accumulation_steps 2 --learning_rate 2e-5 --fp16 --num_train_epochs 2 \\
    --save_steps 1000 --save_total_limit 2 --logging_steps 50 --output_dir output --deepspeed ds_config_zero3.json

LoRA fine-tuning of ChatGLM-6B, 2, 3 and GLM-4-9B on a dataset made by tokenize_dataset_rows_belle.py. The launcher
decides what runs: torchrun with --deepspeed is ZeRO, without it plain DDP; accelerate launch brings its own
configuration; python alone is one process. Besides the flags below it takes those of transformers' TrainingArguments.
The adapter, a PEFT directory, lands in --output_dir.
"""

import json
import sys
from argparse import Action, ArgumentDefaultsHelpFormatter
from dataclasses import dataclass, field, replace
from typing import Literal

from utils.common.script import run

import torch
from peft import PeftModel
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments

from utils.checkpoint.directory import DEFAULT_MODEL, GENERATION_FLAGS, GENERATION_HELP, choose_generation
from utils.checkpoint.model import load_model
from utils.common.processes import is_main_process, launched_by_accelerate_with_deepspeed, print_once
from utils.data.arrow_reader import fingerprint_rows
from utils.data.collators import PackingCollator, PaddingCollator
from utils.data.packing import pack_dataset
from utils.distributed.collectives import mean_over_processes
from utils.distributed.process_group import init_process_group, shut_down
from utils.layers.fp8 import FP8
from utils.layers.quantization import stored_bits
from utils.lora.adapter import LoraSettings, attach_adapter, scale_losses_under_zero3
from utils.models.family import Generation
from utils.training.argument_checks import as_usage_error, check_training_arguments
from utils.training.callbacks import StopOnSignal
from utils.training.checkpoints import claim, find_resumable, set_aside_later, start_afresh
from utils.training.dry_run import plan
from utils.training.loss import use_target_loss
from utils.training.memory import resolve_checkpointing
from utils.training.optimize import decoder_blocks, partitions_weights, settle_zero3, speed_up
from utils.training.preflight import open_request
from utils.training.resume_settings import Settings, describe_settings
from utils.training.run_config import (
    BY_LENGTH,
    TrainingRequest,
    describe_run,
    resolve_compile,
    resolve_precision,
    set_checkpointing,
    settle_evaluation,
)
from utils.training.run_log import keep_log, settle_reporters, write_run
from utils.training.trainer import AdapterTrainer

GO_ON = "go on with --resume_from_checkpoint latest"


@dataclass(kw_only=True)
class DataArguments:
    _argument_group_name = "data"

    dataset_path: str = field(metadata={"help": "dataset made by tokenize_dataset_rows_belle.py (required)"})
    eval_dataset_path: str | None = field(
        default=None, metadata={"help": "held-out rows, tokenised likewise: their loss and perplexity, the best kept"}
    )
    eval_fraction: float = field(
        default=0.0, metadata={"help": "share of --dataset_path to hold out for that instead, 0 to 1, by prompt"}
    )
    packing: bool = field(
        default=False,
        metadata={"help": "lay rows end to end: a batch then counts sequences of --pack_tokens, not rows"},
    )
    pack_tokens: int = field(default=8192, metadata={"help": "tokens of a packed sequence, at most"})


@dataclass(kw_only=True)
class ModelArguments:
    _argument_group_name = "model"

    model_name_or_path: str = field(default=DEFAULT_MODEL, metadata={"help": "checkpoint directory or hub id"})
    generation: Literal[*GENERATION_FLAGS] | None = field(default=None, metadata={"help": GENERATION_HELP})
    quantize: Literal["int8", "int4", "fp8"] | None = field(
        default=None,
        metadata={
            "help": "hold the frozen base in 8 or 4 bits (a quantised checkpoint says so itself); fp8, on Hopper GPUs "
            "and newer, is for speed"
        },
    )
    compile_layers: bool | None = field(
        default=None, metadata={"help": "compile the model's layers (with --packing on a GPU, unless it is false)"}
    )
    plan: bool = field(default=False, metadata={"help": "say what the run will be, its memory and speed, and end"})


@dataclass(kw_only=True)
class AdapterArguments:
    _argument_group_name = "adapter"

    lora_rank: int = field(default=8, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(default=32, metadata={"help": "the adapter is scaled by lora_alpha / lora_rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input, 0 to 1"})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "linear layers that get an adapter (query, key and value)"}
    )


@dataclass(kw_only=True)
class FinetuneArguments(DataArguments, ModelArguments, AdapterArguments):
    """This script's own flags."""


class DefaultsHelpFormatter(ArgumentDefaultsHelpFormatter):
    """Leaves out a default of None, of which the text says what it means."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parse_arguments(argv: list[str]):
    """Returns FinetuneArguments, TrainingArguments, what they name, and the weights' dtype; joins the processes."""
    TrainingArguments._argument_group_name = "training (transformers' TrainingArguments)"  # read by the parser
    parts = (DataArguments, ModelArguments, AdapterArguments, TrainingArguments)
    parser = HfArgumentParser(
        parts,
        usage="%(prog)s --dataset_path DIR [--FLAG VALUE ...]",
        description=__doc__.partition("\n\n")[2],
        formatter_class=DefaultsHelpFormatter,
    )
    decided = ("gradient_checkpointing", "dataloader_num_workers", "per_device_eval_batch_size")  # where no flag does
    parser.set_defaults(train_sampling_strategy=BY_LENGTH, **dict.fromkeys(decided))
    values = parser.parse_args(argv)
    choose_generation(values.model_name_or_path, values.generation)
    request = open_request(values)
    settle_evaluation(values)
    dtype = resolve_precision(values)
    by_deepspeed = bool(values.deepspeed) or launched_by_accelerate_with_deepspeed()
    init_process_group(by_deepspeed, mend=GO_ON)
    values.use_cpu = values.use_cpu or not torch.cuda.is_available()  # else accelerate makes each process a world of 1
    if values.dataloader_num_workers is None:  # beside a GPU batches are made ahead, by a process of their own
        values.dataloader_num_workers = 0 if values.use_cpu else 1
    values.ddp_broadcast_buffers = False  # none changes in training
    values.ddp_find_unused_parameters = False  # every part of an adapter is used in every step
    values.logging_nan_inf_filter = False  # such a loss ends the run
    values.remove_unused_columns = False  # the dataset has just the columns that the collator reads
    if values.packing and values.train_sampling_strategy == BY_LENGTH:  # packs are of one length
        values.train_sampling_strategy = "random"
    with as_usage_error("the training flags"):
        *ours, training_args = parser.parse_dict(vars(values))
    check_training_arguments(training_args, request.dataset, values.pack_tokens if values.packing else None)
    if values.accelerator_config is None and not values.use_cpu:
        # what lies in pinned memory is copied while the step before runs
        training_args.accelerator_config.non_blocking = training_args.dataloader_pin_memory
    training_args._n_gpu = min(training_args.n_gpu, 1)  # one process, one card: never DataParallel
    finetune_args = FinetuneArguments(**{name: value for part in ours for name, value in vars(part).items()})
    return finetune_args, training_args, request, dtype


def main() -> None:
    args, training_args, request, dtype = parse_arguments(sys.argv[1:])
    dataset, eval_dataset, origin = request.dataset, request.eval_dataset, request.origin
    args.compile_layers = resolve_compile(args.compile_layers, args.packing, training_args)
    trains = {name: value for name, value in vars(args).items() if name.startswith("lora_")}
    trains |= {"base": origin.base, "template": origin.template}
    trains |= {"rows": fingerprint_rows(dataset), "quantize": args.quantize}
    trains |= {"generation": request.checkpoint.generation.name}
    pack_tokens = args.pack_tokens if args.packing else None
    settings = describe_settings(training_args, dtype, trains, pack_tokens, eval_dataset)
    resume_from = None
    if training_args.resume_from_checkpoint:
        resume_from = find_resumable(training_args.resume_from_checkpoint, training_args.output_dir, settings)
    set_checkpointing(training_args, resolve_checkpointing(request, args, training_args, dtype))
    if args.plan:
        plan(
            request,
            args,
            training_args,
            dtype,
            lambda: make_trainer(request, args, training_args, dtype, settings, []),
        )
        return
    stop = StopOnSignal()
    with stop.listen(), claim(training_args.output_dir), keep_log(training_args.output_dir):
        if resume_from is None:
            start_afresh(training_args.output_dir, settings)
        else:
            set_aside_later(training_args.output_dir, resume_from)
        data = {"path": args.dataset_path, "rows": len(dataset), "fingerprint": trains["rows"]}
        if eval_dataset:
            data |= {"eval_rows": len(eval_dataset), "eval_fingerprint": settings["steps"]["eval_rows"]}
        write_run(training_args, vars(args), data, origin.base, resume_from)
        settle_reporters(training_args.report_to, training_args.output_dir)
        trainer = make_trainer(request, args, training_args, dtype, settings, [stop])
        result = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        if stop.stopped:
            print_once(f"stopped by {stop.stopped.name} after step {result.global_step}: {GO_ON}")
            return
        trainer.save_model()
    # Trainer counts the steps since the last log by this process's rows alone, and makes 0 of no step.
    train_loss = mean_over_processes(result.metrics.pop("train_loss"))
    if trainer.made_a_step:
        result.metrics["train_loss"] = train_loss
    if is_main_process():
        print(json.dumps({"output_dir": training_args.output_dir, "steps": result.global_step, **result.metrics}))


def make_trainer(
    request: TrainingRequest,
    args: FinetuneArguments,
    training_args: TrainingArguments,
    dtype: torch.dtype,
    settings: Settings,
    callbacks: list[TrainerCallback],
) -> AdapterTrainer:
    """Loads the model, lays the rows out in batches, and says what the run resolved."""
    checkpoint, tokenizer = request.checkpoint, request.tokenizer
    dataset, eval_dataset = request.dataset, request.eval_dataset
    model = prepare_model(args, training_args, dtype, checkpoint.generation)
    collator = eval_collator = PaddingCollator(tokenizer.pad_token_id)
    if args.packing:
        packs_a_batch = training_args.per_device_train_batch_size
        dataset, shape = pack_dataset(dataset, args.pack_tokens, training_args.seed, packs_a_batch)
        collator = PackingCollator(
            checkpoint.row_positions, tokenizer.pad_token_id, shape if args.compile_layers else None
        )
        if eval_dataset:
            packs_a_batch = training_args.per_device_eval_batch_size
            eval_dataset, shape = pack_dataset(eval_dataset, args.pack_tokens, training_args.seed, packs_a_batch)
            eval_collator = replace(collator, shape=shape if args.compile_layers else None)
    counts = (len(dataset), args.packing, *model.get_nb_trainable_parameters())
    held = f"int{checkpoint.quantization.bits}" if checkpoint.quantization else args.quantize
    print_once(describe_run(training_args, dtype, held, *counts))
    return AdapterTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        eval_collator=eval_collator,
        callbacks=callbacks,
        origin=request.origin,
        settings=settings,
        blocks=decoder_blocks(model),
        rows=request.dataset,
        tokenizer=tokenizer,
    )


def prepare_model(
    args: FinetuneArguments, training_args: TrainingArguments, dtype: torch.dtype, generation: Generation
) -> PeftModel:
    """The base model, frozen, with the adapter that trains; its loss is that of the targets alone."""
    settle_zero3(training_args, args.compile_layers)
    model = load_model(args.model_name_or_path, dtype=dtype, quantize=stored_bits(args.quantize))
    model.config.use_cache = False
    lora = LoraSettings(args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_target_modules)
    model = attach_adapter(model, lora, seed=training_args.seed)
    if partitions_weights(training_args) and dtype == torch.float16:
        scale_losses_under_zero3(model)
    if training_args.gradient_checkpointing:
        model.enable_input_require_grads()
    use_target_loss(model.get_base_model(), compiled=args.compile_layers)
    speed_up(
        model,
        generation,
        training_args,
        fp8=args.quantize == FP8,
        packing=args.packing,
        compile_layers=args.compile_layers,
    )
    return model


if __name__ == "__main__":
    run(main, after_signal="no step was made; run the same command again")
    shut_down()
