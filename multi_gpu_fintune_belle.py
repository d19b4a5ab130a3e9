"""
torchrun --nproc_per_node=2 multi_gpu_fintune_belle.py --dataset_path data/alpaca --lora_rank 8 \\
    --per_device_train_batch_size 1 --gradient_accumulation_steps 2 --learning_rate 2e-5 --fp16 --num_train_epochs 2 \\
    --save_steps 1000 --save_total_limit 2 --logging_steps 50 --output_dir output --deepspeed ds_config_zero3.json

LoRA fine-tuning of ChatGLM-6B, 2, 3 and GLM-4-9B on a dataset written by tokenize_dataset_rows_belle.py. The launcher
decides how processes share the work: torchrun with --deepspeed is ZeRO, without it plain DDP; accelerate launch brings
its own configuration; python alone is one process. Besides the flags below it takes those of transformers'
TrainingArguments. The adapter, a PEFT directory, is written to --output_dir.
"""

import json
import sys
from pathlib import Path

from utils.common.script import run

from utils.common.console import WARNING, print_facts, print_line, print_next
from utils.common.processes import is_main_process
from utils.distributed.process_group import shut_down
from utils.training.batches import make_batches
from utils.training.callbacks import StopOnSignal
from utils.training.checkpoints import claim, find_resumable, set_aside_later, start_afresh
from utils.training.dry_run import plan
from utils.training.memory import MemoryDecision, resolve_checkpointing
from utils.training.run_config import RESUME_ADVICE, RunConfig, resolve_run, set_gradient_checkpointing
from utils.training.run_log import configure_reporters, keep_log, write_run
from utils.training.run_report import describe_result, next_commands, print_run
from utils.training.trainer import make_trainer


def main() -> None:
    """Resolve the run, then plan it or train."""
    config = resolve_run(sys.argv[1:], description=__doc__.partition("\n\n")[2])
    args = config.training_args
    resume_from = None
    if args.resume_from_checkpoint:
        resume_from = find_resumable(args.resume_from_checkpoint, args.output_dir, config.resume_key)
    decision = resolve_checkpointing(config)
    set_gradient_checkpointing(args, decision.checkpointing)
    if config.flags.plan:
        plan(config, decision)
    else:
        train(config, decision, resume_from)


def train(config: RunConfig, decision: MemoryDecision, resume_from: Path | None) -> None:
    """
    Train and write the adapter; print what lies where, and the summary as JSON.

    If a signal stops the run, a checkpoint is written in place of the adapter.
    """
    args, stop = config.training_args, StopOnSignal()
    with stop.listen(), claim(args.output_dir), keep_log(args.output_dir):
        if resume_from is None:
            start_afresh(args.output_dir, config.resume_key)
        else:
            set_aside_later(args.output_dir, resume_from)
        write_run(config, resume_from)
        batches = make_batches(config)
        places = {
            "output": args.output_dir,
            "reports": configure_reporters(args.report_to, args.output_dir),
            "resuming": f"from {resume_from}" if resume_from else None,
        }
        print_run(config, batches, decision, places)
        trainer = make_trainer(config, batches, callbacks=[stop])
        result = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        if stop.stopped:
            print_line(f"stopped by {stop.stopped.name} after step {result.global_step}: {RESUME_ADVICE}", WARNING)
            return
        trainer.save_model()
        if is_main_process():
            print_facts(*describe_result(args, trainer.state, result.metrics, resume_from))
            print_next(next_commands(config.flags.model_name_or_path, args.output_dir))
            print_line(json.dumps({"output_dir": args.output_dir, "steps": result.global_step, **result.metrics}))


if __name__ == "__main__":
    run(main, after_signal="no step was made; run the same command again")
    shut_down()
