"""The flags that both inference scripts share, and their checks."""

import argparse
from pathlib import Path

import torch

from utils.checkpoint.directory import add_model_flags, choose_generation
from utils.checkpoint.weight_files import WEIGHT_FILES, model_files
from utils.common.errors import Faults
from utils.common.files import check_output_path
from utils.common.processes import print_once, world_size
from utils.data.row_schema import COLUMNS_HELP, NO_RENAMES, ColumnMap
from utils.inference.prompt_reader import BASE
from utils.layers.fp8 import FP8, check_device
from utils.layers.quantization import BITS
from utils.lora.formats import RAW_ALPHA, adapter_directory, files_of_adapter
from utils.models.templates import TEMPLATES

DEFAULT_PROMPTS = "data/sample_prompts.jsonl"
DEFAULT_ANSWERS = "output/answers.jsonl"


def add_inference_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    add_model_flags(model)
    model.add_argument(
        "--adapter_path",
        nargs="+",
        default=[],
        metavar="ADAPTER",
        help="adapter: a PEFT directory, of this training or of the remote code, the weight file in one, or a "
        "chatglm-lora.pt; of several, "
        'each row takes the one whose name, that of its directory, stands in its "adapter" ("base": none)',
    )
    model.add_argument("--lora_alpha", type=int, help=f"of a chatglm-lora.pt, which does not record it ({RAW_ALPHA})")
    model.add_argument(
        "--any_base", action="store_true", help="apply the adapter although it was trained on other weights"
    )
    model.add_argument(
        "--quantize",
        choices=(*BITS, FP8),
        help="hold the weights in 8 or 4 bits; fp8: faster, on Hopper GPUs",
    )
    precision = model.add_mutually_exclusive_group()
    precision.add_argument("--fp16", action="store_true", help="float16 weights: the default on a GPU")
    precision.add_argument("--bf16", action="store_true", help="bfloat16 weights; the default with --quantize fp8")
    precision.add_argument("--fp32", action="store_true", help="float32 weights: the default without a GPU")
    model.add_argument(
        "--merge_and_save",
        metavar="DIR",
        help="write the model with the adapter in its weights to DIR; answers rows only if --input_path is given too",
    )

    model.add_argument(
        "--tp_size", type=int, help="processes that share one model (the fewest whose memory holds it, at best 1)"
    )

    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--input_path", help=f"JSON Lines, JSON array, .csv, .tsv, or .txt with a prompt a line ({DEFAULT_PROMPTS})"
    )
    rows.add_argument("--output_path", default=DEFAULT_ANSWERS, help="JSON Lines, .csv or .tsv (%(default)s)")
    form = rows.add_mutually_exclusive_group()
    form.add_argument("--prompt_column", metavar="NAME", help="the column that is the prompt as it stands")
    form.add_argument(
        "--prompt_template", metavar="TEXT", help="a prompt with columns in braces: \"把'{text}'改写成问句\""
    )
    rows.add_argument("--columns", type=ColumnMap.parse, default=NO_RENAMES, help=COLUMNS_HELP)
    rows.add_argument(
        "--template", choices=TEMPLATES, help="form of the prompts (the one the adapter was trained with, else native)"
    )
    rows.add_argument(
        "--overwrite",
        action="store_true",
        help="answer all rows again; otherwise the same command goes on where it was stopped",
    )

    answers = parser.add_argument_group("answers")
    answers.add_argument("--batch_size", type=int, default=0, help="rows at once (0: as many as fit)")
    answers.add_argument("--max_new_tokens", type=int, default=512, help="tokens of an answer (%(default)s)")
    answers.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy (%(default)s)")
    answers.add_argument("--top_k", type=int, default=0, help="sample among so many tokens (0: all)")
    answers.add_argument(
        "--top_p", type=float, default=1.0, help="sample among tokens of this probability together (%(default)s)"
    )
    answers.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="above 1 against repeating (%(default)s)"
    )
    answers.add_argument("--seed", type=int, default=0, help="with the row's number it decides a sample (%(default)s)")
    answers.add_argument("--num_return_sequences", type=int, default=1, help="answers a row (%(default)s)")
    answers.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end an answer")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it


