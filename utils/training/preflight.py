"""
A training request, checked as a whole before anything slow or shared begins: every fault is reported at once.

In: the flags as argparse leaves them. Out: `TrainingInputs`, what the flags name, opened. run_config.py calls
`open_inputs` before the processes join one another and before a model is loaded; it needs no GPU.
"""

import contextlib
import os
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from peft.utils import CONFIG_NAME
from transformers import PreTrainedTokenizerBase

from utils.checkpoint.directory import check_name
from utils.checkpoint.model import Checkpoint
from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.errors import Faults, UsageError
from utils.common.json_files import read_json_object
from utils.common.processes import launched_by_accelerate_with_deepspeed, launched_by_accelerate_with_fsdp
from utils.data.arrow_reader import check_origin, keep_trained, load_examples, row_lengths, split_off
from utils.data.arrow_writer import is_dataset
from utils.data.dataset_columns import Vocabulary
from utils.data.encode import fingerprint
from utils.distributed.process_group import check_port
from utils.layers.fp8 import FP8, check_device
from utils.layers.quantization import stored_bits
from utils.lora.adapter import AdapterOrigin, read_origin
from utils.models.templates import template_for
from utils.training.argument_checks import check_values
from utils.training.checkpoints import list_checkpoints
from utils.training.deepspeed_config import read_deepspeed_config

DEFAULT_OUTPUT_DIR = "trainer_output"  # of TrainingArguments, which fills it in later


@dataclass(frozen=True)
class TrainingInputs:
    """What the flags name, opened: rows, tokenizer and base checkpoint."""

    dataset: datasets.Dataset  # rows with a token to train on, without those held out
    tokenizer: PreTrainedTokenizerBase
    checkpoint: Checkpoint
    origin: AdapterOrigin  # of the adapter that will be trained
    eval_dataset: datasets.Dataset | None = None


def open_inputs(values: Namespace) -> TrainingInputs:
    """
    Open what the flags name, once all of them work together.

    Args:
        values: the flags of FinetuneArguments and TrainingArguments as argparse leaves them. A
            `lora_target_modules` that was not given becomes the generation's default.

    Raises:
        UsageError: every fault that can be found before the model is loaded, one line each with its fix.
    """
    faults = Faults()
    dataset = eval_dataset = tokenizer = vocabulary = checkpoint = origin = template = None
    stage = None
    with faults.collect():
        check_values(values)
    with faults.collect():
        check_devices(values)
    with faults.collect():
        check_port()
    with faults.collect():
        stage = zero_stage(values)
    with faults.collect():
        tokenizer = load_tokenizer(values.model_name_or_path)
        config = Checkpoint.open(values.model_name_or_path, weights=False).config
        vocabulary = Vocabulary(config.vocab_size, tokenizer.pad_token_id)
    if values.dataset_path:  # else the parser reports that it is missing
        with faults.collect():
            dataset = keep_trained(load_examples(values.dataset_path, vocabulary), values.dataset_path)
    if values.eval_dataset_path:
        with faults.collect(), _named("--eval_dataset_path"):
            eval_dataset = keep_trained(load_examples(values.eval_dataset_path, vocabulary), values.eval_dataset_path)
    elif dataset and 0 < values.eval_fraction < 1:
        with faults.collect():
            dataset, eval_dataset = split_off(dataset, values.eval_fraction)
    if dataset and tokenizer:
        with faults.collect():
            template = check_origin(values.dataset_path, tokenizer, values.model_name_or_path)
        if eval_dataset and values.eval_dataset_path:
            with faults.collect(), _named("--eval_dataset_path"):
                check_origin(values.eval_dataset_path, tokenizer, values.model_name_or_path)
    with faults.collect():
        check_pack_tokens(values, [rows for rows in (dataset, eval_dataset) if rows])
    if vocabulary:  # else opening the checkpoint failed above, and would report the same fault again
        with faults.collect():
            checkpoint = Checkpoint.open(values.model_name_or_path, quantize=stored_bits(values.quantize))
    if checkpoint:
        with faults.collect():
            configure_targets(values, checkpoint)
        with faults.collect():
            check_quantization(values, checkpoint, stage)
    with faults.collect():
        check_output(values, checkpoint)
    faults.report()
    made_by = fingerprint(tokenizer, template_for(tokenizer, template))
    origin = AdapterOrigin(template, checkpoint.fingerprint(), values.model_name_or_path, made_by)
    check_previous_adapter(values, origin)
    return TrainingInputs(dataset, tokenizer, checkpoint, origin, eval_dataset)


@contextlib.contextmanager
def _named(flag: str) -> Iterator[None]:
    """Report faults of a dataset under the flag that named it."""
    try:
        yield
    except UsageError as error:
        raise UsageError(*(line.replace("--dataset_path", flag) for line in error.args)) from None


def check_pack_tokens(values: Namespace, datasets_to_pack: list[datasets.Dataset]) -> None:
    """
    Check that every row fits in a packed sequence.

    Raises:
        UsageError: a row is longer than a packed sequence may be.
    """
    longest = max((length for dataset in datasets_to_pack for length in row_lengths(dataset)), default=0)
    if values.packing and longest > values.pack_tokens >= 1:
        raise UsageError(
            f"--pack_tokens {values.pack_tokens}: the longest row has {longest} tokens; give at least that many, "
            f"or tokenise with a smaller --max_seq_length"
        )


