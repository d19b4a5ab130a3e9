"""
The Trainer of this toolkit, the same under every launcher: it trains an adapter on a frozen base.

In: a `RunConfig`. Out: an `AdapterTrainer` (`make_trainer`), which writes whole checkpoints and a verified adapter.
Called by the training script and, for its trial steps, by dry_run.py. transformers' Trainer alone would save a model
where an adapter is trained, write checkpoints in place, and find out that all steps are made one step too late.
"""

import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.optim.lr_scheduler import LRScheduler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

from utils.common.console import Progress, print_line
from utils.common.errors import RunError
from utils.common.processes import launched_by_accelerate_with_fsdp, local_rank, process_rank
from utils.data.arrow_reader import row_lengths
from utils.data.collators import RowsByLength
from utils.distributed.collectives import barrier, gather_from_all
from utils.distributed.deepspeed_setup import announce_build
from utils.lora.adapter import save_adapter
from utils.training.arguments import BY_LENGTH
from utils.training.batches import Batches
from utils.training.callbacks import ExactOffload, LossCurves, StepTimer
from utils.training.checkpoints import (
    STAGING,
    find_damage,
    list_checkpoints,
    publish,
    remove,
    rotate,
    save_sealed,
    step_of,
)
from utils.training.fsdp_weights import configure_fsdp, fill_shards
from utils.training.log_lines import LogEnds, LogLines, mean_loss
from utils.training.loss_figure import title_of_run
from utils.training.model_card import write_model_card
from utils.training.nan_guard import GuardedTrainer
from utils.training.optimize import decoder_blocks
from utils.training.prepare_model import prepare_model
from utils.training.run_config import RunConfig, data_seed, global_batch
from utils.training.throughput import Throughput

# Trainer accumulates gradients itself and gives accelerate the number 1, which is then none of DeepSpeed's.
logging.getLogger("accelerate.accelerator").addFilter(lambda record: "steps mismatch" not in record.getMessage())


def make_trainer(config: RunConfig, batches: Batches, callbacks: list[TrainerCallback]) -> "AdapterTrainer":
    """Load the model to train on these batches."""
    plugin = config.training_args.deepspeed_plugin
    if plugin and plugin.hf_ds_config.get_value("zero_optimization.offload_optimizer.device", "none") != "none":
        announce_build("cpu_adam")
    return AdapterTrainer(config, prepare_model(config), batches, callbacks)


def _mark_dynamic(inputs: dict[str, Any]) -> None:
    """
    Tell the compiler which shape in a packed batch varies.

    It is the number of ChatGLM-6B's prefix tokens.
    """
    if "prefix_tokens" in inputs:
        torch._dynamo.maybe_mark_dynamic(inputs["prefix_tokens"], 0)


# Private methods of Trainer that AdapterTrainer and GuardedTrainer override.
TRAINER_HOOKS = (
    "_get_train_sampler",  # rows ordered by length
    "_get_grad_norm",  # once per optimizer step, between the backward pass and the optimizer
    "_maybe_log_save_evaluate",  # after each optimizer step
    "_init_training_state",  # once per run, after a checkpoint's state was read
    "_run_epoch",  # once per epoch
    "_save_checkpoint",  # writes checkpoint-N into `_get_output_dir`
    "_get_output_dir",
    "_load_best_model",  # once, after the last step
)


