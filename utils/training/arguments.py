"""
The training script's flags: three dataclasses of its own beside transformers' TrainingArguments.

In: the command line. Out: a Namespace of values as argparse leaves them (`make_parser`), and, once everything is
resolved, typed arguments (`build_arguments`). utils/training/run_config.py calls both, in the order that libraries
need.
"""

from argparse import Namespace
from dataclasses import dataclass, field, fields
from typing import Literal

from transformers import TrainingArguments

from utils.checkpoint.directory import DEFAULT_MODEL, GENERATION_FLAGS, GENERATION_HELP
from utils.checkpoint.flag_parser import DataclassFlagParser

LOGGING_STEPS = 10  # transformers' 500 would show nothing of most runs on rows of one's own
BY_LENGTH = "group_by_length"  # value of --train_sampling_strategy; the default here
# transformers' names for the flag of gradient checkpointing: the old one, and the one that 5.24 introduced.
CHECKPOINTING_FLAGS = ("gradient_checkpointing", "activation_checkpointing")
# Flags of TrainingArguments whose default is decided later, from other flags and from the machine.
DECIDED_LATER = ("gradient_checkpointing", "dataloader_num_workers", "per_device_eval_batch_size")


@dataclass(kw_only=True)
class DataArguments:
    """The dataset and how its rows become batches."""

    _argument_group_name = "data"

    dataset_path: str = field(metadata={"help": "dataset written by tokenize_dataset_rows_belle.py (required)"})
    eval_dataset_path: str | None = field(
        default=None,
        metadata={"help": "held-out dataset, tokenised the same way: its loss is reported, the best checkpoint kept"},
    )
    eval_fraction: float = field(
        default=0.0,
        metadata={
            "help": "share of --dataset_path to hold out instead, from 0 to 1; rows of one prompt stay together"
        },
    )
    packing: bool = field(
        default=False,
        metadata={"help": "pack rows into sequences of --pack_tokens; batch sizes then count packed sequences"},
    )
    pack_tokens: int = field(
        default=8192, metadata={"help": "maximum tokens of a packed sequence", "aliases": ["--max_length"]}
    )


@dataclass(kw_only=True)
class ModelArguments:
    """The base model and how it is held and run."""

    _argument_group_name = "model"

    model_name_or_path: str = field(default=DEFAULT_MODEL, metadata={"help": "checkpoint directory or hub id"})
    generation: Literal[*GENERATION_FLAGS] | None = field(default=None, metadata={"help": GENERATION_HELP})
    quantize: Literal["int8", "int4", "fp8"] | None = field(
        default=None,
        metadata={
            "help": "hold the frozen base in 8 or 4 bits (a quantised checkpoint needs no flag); fp8 makes training "
            "faster on Hopper GPUs and newer"
        },
    )
    compile_layers: bool | None = field(
        default=None,
        metadata={"help": "compile the decoder blocks (default: true with --packing on a GPU, else false)"},
    )
    plan: bool = field(
        default=False,
        metadata={
            "help": "print what the run will be, its memory and its speed, then exit",
            "aliases": ["--dry_run", "--dry-run"],
        },
    )


@dataclass(kw_only=True)
class AdapterArguments:
    """The LoRA adapter that is trained."""

    _argument_group_name = "adapter"

    lora_rank: int = field(default=8, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(default=32, metadata={"help": "the adapter is scaled by lora_alpha / lora_rank"})
    lora_dropout: float = field(
        default=0.0,
        metadata={"help": "dropout on the adapter's input, from 0 to 1; above 0 the number of processes matters"},
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "linear layers that get an adapter (default: those of query, key and value)"},
    )


@dataclass(kw_only=True)
class FinetuneArguments(DataArguments, ModelArguments, AdapterArguments):
    """The script's own flags; run.json lists the fields by name."""


class TrainerArguments(TrainingArguments):
    """transformers' TrainingArguments, in a group of --help, for one device a process."""

    _argument_group_name = "training (transformers' TrainingArguments)"

    @property
    def n_gpu(self) -> int:
        """
        The number of GPUs of this process, at most 1.

        Trainer would wrap the model of a process that sees several in DataParallel.
        """
        return min(super().n_gpu, 1)


def make_parser(description: str) -> DataclassFlagParser:
    """Return the parser of all flags; `description` stands above them in --help."""
    parser = DataclassFlagParser(
        (DataArguments, ModelArguments, AdapterArguments, TrainerArguments),
        usage="%(prog)s --dataset_path DIR [--FLAG VALUE ...]",
        description=description,
    )
    parser.set_defaults(train_sampling_strategy=BY_LENGTH, logging_steps=LOGGING_STEPS, **dict.fromkeys(DECIDED_LATER))
    return parser


def build_arguments(parser: DataclassFlagParser, values: Namespace) -> tuple[FinetuneArguments, TrainerArguments]:
    """
    Return the script's own flags and Trainer's, typed, from resolved `values`.

    Raises whatever TrainingArguments raises; `utils.training.argument_checks.as_usage_error` explains it.
    """
    *_, training_args = parser.parse_dict(vars(values))
    own_names = [each.name for each in fields(FinetuneArguments)]
    return FinetuneArguments(**{name: getattr(values, name) for name in own_names}), training_args


def checkpointing_flag(values: Namespace) -> bool | None:
    """
    Return what the flags say of gradient checkpointing, or None.

    It has two names, see CHECKPOINTING_FLAGS.
    """
    flags = (getattr(values, name, None) for name in CHECKPOINTING_FLAGS)
    return next((flag for flag in flags if flag is not None), None)
