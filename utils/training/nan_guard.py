"""
Ends a run whose losses, gradients or loss scale go wrong, and names the rows that they came from.

`GuardedTrainer` is the base of trainer.py's AdapterTrainer. Numbers are checked one step later: the fused optimizer
skips a step by itself if the device finds them wrong, and the host reads them in the next step, or before anything is
logged, evaluated or saved, so it never waits for the device. Under DeepSpeed, FSDP2 or a loss scaler, which skip no
step by such a flag, the host waits once a step. No library does both: Trainer's `logging_nan_inf_filter` hides a NaN.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute
import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from utils.common.errors import RankError, RunError
from utils.common.processes import process_rank
from utils.distributed.collectives import any_process

SKIPPED_STEPS = 16  # in a row; a loss scale that starts at 65536 is then about 1
OVERFLOW_ADVICE = "train with --bf16, or with a lower --learning_rate"


class OverflowWatch(TrainerCallback):
    """
    Ends a float16 run whose gradients overflow at every loss scale.

    The scaler would skip steps forever.
    `in_a_row` and `in_all` count the steps that this run skipped.
    """

    def __init__(self):
        self.in_a_row = self.in_all = 0

    def on_optimizer_step(self, args, state, control, optimizer: AcceleratedOptimizer, **kwargs) -> None:
        """
        Count skipped steps.

        Raises:
            RunError: SKIPPED_STEPS steps were skipped in a row, on every process.
        """
        self.in_all += optimizer.step_was_skipped
        self.in_a_row = self.in_a_row + 1 if optimizer.step_was_skipped else 0
        if self.in_a_row == SKIPPED_STEPS:
            raise RunError(
                f"step {state.global_step + 1}: the float16 gradients overflowed in {SKIPPED_STEPS} steps in a row, "
                f"at every loss scale: {OVERFLOW_ADVICE}"
            )


@dataclass
class StepNumbers:
    """
    Losses and gradient norm of one optimizer step, with their batches.

    They are on the host once `ready` has fired.
    """

    step: int
    batches: list[dict[str, Any]]
    losses: torch.Tensor  # (micro batches,) float32
    norm: torch.Tensor | float | None
    ready: torch.cuda.Event | None = None


class GuardedTrainer(Trainer):
    """
    Stops at losses and gradients that are wrong, before the optimizer uses them.

    Wrong are a loss or gradients that are not finite, and gradients that are all zero. torch's fused AdamW skips the
    step on the device, and the host checks it in the next step, or before anything is logged, evaluated or saved; with
    any other optimizer the host waits for the device.

    Args:
        rows: the dataset whose rows are in the batches.
        tokenizer: the one that the rows were made with.
    """

    def __init__(self, *args, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, **kwargs):
        super().__init__(*args, **kwargs)
        self.rows, self.tokenizer = rows, tokenizer
        self.batches: list[dict[str, Any]] = []  # micro batches of this step
        self.losses: list[torch.Tensor] = []  # of those, each a scalar
        self.last_step: StepNumbers | None = None  # not checked yet
        self.made_a_step = self.saw_a_loss = False
        self.overflows = OverflowWatch()
        self.add_callback(self.overflows)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Return what Trainer returns; keep the micro batch and its loss."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        self.batches.append(inputs)
        self.losses.append((result[0] if isinstance(result, tuple) else result).detach())
        return result

    def _fused_optimizer(self) -> torch.optim.AdamW | None:
        """
        Return the optimizer if it reads `found_inf`, else None.

        torch's fused AdamW does, if nothing shards its weights.
        """
        optimizer = getattr(self.optimizer, "optimizer", None)
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        fused = type(optimizer) is torch.optim.AdamW and all(group["fused"] for group in optimizer.param_groups)
        return optimizer if fused and not sharded and not self.args.fp16 else None

    def _get_grad_norm(self, model, grad_norm=None):
        """
        Return the gradient norm, and let the optimizer skip a wrong step.

        The norm and the losses are kept to be checked.

        Raises:
            RunError, RankError: see `check_last_step`.
        """
        self.check_last_step()
        self.made_a_step = True
        norm = super()._get_grad_norm(model, grad_norm)
        losses = torch.stack(self.losses).float()
        self.last_step = StepNumbers(self.state.global_step + 1, self.batches, losses, norm)
        self.batches, self.losses = [], []
        optimizer = self._fused_optimizer()
        if optimizer is None:
            self.check_last_step()
            return norm
        is_wrong = ~losses.isfinite().all() | ~norm.isfinite() | (norm == 0)
        # torch/optim/adam.py hands this attribute to the fused kernel, which returns at once if it is 1
        # (aten/src/ATen/native/cuda/fused_adam_utils.cuh), and takes the step off its count. torch/amp/grad_scaler.py
        # (GradScaler.step) sets it in the same way.
        optimizer.found_inf = is_wrong.float()
        if losses.is_cuda:
            self.last_step.losses = losses.to("cpu", non_blocking=True)
            self.last_step.norm = norm.to("cpu", non_blocking=True)
            self.last_step.ready = torch.cuda.Event()
            self.last_step.ready.record()
        return norm

    def check_last_step(self) -> None:
        """
        Check the previous step's loss and gradient norm, once.

        Raises:
            RankError: a loss is not finite.
            RunError: the gradients are all zero; or not finite, and no loss scaler handles that. On every process.
        """
        step, self.last_step = self.last_step, None
        if step is None:
            return
        if step.ready:
            step.ready.synchronize()
        for inputs, loss in zip(step.batches, step.losses.tolist(), strict=True):
            if not math.isfinite(loss):
                advice = "check the rows"
                if self.args.fp16:
                    advice = f"float16 overflowed, or the rows are at fault: {OVERFLOW_ADVICE}"
                raise RankError(self._blame(step.step, [inputs], f"the loss is {loss}", advice))
            self.saw_a_loss |= loss != 0
        norm = None if step.norm is None else float(step.norm)
        if norm == 0 and not self.optimizer.step_was_skipped:
            advice = "check that the adapter's layers are used and can be trained"
            raise RunError(self._blame(step.step, step.batches, "all gradients are zero", advice))
        if norm is not None and not math.isfinite(norm) and not self.args.fp16:
            advice = "check the rows and the --learning_rate"
            raise RunError(self._blame(step.step, step.batches, f"the gradients' norm is {norm}", advice))

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self.check_last_step()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def check_losses(self) -> None:
        """
        Check that something was trained.

        A run that resumed with all steps made passes. Every process must call it.

        Raises:
            RunError: every loss on every process was exactly 0, or every step overflowed.
            RunError, RankError: see `check_last_step`.
        """
        self.check_last_step()
        if not self.made_a_step:
            return
        if self.overflows.in_all == self.state.global_step > 0:
            raise RunError(
                f"the adapter is not saved: all {self.state.global_step} steps were skipped, as their float16 "
                "gradients overflowed while the loss scale came down: train for more steps, or with --bf16"
            )
        if not any_process(self.saw_a_loss):
            raise RunError("the adapter is not saved: every loss was exactly 0, so nothing was trained on")

    def _blame(self, step: int, batches: list[dict[str, Any]], fault: str, advice: str) -> str:
        """
        Write the rows of batches to a file; return the error message.

        The message names the fault and the file.
        """
        path = Path(self.args.output_dir) / f"rows_at_fault.rank{process_rank()}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for input_ids in (ids for batch in batches for ids in rows_of_batch(batch)):
                row = {"row": find_row(self.rows, input_ids), "text": self.tokenizer.decode(input_ids)}
                file.write(json.dumps(row | {"input_ids": input_ids}, ensure_ascii=False) + "\n")
        return f"step {step}, rank {process_rank()}: {fault}; the rows of its batch are in {path}: {advice}"


def rows_of_batch(batch: dict[str, Any]) -> Iterator[list[int]]:
    """
    Yield the input_ids of each row of a batch, padded or packed.

    Rows that fill a packed batch come too, if they have tokens.
    """
    if "cu_seq_lens_q" in batch:
        ends = batch["cu_seq_lens_q"].tolist()
        for start, end in zip(ends, ends[1:], strict=False):
            if start < end:  # not one of the empty rows that fill a packed batch
                yield batch["input_ids"][0, start:end].tolist()
    else:
        for input_ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            yield input_ids[mask.bool()].tolist()


def find_row(rows: datasets.Dataset, input_ids: list[int]) -> int | None:
    """
    Return the number of the first row with these tokens, or None.

    Rows are counted from 0.
    """
    column = rows.with_format("arrow")[:]["input_ids"]
    lengths = pyarrow.compute.list_value_length(column)
    candidates = pyarrow.compute.indices_nonzero(pyarrow.compute.equal(lengths, len(input_ids))).to_pylist()
    return next((number for number in candidates if column[number].as_py() == input_ids), None)