class AdapterTrainer(GuardedTrainer):
    """
    Trains an adapter, and saves it where Trainer would save a model.

    The adapter is gathered and verified. Checkpoints appear whole, each with the run's resume key.
    """

    def __init__(self, config: RunConfig, model: PeftModel, batches: Batches, callbacks: list[TrainerCallback]):
        self.throughput = Throughput.of(model.get_base_model(), decoder_blocks(model))
        self.eval_collator = batches.eval_collator
        super().__init__(
            model=model,
            args=config.training_args,
            train_dataset=batches.items,
            eval_dataset=batches.eval_items,
            data_collator=batches.collator,
            callbacks=callbacks,
            rows=config.inputs.dataset,
            tokenizer=config.inputs.tokenizer,
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.lines = LogLines(padded=not config.flags.packing)
        title = title_of_run(
            config.flags.model_name_or_path, len(config.inputs.dataset), f"LoRA rank {config.flags.lora_rank}"
        )
        for callback in (StepTimer(self.throughput), ExactOffload(), LogEnds(), self.lines, LossCurves(title)):
            self.add_callback(callback)
        self.run_config = config
        self.origin, self.resume_key = config.inputs.origin, config.resume_key
        self.staging = Path(self.args.output_dir) / STAGING
        self.resumed_from: Path | None = None
        self.saved_step: int | None = None

    def train(self, resume_from_checkpoint: str | None = None, *args, **kwargs):
        """
        Train like Trainer.

        A run that had made all of its steps makes none.
        """
        if resume_from_checkpoint:
            self.resumed_from = Path(resume_from_checkpoint)
            self.saved_step = step_of(self.resumed_from)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.lines.close()

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Count a micro batch's tokens; return its loss after the backward pass."""
        _mark_dynamic(inputs)
        self.throughput.count(inputs.pop("real_tokens"), inputs["input_ids"].numel(), len(inputs["target_ids"]))
        return super().training_step(model, inputs, num_items_in_batch)

    def floating_point_ops(self, inputs) -> float:
        """
        Return those of the last micro batch, as `mfu` counts them.

        Trainer misses sharded and integer weights.
        """
        return self.throughput.batch_flops

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Return loss and perplexity over all target tokens of the evaluation rows.

        Each token counts once, however rows fall on batches and processes; Trainer would pad the last batches with
        rows counted twice, and average batches. Every process must call it, and makes the same number of forward
        passes, which ZeRO-3 needs.

        Returns:
            `eval_loss` (nats a target token), `eval_perplexity`, `eval_tokens` and `eval_runtime` (seconds).
        """
        started = time.perf_counter()
        rows, size = self.eval_dataset, self.args.per_device_eval_batch_size
        starts = range(0, len(rows), size)
        own_starts = list(starts[process_rank() :: self.args.world_size])
        self.model_wrapped.eval()
        total, tokens = 0.0, 0
        turns = math.ceil(len(starts) / self.args.world_size)
        with Progress("evaluating", turns, "batches").shown() as progress:
            for turn in range(turns):
                start = own_starts[turn] if turn < len(own_starts) else 0  # else a batch that another process counts
                batch = self.eval_collator([rows[i] for i in range(start, min(start + size, len(rows)))])
                inputs = self._prepare_inputs(batch)
                _mark_dynamic(inputs)
                inputs.pop("real_tokens")
                summed = self.model_wrapped(**inputs, num_items_in_batch=1).loss
                if turn < len(own_starts):
                    total += summed.item()
                    tokens += len(inputs["target_ids"])
                progress.advance()
        self.model_wrapped.train()
        totals, counts = zip(*gather_from_all((total, tokens)), strict=True)
        loss = sum(totals) / sum(counts)
        seconds = time.perf_counter() - started
        self.throughput.exclude(seconds)
        values = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": sum(counts)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(seconds, 2)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        Add speed and memory since the last log line.

        The summary gets those of the whole run after its first step. Its `train_loss` is `mean_loss`, also of steps
        before a resume: Trainer's own is that of one process, and of the steps since.
        """
        if "loss" in logs:
            logs |= self.throughput.measure()
            seconds_left = self.throughput.seconds_left(self.state.max_steps - self.state.global_step)
            logs |= {} if seconds_left is None else {"seconds_left": seconds_left}
        elif "train_runtime" in logs:
            logs.pop("train_loss")
            loss = mean_loss(self.state.log_history)
            logs |= {} if loss is None else {"train_loss": loss}
            if not self.made_a_step:  # the summary of the run that made the steps stays
                return
            logs |= self.throughput.measure(whole_run=True)
            logs["first_step_seconds"] = round(self.throughput.first_step_seconds, 2)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Write the adapter, into a checkpoint or as the run's result.

        The run's result appears whole.
        """
        if _internal_call:
            save_adapter(self.model, output_dir, self.origin, self.args.should_save)
            if self.args.should_save:
                write_model_card(output_dir, self.run_config, self.state, self.state.global_step)
            return
        self.check_losses()
        staged = self.staging / "adapter"
        if self.args.should_save:
            remove(self.staging)
        save_adapter(self.model, staged, self.origin, self.args.should_save, trained=True)
        if self.args.should_save:
            loads_best = self.args.load_best_model_at_end and self.state.best_global_step
            step = self.state.best_global_step if loads_best else self.state.global_step
            write_model_card(staged, self.run_config, self.state, step)
            publish(staged, Path(output_dir or self.args.output_dir))
            remove(self.staging)

    # What we rely on in Trainer
    #
    # The methods below are Trainer's own hooks, private ones among them, which no public method replaces. Together
    # with those of GuardedTrainer they are the names in TRAINER_HOOKS; a test checks that Trainer (transformers 5.24)
    # has them, and that we override no other private method of it.

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, which shards by FSDP2 where accelerate's config says so."""
        super().create_accelerator_and_postprocess()
        configure_fsdp(self.accelerator)
        self.is_fsdp_enabled = launched_by_accelerate_with_fsdp()

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """
        Fill FSDP2's shards, then make the scheduler.

        Trainer calls it once accelerate has sharded the model, and before it reads a checkpoint to resume from.
        """
        if self.is_fsdp_enabled and any(weight.is_meta for weight in self.model.parameters()):
            offloads = isinstance(self.accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
            device = torch.device("cpu") if offloads else self.accelerator.device
            fill_shards(self.model, self.run_config.inputs.checkpoint, self.run_config.dtype, device)
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler | None:
        if self.args.train_sampling_strategy != BY_LENGTH:
            return super()._get_train_sampler(train_dataset)
        return RowsByLength(row_lengths(self.train_dataset), global_batch(self.args), data_seed(self.args))

    def _init_training_state(self, *args, **kwargs) -> tuple[int, int]:
        """
        Look for the best checkpoint beside the one that resumes.

        Both may have been moved since they were written.
        """
        resumed_at = super()._init_training_state(*args, **kwargs)
        if self.resumed_from and self.state.best_global_step:
            best = self.resumed_from.with_name(f"checkpoint-{self.state.best_global_step}")
            if best.is_dir() or not self.state.best_model_checkpoint:
                self.state.best_model_checkpoint = str(best)
        return resumed_at

    def _run_epoch(self, *, model, trial, epoch, train_dataloader, **kwargs) -> None:
        """
        Run an epoch with its own order of rows, and end a run whose steps are all made.

        When a run of several processes resumes within an epoch, Trainer wraps the batches once more, and the epoch's
        number no longer reaches our sampler. It checks for the last step only after another one.
        """
        train_dataloader.set_epoch(epoch)
        if self.state.global_step >= self.state.max_steps:
            print_line(f"all {self.state.max_steps} steps are made: saving the adapter")
            self.control.should_training_stop = True
            return
        super()._run_epoch(model=model, trial=trial, epoch=epoch, train_dataloader=train_dataloader, **kwargs)
        # With --save_strategy best Trainer saves nothing else, also where a signal stopped the run.
        is_last = self.control.should_training_stop or self.state.global_step >= self.state.max_steps
        if is_last and self.args.save_strategy == SaveStrategy.BEST and self.saved_step != self.state.global_step:
            self._save_checkpoint(model, trial)

    def _load_best_model(self) -> None:
        """
        Load the checkpoint with the lowest loss.

        Raises:
            RunError: the best checkpoint is damaged.
        """
        if self.state.global_step < self.state.max_steps:  # a signal stopped the run, and no adapter is saved
            return
        best = Path(self.state.best_model_checkpoint)
        damage = find_damage(best) if local_rank() == 0 else None
        damage = next(filter(None, gather_from_all(damage)), None)
        if damage:
            whole = [path.name for path in list_checkpoints(Path(self.args.output_dir)) if not find_damage(path)]
            raise RunError(
                f"{best}, the checkpoint with the lowest loss, is damaged: {damage}. No adapter is saved. To save "
                "that of the last step, give --resume_from_checkpoint latest without --load_best_model_at_end; whole "
                f"checkpoints, each usable as --adapter_path: {', '.join(whole) or 'none'}"
            )
        super()._load_best_model()

    def _get_output_dir(self, trial) -> str:
        """
        Return the directory in which Trainer writes checkpoints.

        Trainer finds no old ones there to remove.
        """
        return str(self.staging)

    def _save_checkpoint(self, model, trial) -> None:
        """
        Let Trainer write its checkpoint, and move it to its place.

        It is written into the staging directory and moved when it is complete.
        """
        if local_rank() == 0:  # a killed run may have left something there
            remove(self.staging)
        barrier()
        staged = self.staging / f"checkpoint-{self.state.global_step}"
        final = Path(self.args.output_dir) / staged.name
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                self.resume_key.write(staged)
            save_sealed(staged, final)
        except Exception:
            if local_rank() == 0:  # it may be what fills the disk
                shutil.rmtree(self.staging, ignore_errors=True)
            raise
        if self.args.should_save:
            rotate(final, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.saved_step = self.state.global_step
