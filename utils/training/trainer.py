"""The Trainer as this toolkit needs it, also for FSDP2 as accelerate brings it."""

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

from utils.common.errors import RunError
from utils.common.processes import launched_by_accelerate_with_fsdp, local_rank, print_once, process_rank
from utils.data.arrow_reader import row_lengths
from utils.data.collators import RowsByLength
from utils.distributed.collectives import barrier, gather_from_all
from utils.lora.adapter import AdapterOrigin, save_adapter
from utils.training.callbacks import Bar, Curves, ExactOffload, StepEnd
from utils.training.checkpoints import (
    RESUME_FILE,
    STAGING,
    find_damage,
    list_checkpoints,
    publish,
    remove,
    rotate,
    save_sealed,
    step_of,
)
from utils.training.nan_guard import GuardedTrainer
from utils.training.resume_settings import Settings
from utils.training.run_config import BY_LENGTH, data_seed, global_batch
from utils.training.throughput import Throughput


def settle_fsdp(accelerator: Accelerator) -> None:
    """
    Shards by `fully_shard` where accelerate's config says so: on CPUs, where accelerate would fall back to DDP in
    silence, too. Every parameter is gathered in its own dtype: the base has the one to compute in, the adapter is
    float32 and so are its gradients' sums. accelerate's policy would cast all to the run's dtype, the loss with them.
    """
    if not launched_by_accelerate_with_fsdp():
        return
    state = accelerator.state
    if state.distributed_type is not DistributedType.FSDP:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin.mixed_precision_policy = None


def _mark_dynamic(inputs: dict[str, Any]) -> None:
    """Tells the compiler of the one shape in a packed batch that differs from the next one's."""
    if "prefix_tokens" in inputs:
        torch._dynamo.maybe_mark_dynamic(inputs["prefix_tokens"], 0)


