"""
What a run must share with the checkpoint that it goes on from, for the two together to be one uninterrupted run.

Every field of TrainingArguments stands in one of two tables, DECIDES or HARMLESS; a test fails at a field that stands
in none. In DECIDES: what changes the numbers of a step beyond their rounding, which rows it has, or which checkpoint
is the best. The number of steps may grow.
"""

import json
from enum import Enum
from typing import Any

import datasets
import torch
from transformers import TrainingArguments

from utils.common.processes import launched_by_accelerate_with_fsdp
from utils.data.arrow_reader import describe_row_change, fingerprint_rows

Settings = dict[str, dict[str, Any]]
DECIDES = (
    # the optimizer
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "optim"),
    *("optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices"),
    # which rows a step has
    *("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size", "seed", "data_seed"),
    *("train_sampling_strategy", "length_column_name", "group_by_length", "dataloader_drop_last"),
    *("dataloader_in_order", "ignore_data_skip", "accelerator_config"),
    # precision, kernels of other libraries, and how a model is spread
    *("tf32", "fp16_full_eval", "bf16_full_eval", "use_liger_kernel", "liger_kernel_config", "parallelism_config"),
    # which checkpoint is the best
    *("metric_for_best_model", "greater_is_better"),
)
HARMLESS = (
    # `describe_settings` compares what they stand for
    *("fp16", "bf16", "deepspeed", "fsdp", "fsdp_config"),
    # how long, how often, where to, and what is told of it
    *("max_steps", "num_train_epochs", "output_dir", "resume_from_checkpoint", "do_train", "do_eval", "do_predict"),
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
    *("include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name"),
    *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "logging_dir", "debug"),
    *("skip_memory_metrics", "include_tokens_per_second"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    *("hub_revision", "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token"),
    # checkpoints and evaluation, which draw no random number and train nothing
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
# Of a DeepSpeed configuration, likewise; everything else in it is compared.
DEEPSPEED_HARMLESS = (
    *("steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown", "flops_profiler", "comms_logger"),
    *("tensorboard", "wandb", "comet", "csv_monitor", "monitor_config", "activation_checkpointing", "aio"),
    *("checkpoint", "autotuning", "nebula", "compile", "zero_allow_untested_optimizer"),
    *("zero_force_ds_cpu_optimizer", "zero_optimization"),
    # filled in from TrainingArguments, which are compared, where the file says "auto"
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
)
ZERO_DECIDES = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def describe_settings(
    args: TrainingArguments,
    dtype: torch.dtype,
    trains: dict[str, Any],
    pack_tokens: int | None,
    eval_dataset: datasets.Dataset | None = None,
) -> Settings:
    """What the run trains (on), and what decides each of its steps and the best of them, as JSON can hold it."""
    values = args.to_dict()
    steps = {name: _plain(values[name]) for name in DECIDES if name in values}
    if isinstance(steps.get("accelerator_config"), dict):  # this one copies to the device while it computes
        steps["accelerator_config"].pop("non_blocking", None)
    if steps["metric_for_best_model"] is None:  # rows to evaluate on may come later
        del steps["metric_for_best_model"], steps["greater_is_better"]
    plugin = args.deepspeed_plugin
    return {
        "trains": trains,
        "steps": steps
        | {
            "pack_tokens": pack_tokens,
            "processes": args.world_size,
            "zero_stage": plugin.zero_stage if plugin is not None else None,
            "deepspeed": describe_deepspeed(plugin.deepspeed_config) if plugin is not None else None,
            "fsdp": 2 if launched_by_accelerate_with_fsdp() else None,
            "weights": str(dtype).removeprefix("torch."),
        }
        | ({"eval_rows": fingerprint_rows(eval_dataset)} if eval_dataset else {}),
    }


def describe_deepspeed(config: dict[str, Any]) -> dict[str, Any]:
    """
    What of a DeepSpeed configuration decides a step.

    >>> describe_deepspeed({"steps_per_print": 9, "gradient_clipping": 1.0, "zero_optimization": {"stage": 2}})
    {'gradient_clipping': 1.0, 'zero_optimization': {}}
    """
    zero = config.get("zero_optimization", {})
    decides = {name: _plain(value) for name, value in config.items() if name not in DEEPSPEED_HARMLESS}
    return decides | {"zero_optimization": {name: zero[name] for name in ZERO_DECIDES if name in zero}}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def compare(then: Settings, now: Settings, parts: tuple[str, ...] = ("trains", "steps")) -> str:
    """
    The settings that differ, in words; empty where none does. What a checkpoint of an earlier version of this toolkit
    does not hold is not compared.
    """
    differing = []
    for part in parts:
        for name, value in json.loads(json.dumps(now[part])).items():
            if name not in then[part]:
                continue
            if name in ("rows", "eval_rows"):
                change = describe_row_change(then[part][name], value)
                differing.append(f"to evaluate on, {change}" if change and name == "eval_rows" else change)
            else:
                differing += _differences(name, then[part][name], value)
    return ", ".join(filter(None, differing))


def _differences(name: str, then: Any, now: Any) -> list[str]:
    """Of two values, or key by key of two objects."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = {**then, **now}
        return [each for key in keys for each in _differences(f"{name}.{key}", then.get(key), now.get(key))]
    return [] if then == now else [f"{name} {then} (now {now})"]
