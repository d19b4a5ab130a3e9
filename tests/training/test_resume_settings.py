"""What decides a step is compared when a run goes on: every flag is decided on, and what differs is said in words."""

import json
from dataclasses import fields

import datasets
import pytest
import torch
from transformers import TrainingArguments

from multi_gpu_fintune_belle import FinetuneArguments
from utils.training.resume_settings import DECIDES, HARMLESS, compare, describe_deepspeed, describe_settings

# Of this script's own flags. What decides: the rows and the base by their content, and the others as they are given.
COMPARED = {"dataset_path", "eval_dataset_path", "eval_fraction", "model_name_or_path", "packing", "pack_tokens"}
COMPARED |= {"generation", "quantize", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules"}
NOT_COMPARED = {"compile_layers", "plan"}


def test_every_flag_is_decided_on():
    """A field that is new in transformers, or here, goes into one of the tables before a run may have it."""
    names = {field.name for field in fields(TrainingArguments) if field.init}
    assert not names - set(DECIDES) - set(HARMLESS) and not set(DECIDES) & set(HARMLESS)
    assert {field.name for field in fields(FinetuneArguments)} == COMPARED | NOT_COMPARED


def settings(tmp_path, eval_rows=None, **flags):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **flags)
    return json.loads(json.dumps(describe_settings(args, torch.float32, {}, None, eval_rows)))


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha None (now 5)"),
        ({"ignore_data_skip": True}, "ignore_data_skip False (now True)"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last False (now True)"),
        ({"lr_scheduler_kwargs": {"num_cycles": 5}}, "lr_scheduler_kwargs"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config.split_batches False (now True)"),
        ({"optim_args": "momentum=0.9"}, "optim_args"),
        ({"warmup_steps": 3, "seed": 1}, "warmup_steps 0 (now 3), seed 42 (now 1)"),
        ({"save_steps": 3, "max_steps": 9, "dataloader_num_workers": 2, "gradient_checkpointing": True}, ""),
        ({"accelerator_config": {"non_blocking": True}}, ""),
    ],
)
def test_what_differs(tmp_path, flags, words):
    differing = compare(settings(tmp_path), settings(tmp_path, **flags))
    assert words in differing and bool(words) == bool(differing)


def test_deepspeed_files_are_compared_by_content():
    then = {"fp16": {"enabled": "auto", "loss_scale": 0}, "zero_optimization": {"stage": 2, "overlap_comm": True}}
    now = {"fp16": {"enabled": "auto", "loss_scale": 128}, "zero_optimization": {"stage": 2}, "wandb": {"team": "a"}}
    now["optimizer"] = {"type": "Lion"}
    first, second = ({"steps": {"deepspeed": describe_deepspeed(config)}} for config in (then, now))
    differing = compare(first, second, ("steps",))
    assert differing == "deepspeed.fp16.loss_scale 0 (now 128), deepspeed.optimizer None (now {'type': 'Lion'})"


def test_rows_to_evaluate_on(tmp_path):
    """They decide which checkpoint is the best; a run may get them later."""
    rows = [datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[-100, last]]}) for last in (2, 3)]
    rows = [each.cast_column("input_ids", datasets.Sequence(datasets.Value("int32"))) for each in rows]
    first, second = (settings(tmp_path, each, metric_for_best_model="loss") for each in rows)
    assert compare(first, first) == "" == compare(settings(tmp_path), first)
    assert compare(first, second) == "to evaluate on, the same rows with loss on other tokens"


def test_checkpoints_of_earlier_versions(tmp_path):
    """They hold fewer settings, and are compared by those."""
    now = settings(tmp_path, neftune_noise_alpha=5)
    earlier = {name: now["steps"][name] for name in ("learning_rate", "seed", "optim", "processes")}
    assert compare({"trains": {}, "steps": earlier}, now) == ""
    assert compare({"trains": {}, "steps": earlier | {"seed": 1}}, now) == "seed 1 (now 42)"
    assert compare({"trains": {"a": 1}}, {"trains": {"a": (1,)}}, ("trains",)) == "a 1 (now [1])"