class AdapterTrainer(GuardedTrainer):
    """
    Saves the adapter, gathered and verified, where Trainer would save a model, the same under every launcher; and
    checkpoints that appear whole, with the settings of the run.
    """

    def __init__(
        self,
        *args,
        origin: AdapterOrigin,
        settings: Settings,
        blocks: list[torch.nn.Module],
        eval_collator: Callable[[Sequence], dict[str, Any]] | None = None,
        **kwargs,
    ):
        self.throughput = Throughput.of(kwargs["model"].get_base_model(), blocks)
        self.eval_collator = eval_collator
        super().__init__(*args, **kwargs)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.bar = Bar()
        for callback in (StepEnd(self.throughput), ExactOffload(), self.bar, Curves()):
            self.add_callback(callback)
        self.origin, self.settings = origin, settings
        self.staging = Path(self.args.output_dir) / STAGING
        self.resumed_from: Path | None = None
        self.saved_step: int | None = None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        settle_fsdp(self.accelerator)
        self.is_fsdp_enabled = launched_by_accelerate_with_fsdp()

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler | None:
        if self.args.train_sampling_strategy != BY_LENGTH:
            return super()._get_train_sampler(train_dataset)
        return RowsByLength(row_lengths(self.train_dataset), global_batch(self.args), data_seed(self.args))

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        _mark_dynamic(inputs)
        self.throughput.count(inputs.pop("real_tokens"), inputs["input_ids"].numel(), len(inputs["target_ids"]))
        return super().training_step(model, inputs, num_items_in_batch)

    def floating_point_ops(self, inputs) -> float:
        """Of the last micro-batch, as `mfu` counts them: Trainer's miss weights in shards or integers."""
        return self.throughput.batch_flops

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Loss and perplexity over all target tokens of the evaluation rows, each counted once, however rows fall on
        batches and processes. Every process must call it; each passes through its model equally often.

        Returns:
            `eval_loss` (nats a target token), `eval_perplexity`, `eval_tokens` and `eval_runtime` (seconds).
        """
        started = time.perf_counter()
        rows, size = self.eval_dataset, self.args.per_device_eval_batch_size
        starts = range(0, len(rows), size)
        mine = list(starts[process_rank() :: self.args.world_size])
        self.model_wrapped.eval()
        total, tokens = 0.0, 0
        for turn in range(math.ceil(len(starts) / self.args.world_size)):
            start = mine[turn] if turn < len(mine) else 0  # a batch that another process counts
            batch = self.eval_collator([rows[i] for i in range(start, min(start + size, len(rows)))])
            inputs = self._prepare_inputs(batch)
            _mark_dynamic(inputs)
            inputs.pop("real_tokens")
            summed = self.model_wrapped(**inputs, num_items_in_batch=1).loss
            if turn < len(mine):
                total += summed.item()
                tokens += len(inputs["target_ids"])
        self.model_wrapped.train()
        totals, counts = zip(*gather_from_all((total, tokens)), strict=True)
        loss = sum(totals) / sum(counts)
        seconds = time.perf_counter() - started
        self.throughput.leave_out(seconds)
        values = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": sum(counts)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(seconds, 2)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds speed and memory since the last such line, and in the summary those of the run after its first step."""
        if "loss" in logs:
            logs |= self.throughput.read()
            left = self.throughput.seconds_left(self.state.max_steps - self.state.global_step)
            logs |= {} if left is None else {"seconds_left": left}
        elif "train_runtime" in logs:
            if not self.made_a_step:  # what the run that made them said of itself stays
                return
            logs |= self.throughput.read(whole_run=True)
            logs["first_step_seconds"] = round(self.throughput.first_step_seconds, 2)
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | None = None, *args, **kwargs):
        """As Trainer's; a run that had made all of its steps makes none."""
        if resume_from_checkpoint:
            self.resumed_from = Path(resume_from_checkpoint)
            self.saved_step = step_of(self.resumed_from)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.bar.close()

    def _init_training_state(self, *args, **kwargs) -> tuple[int, int]:
        """The best checkpoint is looked for beside the one that the run goes on from: both may have been moved."""
        resumed_at = super()._init_training_state(*args, **kwargs)
        if self.resumed_from and self.state.best_global_step:
            best = self.resumed_from.with_name(f"checkpoint-{self.state.best_global_step}")
            if best.is_dir() or not self.state.best_model_checkpoint:
                self.state.best_model_checkpoint = str(best)
        return resumed_at

    def _run_epoch(self, *, model, trial, **kwargs) -> None:
        """Trainer would look whether all steps are made after another one only."""
        if self.state.global_step >= self.state.max_steps:
            print_once(f"all {self.state.max_steps} steps are made: saving the adapter")
            self.control.should_training_stop = True
            return
        super()._run_epoch(model=model, trial=trial, **kwargs)
        # With --save_strategy best Trainer saves nothing else, also where a signal stopped the run.
        is_last = self.control.should_training_stop or self.state.global_step >= self.state.max_steps
        if is_last and self.args.save_strategy == SaveStrategy.BEST and self.saved_step != self.state.global_step:
            self._save_checkpoint(model, trial)

    def _load_best_model(self) -> None:
        """
        Raises:
            RunError: the best checkpoint is not as it was written.
        """
        if self.state.global_step < self.state.max_steps:  # a signal stopped the run, and no adapter is saved
            return
        best = Path(self.state.best_model_checkpoint)
        damage = find_damage(best) if local_rank() == 0 else None
        damage = next(filter(None, gather_from_all(damage)), None)
        if damage:
            whole = [path.name for path in list_checkpoints(Path(self.args.output_dir)) if not find_damage(path)]
            raise RunError(
                f"{best}, the checkpoint with the lowest loss, is damaged: {damage}. No adapter is saved. For that of "
                "the last step give --resume_from_checkpoint latest without --load_best_model_at_end; whole are "
                f"{', '.join(whole) or 'none'}, each an --adapter_path as it is"
            )
        super()._load_best_model()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Of a checkpoint, into `output_dir`; by default the run's adapter, which appears whole."""
        if _internal_call:
            save_adapter(self.model, output_dir, self.origin, self.args.should_save)
            return
        self.check_losses()
        staged = self.staging / "adapter"
        if self.args.should_save:
            remove(self.staging)
        save_adapter(self.model, staged, self.origin, self.args.should_save, trained=True)
        if self.args.should_save:
            publish(staged, Path(output_dir or self.args.output_dir))
            remove(self.staging)

    def _get_output_dir(self, trial) -> str:
        """Where Trainer writes checkpoints, and removes old ones, of which there are none."""
        return str(self.staging)

    def _save_checkpoint(self, model, trial) -> None:
        """Lets Trainer write its checkpoint apart, and moves it to its place when it is complete."""
        if local_rank() == 0:  # what a killed run left
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
                (staged / RESUME_FILE).write_text(json.dumps(self.settings, indent=1), encoding="utf-8")
            save_sealed(staged, final)
        except Exception:
            if local_rank() == 0:  # it may be what fills the disk
                shutil.rmtree(self.staging, ignore_errors=True)
            raise
        if self.args.should_save:
            rotate(final, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.saved_step = self.state.global_step
