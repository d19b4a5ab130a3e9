"""
The resume key: what a run and a checkpoint must share, so that resuming gives the uninterrupted run, bit for bit.

In: a run's flags. Out: a `ResumeKey`, written into every checkpoint as resume_key.json and compared on resuming, each
difference in a message. run_config.py makes it, checkpoints.py compares it.

Every field of TrainingArguments is in one of two tables, DECIDES or HARMLESS; a test fails at a field that is in
neither. DECIDES holds what changes the numbers of a step beyond their rounding, the rows of a step, or which
checkpoint is the best. The number of steps may grow.
"""

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainingArguments

from utils.common.errors import UsageError
from utils.common.json_files import read_json_object
from utils.common.processes import launched_by_accelerate_with_fsdp
from utils.data.arrow_reader import describe_row_change, fingerprint_rows

KEY_FILE = "resume_key.json"
RESUME_KEY_VERSION = 2
# Version 1, written by earlier releases: the file's name is that of the run's own record in --output_dir.
VERSION_1_FILE = "run.json"
VERSION_1_NAMES = {"identity": "trains", "schedule": "steps"}
IDENTITY, SCHEDULE = "identity", "schedule"
DECIDES = (
    # the optimizer
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "optim"),
    *("optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices"),
    # which rows are in a step
    *("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size", "seed", "data_seed"),
    *("train_sampling_strategy", "length_column_name", "group_by_length", "dataloader_drop_last"),
    *("dataloader_in_order", "ignore_data_skip", "accelerator_config"),
    # precision, kernels of other libraries, and how the model is sharded
    *("tf32", "fp16_full_eval", "bf16_full_eval", "use_liger_kernel", "liger_kernel_config", "parallelism_config"),
    # which checkpoint is the best
    *("metric_for_best_model", "greater_is_better"),
)
HARMLESS = (
    # `describe_schedule` compares what they resolve to
    *("fp16", "bf16", "deepspeed", "fsdp", "fsdp_config"),
    # how long, how often, where to, and what is reported
    *("max_steps", "num_train_epochs", "output_dir", "resume_from_checkpoint", "do_train", "do_eval", "do_predict"),
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
    *("include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name"),
    *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "logging_dir", "debug"),
    *("skip_memory_metrics", "include_tokens_per_second"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    *("hub_revision", "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token"),
    # checkpoints and evaluation: they draw no random numbers and train nothing
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node", "save_safetensors"),
    *("enable_jit_checkpoint", "restore_callback_states_from_checkpoint", "load_best_model_at_end"),
    *("eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "eval_on_start"),
    *("eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics"),
    *("prediction_loss_only", "include_for_metrics", "label_names"),
    # memory and speed
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing"),
    *("activation_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("torch_empty_cache_steps", "use_cache", "full_determinism", "use_cpu", "local_rank", "jit_mode_eval"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "remove_unused_columns"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
    *("ddp_backend", "ddp_timeout"),
)
# Keys of a DeepSpeed configuration that change no number of a step; every other key is compared.
DEEPSPEED_HARMLESS = (
    *("steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown", "flops_profiler", "comms_logger"),
    *("tensorboard", "wandb", "comet", "csv_monitor", "monitor_config", "activation_checkpointing", "aio"),
    *("checkpoint", "autotuning", "nebula", "compile", "zero_allow_untested_optimizer"),
    *("zero_force_ds_cpu_optimizer", "zero_optimization"),
    # filled in from TrainingArguments, which are compared
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
)
ZERO_DECIDES = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


@dataclass(frozen=True)
class ResumeKey:
    """
    What decides a run.

    Args:
        identity: what the run trains; the same for all runs in one directory.
        schedule: what decides its steps and the best of them; the same for a run and the checkpoint that it resumes.
    """

    identity: dict[str, Any]
    schedule: dict[str, Any]

    def write(self, checkpoint: Path) -> None:
        """Write the key into a checkpoint's directory."""
        values = {"version": RESUME_KEY_VERSION, IDENTITY: self.identity, SCHEDULE: self.schedule}
        (checkpoint / KEY_FILE).write_text(json.dumps(values, indent=1), encoding="utf-8")

    @classmethod
    def read(cls, checkpoint: Path) -> "ResumeKey":
        """
        Read the key of a checkpoint, of this or an earlier release.

        Raises:
            UsageError: the file is absent, has another shape, or was written by a newer release.
        """
        if not (checkpoint / KEY_FILE).exists() and (checkpoint / VERSION_1_FILE).exists():
            names = VERSION_1_NAMES
            values = read_json_object(checkpoint / VERSION_1_FILE, dict.fromkeys(names.values(), dict))
            return cls(**{name: values[old] for name, old in names.items()})
        values = read_json_object(checkpoint / KEY_FILE, {"version": int, IDENTITY: dict, SCHEDULE: dict})
        if values["version"] != RESUME_KEY_VERSION:
            raise UsageError(
                f"{checkpoint / KEY_FILE} has version {values['version']}, not {RESUME_KEY_VERSION}: resume with the "
                "release that wrote it"
            )
        return cls(values[IDENTITY], values[SCHEDULE])

    def differences(self, now: "ResumeKey", identity_only: bool = False) -> str:
        """
        Return how `now` differs from this key: "name then (now value), ...", or "".

        A setting that this key lacks, because an earlier release wrote it, is not
        compared.
        """
        pairs = [(self.identity, now.identity)]
        if not identity_only:
            pairs.append((self.schedule, now.schedule))
        messages = []
        for then, current in pairs:
            for name, value in json.loads(json.dumps(current)).items():
                if name in then:
                    messages += _differences(name, then[name], value)
        return ", ".join(messages)


def describe_schedule(
    args: TrainingArguments, dtype: torch.dtype, pack_tokens: int | None, eval_dataset: datasets.Dataset | None = None
) -> dict[str, Any]:
    """
    Return what decides a run's steps, as JSON values.

    Args:
        dtype: of the base model's weights.
        pack_tokens: None if rows are padded.
    """
    values = args.to_dict()
    schedule = {name: _to_json(values[name]) for name in DECIDES if name in values}
    if isinstance(schedule.get("accelerator_config"), dict):  # this key copies to the device during computation
        schedule["accelerator_config"].pop("non_blocking", None)
    if schedule["metric_for_best_model"] is None:  # a resumed run may add rows to evaluate on
        del schedule["metric_for_best_model"], schedule["greater_is_better"]
    plugin = args.deepspeed_plugin
    schedule |= {
        "pack_tokens": pack_tokens,
        "processes": args.world_size,
        "zero_stage": plugin.zero_stage if plugin is not None else None,
        "deepspeed": describe_deepspeed(plugin.deepspeed_config) if plugin is not None else None,
        "fsdp": 2 if launched_by_accelerate_with_fsdp() else None,
        "weights": str(dtype).removeprefix("torch."),
    }
    if eval_dataset:
        schedule["eval_rows"] = fingerprint_rows(eval_dataset)
    return schedule


def describe_deepspeed(config: dict[str, Any]) -> dict[str, Any]:
    """
    Return the keys of a DeepSpeed configuration that decide a step.

    >>> describe_deepspeed({"steps_per_print": 9, "gradient_clipping": 1.0, "zero_optimization": {"stage": 2}})
    {'gradient_clipping': 1.0, 'zero_optimization': {}}
    """
    zero = config.get("zero_optimization", {})
    decides = {name: _to_json(value) for name, value in config.items() if name not in DEEPSPEED_HARMLESS}
    return decides | {"zero_optimization": {name: zero[name] for name in ZERO_DECIDES if name in zero}}


def _to_json(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(name): _to_json(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(each) for each in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _differences(name: str, then: Any, now: Any) -> list[str]:
    """
    Return messages for two values that differ.

    Objects are compared key by key.
    """
    if name in ("rows", "eval_rows"):
        change = describe_row_change(then, now)
        if not change:
            return []
        return [f"to evaluate on, {change}" if name == "eval_rows" else change]
    if isinstance(then, dict) and isinstance(now, dict):
        keys = {**then, **now}
        return [each for key in keys for each in _differences(f"{name}.{key}", then.get(key), now.get(key))]
    return [] if then == now else [f"{name} {then} (now {now})"]
