"""
Flags of the inference scripts: dataclasses that transformers' HfArgumentParser fills, and their checks.

In: sys.argv, read by `parse_flags(InferenceArguments, __doc__)`. Out: a typed object whose `collect_faults` lists
every mistake before anything is loaded. Callers: utils/inference/job.py; tools/chat.py and tools/evaluate.py share
`ModelFlags` and `parse_flags`.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from utils.checkpoint.directory import DEFAULT_MODEL, GENERATION_FLAGS, GENERATION_HELP, choose_generation
from utils.checkpoint.flag_parser import DataclassFlagParser
from utils.checkpoint.weight_files import WEIGHT_FILES, model_files
from utils.common.errors import Faults, UsageError
from utils.common.files import check_output_path
from utils.common.processes import world_size
from utils.data.row_schema import COLUMNS_HELP, ColumnMap
from utils.inference.prompt_reader import BASE_NAME
from utils.layers.fp8 import FP8, check_device
from utils.layers.quantization import BITS
from utils.lora.formats import RAW_ALPHA, adapter_directory, files_of_adapter
from utils.models.chat_options import HELP, Switch
from utils.models.templates import TEMPLATES

DEFAULT_PROMPTS = "data/sample_prompts.jsonl"
DEFAULT_ANSWERS = "output/answers.jsonl"
T = TypeVar("T")


def flag(text: str, default: Any = None, **options: Any) -> Any:
    """Return a dataclass field: `text` is its help, `options` go to argparse (`metavar`, `aliases`)."""
    metadata = {"help": text, **options}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class ModelFlags:
    """Which model answers: checkpoint, adapters, precision, prompt template."""

    _argument_group_name = "model"

    model_name_or_path: str = flag("checkpoint directory or hub id", DEFAULT_MODEL)
    generation: Literal[*GENERATION_FLAGS] | None = flag(GENERATION_HELP)
    adapter_path: list[str] = flag(
        "adapter: a PEFT directory (of this toolkit, or trained on the remote code), the weight file in one, or a "
        "chatglm-lora.pt. With several, each row's \"adapter\" is the name of an adapter's directory, or "
        f'"{BASE_NAME}" for none',
        [],
        metavar="ADAPTER",
    )
    lora_alpha: int | None = flag(f"alpha of a chatglm-lora.pt, which does not record it (default: {RAW_ALPHA})")
    allow_base_mismatch: bool = flag(
        "use an adapter that was trained on other weights than the checkpoint's", False, aliases=["--any_base"]
    )
    quantize: Literal[*BITS] | None = flag("hold the weights in 8 or 4 bits")
    fp16: bool = flag("float16 weights: the default on a GPU", False)
    bf16: bool = flag("bfloat16 weights", False)
    fp32: bool = flag("float32 weights: the default without a GPU", False)
    template: Literal[*TEMPLATES] | None = flag(
        "prompt template (default: the one that the adapter was trained with, else native)"
    )
    thinking: Switch | None = flag(HELP["thinking"])
    clear_thinking: Switch | None = flag(HELP["clear_thinking"])
    reasoning_effort: str | None = flag(HELP["reasoning_effort"])

    def collect_faults(self) -> Faults:
        """Return every mistake in the flags that needs no file; a subclass adds those of its own."""
        return Faults()


@dataclass(kw_only=True)
class InferenceModelFlags(ModelFlags):
    """ModelFlags and what only batch inference can do with a model."""

    _argument_group_name = "model"

    quantize: Literal[*BITS, FP8] | None = flag("hold the weights in 8 or 4 bits; fp8 is for speed, on Hopper GPUs")
    bf16: bool = flag("bfloat16 weights: the default with --quantize fp8", False)
    merge_and_save: str | None = flag(
        "write the model with the adapter merged into its weights to DIR; rows are answered only if --input_path is "
        "given too",
        metavar="DIR",
    )
    tp_size: int | None = flag(
        "processes that share one model by tensor parallelism (default: the fewest whose memory holds it)"
    )
    local_rank: int | None = flag(argparse.SUPPRESS)  # added by DeepSpeed's launcher; LOCAL_RANK is what counts


@dataclass(kw_only=True)
class RowFlags:
    """Which rows are answered, how a row becomes a prompt, where the answers go."""

    _argument_group_name = "rows"

    input_path: str | None = flag(
        f"JSON Lines, JSON array, .csv, .tsv, or .txt with a prompt a line (default: {DEFAULT_PROMPTS})"
    )
    output_path: str = flag("JSON Lines, .csv or .tsv", DEFAULT_ANSWERS)
    prompt_column: str | None = flag("the column that is the whole prompt", metavar="NAME")
    prompt_template: str | None = flag(
        "a prompt with column names in braces: \"把'{text}'改写成问句\"", metavar="TEXT"
    )
    columns: str | None = flag(COLUMNS_HELP, metavar="ROLE=COLUMN,...")
    overwrite: bool = flag("answer all rows again; without it the same command resumes where it was stopped", False)


@dataclass(kw_only=True)
class AnswerFlags:
    """How tokens are chosen, and when an answer ends."""

    _argument_group_name = "answers"

    batch_size: int = flag("sequences decoded together; 0: as many as memory holds", 0)
    max_new_tokens: int = flag("most tokens of an answer", 512)
    temperature: float = flag("temperature of sampling; 0: greedy", 0.0)
    top_k: int = flag("sample among the k most likely tokens; 0: all", 0)
    top_p: float = flag("sample among the most likely tokens that together have this probability", 1.0)
    repetition_penalty: float = flag("above 1: tokens that occurred become less likely", 1.0)
    seed: int = flag("seed of sampling; a row's answer depends on it and on the row's number", 0)
    num_return_sequences: int = flag("answers a row", 1)
    stop_strings: list[str] = flag("texts that end an answer", [], metavar="TEXT", aliases=["--stop"])


@dataclass(kw_only=True)
class PlacementFlags:
    """Where the layers of a model go that does not fit on one card."""

    _argument_group_name = "placement"

    max_memory: list[str] | None = flag(
        "most memory of each device, as 0=10GiB cpu=30GiB (default: what is free)", metavar="DEVICE=SIZE"
    )
    offload_folder: str | None = flag("directory for weights that fit nowhere else (default: a temporary one)")


@dataclass(kw_only=True)
class InferenceArguments(InferenceModelFlags, RowFlags, AnswerFlags):
    """All flags of chatglm_deepspeed_inference.py."""

    @property
    def answers_rows(self) -> bool:
        """Whether rows are answered, or only a merged checkpoint is written."""
        return self.merge_and_save is None or self.input_path is not None

    def collect_faults(self) -> Faults:
        """Return every mistake in the flags: bad values, missing and conflicting flags."""
        faults = Faults()
        self._check_files(faults)
        check_minimums(self, faults, batch_size=0, max_new_tokens=1, num_return_sequences=1, top_k=0)
        check_sampling(self.temperature, self.top_p, self.repetition_penalty, faults)
        if self.temperature == 0:
            for name, neutral in (("top_k", 0), ("top_p", 1.0), ("num_return_sequences", 1)):
                if getattr(self, name) != neutral:
                    faults.add(f"--{name} {getattr(self, name)} samples: give a --temperature above 0 too")
        if "" in self.stop_strings:
            faults.add("--stop_strings has an empty text, which would end every answer at once: leave it out")
        self._check_adapters(faults)
        self._check_exclusions(faults)
        return faults

    def _check_files(self, faults: Faults) -> None:
        model = Path(self.model_name_or_path)
        weights = [file for name in WEIGHT_FILES for file in model.glob(f"*{Path(name).suffix}")]
        adapters = [file for path in self.adapter_path for file in files_of_adapter(path)]
        prompts = self.input_path or DEFAULT_PROMPTS
        inputs = [prompts, *weights, *model_files(model), *adapters]
        if self.answers_rows and not os.path.exists(prompts):  # known before a checkpoint is downloaded
            faults.add(f"--input_path {prompts} does not exist")
        elif self.answers_rows and os.path.isdir(prompts):
            faults.add(f"--input_path {prompts} is a directory: name a file of rows")
        with faults.collect():
            check_output_path(self.output_path, inputs, "--output_path")

    def _check_adapters(self, faults: Faults) -> None:
        count = len(self.adapter_path)
        for path in self.adapter_path:
            if not os.path.exists(path):
                faults.add(f"--adapter_path {path} does not exist: name the --output_dir of a training")
        if self.merge_and_save and count != 1:
            number = f"{count} were given" if count else "none was given"
            faults.add(
                f"--merge_and_save {self.merge_and_save} needs an adapter to merge, one --adapter_path; {number}"
            )
        if self.merge_and_save and self.quantize:
            faults.add("--merge_and_save writes full weights: give it without --quantize")
        if self.lora_alpha is not None and not count:
            faults.add(f"--lora_alpha {self.lora_alpha} is an adapter's: give --adapter_path too")
        names = adapter_names(self.adapter_path)
        if len(set(names)) < count or (count > 1 and BASE_NAME in names):
            faults.add(
                f"--adapter_path: the names {', '.join(names)} must differ, also from {BASE_NAME}: rename a directory"
            )

    def _check_exclusions(self, faults: Faults) -> None:
        precisions = [f"--{name}" for name in ("fp16", "bf16", "fp32") if getattr(self, name)]
        if len(precisions) > 1:
            faults.add(f"{' and '.join(precisions)} exclude each other: give one")
        if self.prompt_column is not None and self.prompt_template is not None:
            faults.add("--prompt_column and --prompt_template exclude each other: give one")
        with faults.collect():
            named = {"prompt", "input", "messages"} & ColumnMap.parse(self.columns).roles
            if named and (self.prompt_column or self.prompt_template):
                faults.add("--columns names a prompt, and so does --prompt_column or --prompt_template: give one")
        if self.tp_size is not None and (self.tp_size < 1 or world_size() % self.tp_size):
            faults.add(f"--tp_size {self.tp_size} does not divide the {world_size()} processes")
        if self.quantize == FP8:
            with faults.collect():
                check_device()
            if self.fp32 or self.fp16:
                faults.add("--quantize fp8 computes in bfloat16: give it without --fp32 and --fp16")


@dataclass(kw_only=True)
class DispatchArguments(InferenceArguments, PlacementFlags):
    """All flags of chatglm_milti_gpu_inference.py."""

    def collect_faults(self) -> Faults:
        """Return every mistake in the flags."""
        faults = super().collect_faults()
        with faults.collect():
            parse_max_memory(self.max_memory)
        return faults


def parse_max_memory(values: list[str] | None) -> dict[int | str, str] | None:
    """
    Parse ["0=10GiB", "cpu=30GiB"] into {0: "10GiB", "cpu": "30GiB"}; None stays None.

    Raises:
        UsageError: a value is not of the form DEVICE=SIZE.
    """
    if not values:
        return None
    memory: dict[int | str, str] = {}
    for value in values:
        device, _, size = value.partition("=")
        if not size or not (device.isdigit() or device == "cpu"):
            raise UsageError(f"--max_memory {value}: write DEVICE=SIZE, like 0=10GiB or cpu=30GiB")
        memory[int(device) if device.isdigit() else device] = size
    return memory


def check_minimums(args: Any, faults: Faults, **minimums: int) -> None:
    """Add to `faults` each flag of `args` whose value is below its minimum."""
    for name, minimum in minimums.items():
        if getattr(args, name) < minimum:
            faults.add(f"--{name} {getattr(args, name)} must be at least {minimum}")


def check_sampling(temperature: float, top_p: float, repetition_penalty: float, faults: Faults) -> None:
    """Add to `faults` the sampling flags that are out of range."""
    if temperature < 0:
        faults.add(f"--temperature {temperature} must be at least 0, which is greedy")
    if not 0 < top_p <= 1:
        faults.add(f"--top_p {top_p} must be above 0 and at most 1")
    if repetition_penalty <= 0:
        faults.add(f"--repetition_penalty {repetition_penalty} must be above 0")


def adapter_names(paths: Sequence[str]) -> list[str]:
    """Return the name of each adapter: that of its directory, or of its bare weight file."""
    directories = [adapter_directory(path) for path in paths]
    return [directory.name or directory.resolve().name for directory in directories]


def choose_dtype(args: ModelFlags) -> tuple[torch.dtype, str]:
    """Return the dtype of the weights, and its name with the reason."""
    gpu = torch.cuda.is_available()
    if args.fp32 or args.bf16:
        dtype, why = torch.float32 if args.fp32 else torch.bfloat16, "flag"
    elif gpu and args.quantize == FP8:
        dtype, why = torch.bfloat16, "default with fp8"
    elif gpu:
        dtype, why = torch.float16, "flag" if args.fp16 else "default on a GPU"
    else:
        dtype, why = torch.float32, "--fp16 needs a GPU and there is none" if args.fp16 else "default without a GPU"
    return dtype, f"{str(dtype).removeprefix('torch.')} ({why})"


def parse_flags(kind: type[T], description: str, usage: str = "%(prog)s [--FLAG VALUE ...]") -> T:
    """
    Parse sys.argv into a dataclass of flags, and apply --generation.

    --help ends the process.

    Args:
        kind: a dataclass whose bases with an `_argument_group_name` are the groups of --help.
        description: the text of --help, usually the script's docstring.

    Raises:
        UsageError: flags that cannot be parsed, reported with what `collect_faults` finds.
    """
    parser = DataclassFlagParser(_groups(kind), usage=usage, description=description)
    values, faults = parser.parse_with_faults()
    args = kind(**vars(values))
    if faults.messages:
        faults.messages += args.collect_faults().messages
    faults.report()
    choose_generation(args.model_name_or_path, args.generation)
    return args


def _groups(kind: type) -> list[type]:
    if "_argument_group_name" in vars(kind):
        return [kind]
    return [group for base in kind.__bases__ for group in _groups(base)]
