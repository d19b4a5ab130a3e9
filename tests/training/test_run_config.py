"""What a training run resolves from its flags, and why; and the flags themselves."""

import json
import os

import datasets
import pytest
import torch
from conftest import TINY
from transformers import TrainingArguments

from utils.checkpoint.model import Checkpoint
from utils.data.arrow_reader import FEATURES
from utils.lora.adapter import AdapterOrigin
from utils.training.arguments import (
    FinetuneArguments,
    TrainerArguments,
    build_arguments,
    checkpointing_flag,
    make_parser,
)
from utils.training.preflight import TrainingInputs
from utils.training.run_config import (
    configure_evaluation,
    configure_trainer,
    describe_identity,
    resolve_compile,
    resolve_precision,
    set_gradient_checkpointing,
)


def parse(flags):
    return make_parser("").parse_args(f"--dataset_path rows {flags}".split())


@pytest.fixture
def inputs():
    dataset = datasets.Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[-100, 6]]}, features=FEATURES)
    origin = AdapterOrigin("native", {"norms": "n"}, str(TINY), {})
    return TrainingInputs(dataset, None, Checkpoint.open(str(TINY)), origin)


def test_other_names_of_flags():
    values = parse("--dry_run --max_length 77")
    assert values.plan is True and values.pack_tokens == 77
    assert parse("--dry-run --max_length 77") == values == parse("--plan --pack_tokens 77")


def test_help_has_no_default_of_none():
    text = make_parser("What it does.").format_help()
    assert "What it does." in text and "(default: 8192)" in " ".join(text.split())
    assert "(default: None)" not in text


def test_flags_become_typed_arguments(tmp_path):
    parser = make_parser("")
    values = parse(f"--output_dir {tmp_path} --lora_rank 3 --packing")
    configure_trainer(values)
    flags, args = build_arguments(parser, values)
    assert isinstance(flags, FinetuneArguments) and flags.lora_rank == 3 and flags.packing
    assert isinstance(args, TrainerArguments) and args.output_dir == str(tmp_path) and args.n_gpu <= 1
    assert args.train_sampling_strategy == "random"  # packs have no order of lengths
    # run.json lists them in this order.
    assert list(vars(flags))[:4] == ["lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules"]


@pytest.mark.parametrize(
    "flags, configured, expected",
    [
        ("", "no", (torch.float32, "no --fp16 or --bf16", "no")),
        ("--bf16", "fp16", (torch.bfloat16, "bf16 by flag", "bf16")),
        ("", "bf16", (torch.bfloat16, "bf16 by accelerate config", "bf16")),
    ],
)
def test_precision(monkeypatch, flags, configured, expected):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", configured)
    values = parse(flags)
    assert (*resolve_precision(values), os.environ["ACCELERATE_MIXED_PRECISION"]) == expected
    assert values.bf16 == (expected[0] == torch.bfloat16) and not values.fp16


@pytest.mark.parametrize("by_gpu", (False, True))
def test_float16_needs_a_gpu(monkeypatch, by_gpu):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: by_gpu)
    values = parse("--fp16")
    dtype, reason = resolve_precision(values)
    assert (dtype, values.fp16) == ((torch.float16, True) if by_gpu else (torch.float32, False))
    assert reason == ("fp16 by flag" if by_gpu else "fp16 by flag needs a GPU and there is none")


@pytest.mark.parametrize(
    "compile_layers, packing, use_cpu, expected",
    [
        (None, True, False, (True, "packing on a GPU")),
        (None, True, True, (False, "no GPU")),
        (None, False, False, (False, "batches of varying shape, no --packing")),
        (True, False, True, (True, "by --compile_layers")),
        (False, True, False, (False, "by --compile_layers")),
    ],
)
def test_compiled_layers(tmp_path, compile_layers, packing, use_cpu, expected):
    flags = FinetuneArguments(dataset_path="rows", compile_layers=compile_layers, packing=packing)
    assert resolve_compile(flags, TrainingArguments(output_dir=str(tmp_path), use_cpu=use_cpu)) == expected


def test_evaluation_follows_training_and_checkpoints():
    values = parse("--eval_fraction 0.1 --save_steps 7 --per_device_train_batch_size 3")
    configure_evaluation(values)
    assert (values.eval_strategy, values.eval_steps, values.per_device_eval_batch_size) == ("steps", 7, 3)
    assert (values.metric_for_best_model, values.greater_is_better) == ("loss", False)
    values = parse("--eval_fraction 0.1 --save_strategy epoch --per_device_eval_batch_size 5")
    configure_evaluation(values)
    assert (values.eval_strategy, values.eval_steps, values.per_device_eval_batch_size) == ("epoch", None, 5)
    values = parse("--per_device_train_batch_size 3")
    configure_evaluation(values)
    assert (values.eval_strategy, values.per_device_eval_batch_size) == ("no", 3)


def test_gradient_checkpointing_under_either_name(tmp_path):
    assert checkpointing_flag(parse("")) is None
    for flag in ("--gradient_checkpointing", "--activation_checkpointing"):
        assert checkpointing_flag(parse(flag)) is True and checkpointing_flag(parse(f"{flag} False")) is False
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    set_gradient_checkpointing(args, True)
    assert args.gradient_checkpointing is args.activation_checkpointing is True


def test_what_identifies_a_run(inputs):
    flags = FinetuneArguments(dataset_path="rows", lora_rank=4, lora_target_modules=["dense"], quantize="int8")
    identity = json.loads(json.dumps(describe_identity(flags, inputs)))
    rows = identity.pop("rows")
    assert rows["rows"] == 1 and identity == {
        "lora_rank": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target_modules": ["dense"],
        "base": {"norms": "n"},
        "template": "native",
        "quantize": "int8",
        "generation": "ChatGLM-6B",
    }
