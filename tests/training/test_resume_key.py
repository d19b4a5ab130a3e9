"""What decides a step is compared when a run resumes: every flag is in a table, and each difference is named."""

import json
from dataclasses import fields

import datasets
import pytest
import torch
from transformers import TrainingArguments

from utils.common.errors import UsageError
from utils.training.arguments import FinetuneArguments
from utils.training.resume_key import DECIDES, HARMLESS, ResumeKey, describe_deepspeed, describe_schedule

# The script's own flags. Compared: rows and base by their content, the others by their values.
COMPARED = {"dataset_path", "eval_dataset_path", "eval_fraction", "model_name_or_path", "packing", "pack_tokens"}
COMPARED |= {"generation", "quantize", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules"}
NOT_COMPARED = {"compile_layers", "plan"}


def test_every_flag_is_decided_on():
    """A field that is new in transformers, or here, goes into one of the tables before a run may have it."""
    names = {field.name for field in fields(TrainingArguments) if field.init}
    assert not names - set(DECIDES) - set(HARMLESS) and not set(DECIDES) & set(HARMLESS)
    assert {field.name for field in fields(FinetuneArguments)} == COMPARED | NOT_COMPARED


def key_of(tmp_path, eval_rows=None, **flags):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **flags)
    schedule = describe_schedule(args, torch.float32, None, eval_rows)
    return ResumeKey({}, json.loads(json.dumps(schedule)))


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
    differing = key_of(tmp_path).differences(key_of(tmp_path, **flags))
    assert words in differing and bool(words) == bool(differing)


def test_deepspeed_files_are_compared_by_content():
    then = {"fp16": {"enabled": "auto", "loss_scale": 0}, "zero_optimization": {"stage": 2, "overlap_comm": True}}
    now = {"fp16": {"enabled": "auto", "loss_scale": 128}, "zero_optimization": {"stage": 2}, "wandb": {"team": "a"}}
    now["optimizer"] = {"type": "Lion"}
    first, second = (ResumeKey({}, {"deepspeed": describe_deepspeed(config)}) for config in (then, now))
    changes = "deepspeed.fp16.loss_scale 0 (now 128), deepspeed.optimizer None (now {'type': 'Lion'})"
    assert first.differences(second) == changes


def test_rows_to_evaluate_on(tmp_path):
    """They decide which checkpoint is the best; a run may get them later."""
    rows = [datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[-100, last]]}) for last in (2, 3)]
    rows = [each.cast_column("input_ids", datasets.Sequence(datasets.Value("int32"))) for each in rows]
    first, second = (key_of(tmp_path, each, metric_for_best_model="loss") for each in rows)
    assert first.differences(first) == "" == key_of(tmp_path).differences(first)
    assert first.differences(second) == "to evaluate on, the same rows with loss on other tokens"


def test_checkpoints_of_earlier_versions(tmp_path):
    """They hold fewer settings, and only those are compared."""
    now = key_of(tmp_path, neftune_noise_alpha=5)
    earlier = {name: now.schedule[name] for name in ("learning_rate", "seed", "optim", "processes")}
    assert ResumeKey({}, earlier).differences(now) == ""
    assert ResumeKey({}, earlier | {"seed": 1}).differences(now) == "seed 1 (now 42)"
    trained, steps = ResumeKey({"a": 1}, {"b": 1}), ResumeKey({"a": (1,)}, {"b": 2})
    assert trained.differences(steps, identity_only=True) == "a 1 (now [1])"


def test_the_file_and_that_of_earlier_versions(tmp_path):
    key = ResumeKey({"lora_rank": 4}, {"seed": 1})
    (tmp_path / "run.json").write_text('{"trains": {"lora_rank": 4}, "steps": {"seed": 1}}')
    assert ResumeKey.read(tmp_path) == key
    (tmp_path / "run.json").write_text('{"trains": {"lora_rank": 9}, "steps": {}}')
    key.write(tmp_path)  # the newer file counts
    assert ResumeKey.read(tmp_path) == key
    written = json.loads((tmp_path / "resume_key.json").read_text())
    assert written == {"version": 2, "identity": {"lora_rank": 4}, "schedule": {"seed": 1}}
    (tmp_path / "resume_key.json").write_text(json.dumps(written | {"version": 3}))
    with pytest.raises(UsageError, match="has version 3, not 2: resume with the release"):
        ResumeKey.read(tmp_path)