def check_sampling(args: argparse.Namespace, faults: Faults) -> None:
    """Adds to `faults` the values of sampling that cannot be."""
    if args.temperature < 0:
        faults.add(f"--temperature {args.temperature} must be at least 0, which is greedy")
    if not 0 < args.top_p <= 1:
        faults.add(f"--top_p {args.top_p} must be above 0 and at most 1")
    if args.repetition_penalty <= 0:
        faults.add(f"--repetition_penalty {args.repetition_penalty} must be above 0")


def check_inference_arguments(args: argparse.Namespace) -> None:
    """
    Raises:
        UsageError: with every fault: a size that cannot be, or a flag that needs another or excludes it.
    """
    choose_generation(args.model_name_or_path, args.generation)
    faults = Faults()
    with faults.collect():
        check_output_path(args.output_path, _files_read(args), "--output_path")
    for name, least in (("batch_size", 0), ("max_new_tokens", 1), ("num_return_sequences", 1), ("top_k", 0)):
        if getattr(args, name) < least:
            faults.add(f"--{name} {getattr(args, name)} must be at least {least}")
    check_sampling(args, faults)
    if args.temperature == 0:
        for name, neutral in (("top_k", 0), ("top_p", 1.0), ("num_return_sequences", 1)):
            if getattr(args, name) != neutral:
                faults.add(f"--{name} {getattr(args, name)} samples: give a --temperature above 0 too")
    if "" in args.stop:
        faults.add("--stop has an empty text, which would end every answer at once: leave it out")
    if args.merge_and_save and len(args.adapter_path) != 1:
        found = f"{len(args.adapter_path)} were given" if args.adapter_path else "none was given"
        faults.add(f"--merge_and_save {args.merge_and_save} needs an adapter to merge, one --adapter_path; {found}")
    if args.merge_and_save and args.quantize:
        faults.add("--merge_and_save writes full weights: give it without --quantize")
    if args.lora_alpha is not None and not args.adapter_path:
        faults.add(f"--lora_alpha {args.lora_alpha} is an adapter's: give --adapter_path too")
    if args.tp_size is not None and (args.tp_size < 1 or world_size() % args.tp_size):
        faults.add(f"--tp_size {args.tp_size} does not divide the {world_size()} processes")
    names = adapter_names(args.adapter_path)
    if len(set(names)) < len(names) or (len(names) > 1 and BASE in names):
        faults.add(f"--adapter_path: the names {', '.join(names)} must differ, also from {BASE}: rename a directory")
    if (args.prompt_column or args.prompt_template) and {"prompt", "input", "messages"} & dict(
        args.columns.pairs
    ).keys():
        faults.add("--columns names a prompt, and so does --prompt_column or --prompt_template: give one")
    if args.quantize == FP8:
        with faults.collect():
            check_device()
        if args.fp32 or args.fp16:
            faults.add("--quantize fp8 computes in bfloat16: give it without --fp32 and --fp16")
    faults.report()


def _files_read(args: argparse.Namespace) -> list[str | Path]:
    """The rows, and the files of model and adapters that are on this machine."""
    model = Path(args.model_name_or_path)
    weights = [file for name in WEIGHT_FILES for file in model.glob(f"*{Path(name).suffix}")]
    adapters = [file for path in args.adapter_path for file in files_of_adapter(path)]
    return [args.input_path or DEFAULT_PROMPTS, *weights, *model_files(model), *adapters]


def adapter_names(paths: list[str]) -> list[str]:
    """What rows call several adapters: the name of each one's directory, or of a file without one of its own."""
    return [directory.name or directory.resolve().name for directory in map(adapter_directory, paths)]


def resolve_dtype(args: argparse.Namespace) -> torch.dtype:
    """The weights' dtype; float16 needs a GPU, and a line says so where there is none."""
    gpu = torch.cuda.is_available()
    if args.fp32 or args.bf16:
        dtype, why = torch.float32 if args.fp32 else torch.bfloat16, "flag"
    elif gpu and args.quantize == FP8:
        dtype, why = torch.bfloat16, "default with fp8"
    elif gpu:
        dtype, why = torch.float16, "flag" if args.fp16 else "default on a GPU"
    else:
        dtype, why = torch.float32, "--fp16 needs a GPU and there is none" if args.fp16 else "default without a GPU"
    print_once(f"weights {str(dtype).removeprefix('torch.')} ({why})")
    return dtype