def check_devices(values: Namespace) -> None:
    """
    Check that every local process has a GPU of its own.

    Raises:
        UsageError: the launcher started more processes on this machine than it has GPUs.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    cards = torch.cuda.device_count()
    if cards and processes > cards and not values.use_cpu:
        raise UsageError(f"{processes} processes and {cards} GPUs: start {cards} at most (--nproc_per_node {cards})")


def zero_stage(values: Namespace) -> int | None:
    """
    Return the ZeRO stage of the run; None without DeepSpeed.

    Raises:
        UsageError: see `read_deepspeed_config`; or --deepspeed is given and accelerate configures DeepSpeed too.
    """
    path = values.deepspeed
    if launched_by_accelerate_with_deepspeed():
        if path:
            raise UsageError(
                "--deepspeed under an accelerate config that configures DeepSpeed itself: drop one of the two"
            )
        path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if path.lower() == "none":
            return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    return read_deepspeed_config(path).get("zero_optimization", {}).get("stage", 0) if path else None


def check_quantization(values: Namespace, checkpoint: Checkpoint, stage: int | None) -> None:
    """
    Check that the base can be quantised as asked.

    GPUs and launcher limit that.

    Raises:
        UsageError: a quantised base under ZeRO-3 or FSDP2, which shard floating-point weights only; or fp8 for a base
            that is quantised already, not in bfloat16, or without a GPU that supports it.
    """
    faults = Faults()
    sharded = "FSDP2" if launched_by_accelerate_with_fsdp() else "ZeRO-3" if stage == 3 else None
    if (checkpoint.quantization or values.quantize == FP8) and sharded:
        faults.add(
            f"a quantised base cannot be partitioned by {sharded}: run it under DDP (no --deepspeed) or ZeRO-2, or "
            "train on the checkpoint in full precision without --quantize"
        )
    if values.quantize == FP8:
        with faults.collect():
            check_device()
        if checkpoint.quantization:
            faults.add(f"--quantize fp8: {checkpoint.directory} is quantised to integers already: leave it out")
        if not (values.bf16 or os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"):
            faults.add("--quantize fp8 computes in bfloat16: give --bf16 too")
    faults.report()


def configure_targets(values: Namespace, checkpoint: Checkpoint) -> None:
    """
    Set `values.lora_target_modules` to the generation's default where it was not given.

    Raises:
        UsageError: --lora_target_modules names something that is no linear layer of the generation's blocks.
    """
    linear = checkpoint.generation.linear_layers
    if values.lora_target_modules is None:
        values.lora_target_modules = list(checkpoint.generation.lora_target_modules)
    unknown = sorted(set(values.lora_target_modules) - set(linear))
    if unknown:
        raise UsageError(
            f"--lora_target_modules {' '.join(unknown)}: the model's linear layers are {' '.join(sorted(linear))}"
        )


def check_output(values: Namespace, checkpoint: Checkpoint | None) -> None:
    """
    Check that --output_dir can be written and holds nothing else.

    Raises:
        UsageError: --output_dir cannot be written, or holds something else already.
    """
    path = Path(values.output_dir or DEFAULT_OUTPUT_DIR)
    another = "give another directory"
    check_name("--output_dir", path)
    if path.exists() and not path.is_dir():
        raise UsageError(f"--output_dir {path} is a file: {another}")
    if is_dataset(path):
        raise UsageError(f"--output_dir {path} holds a tokenised dataset: {another}")
    if (path / "config.json").is_file() or (checkpoint and path.resolve() == checkpoint.directory.resolve()):
        raise UsageError(f"--output_dir {path} holds a model: {another}")
    nearest = next(parent for parent in (path.resolve(), *path.resolve().parents) if parent.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"--output_dir {path} cannot be written ({nearest} is read-only): {another}")


def check_previous_adapter(values: Namespace, origin: AdapterOrigin) -> None:
    """
    Compare the adapter in --output_dir with the one to be trained.

    A run that resumes from a checkpoint there is not checked: its resume key is compared instead, since a kill may
    have left the adapter without its origin.

    Raises:
        UsageError: --output_dir holds the adapter of a run that trained something else.
    """
    directory = Path(values.output_dir or DEFAULT_OUTPUT_DIR)
    resume_from = values.resume_from_checkpoint
    resumes_here = resume_from and (resume_from == "latest" or Path(resume_from).parent == directory)
    if not (directory / CONFIG_NAME).is_file() or (resumes_here and list_checkpoints(directory)):
        return
    previous = read_json_object(directory / CONFIG_NAME)
    targets = previous.get("target_modules")
    previous_origin = read_origin(directory)
    pairs = {
        "lora_rank": (previous.get("r"), values.lora_rank),
        "lora_alpha": (previous.get("lora_alpha"), values.lora_alpha),
        "lora_target_modules": (
            sorted(map(str, targets)) if isinstance(targets, list) else targets,
            sorted(values.lora_target_modules),
        ),
    }
    differing = [f"{name} {then} (now {now})" for name, (then, now) in pairs.items() if then != now]
    if previous_origin is None or previous_origin.base != origin.base:
        previous_base = previous_origin.model_name_or_path if previous_origin else "unknown"
        differing.append(f"base {previous_base} (other weights)")
    if differing:
        raise UsageError(
            f"--output_dir {directory} holds the adapter of another run, with {', '.join(differing)}: give another "
            f"directory"
        )
