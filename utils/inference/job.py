"""
Run batch inference: flags -> a file of answers, or a merged checkpoint.

Both inference scripts call `run_inference` with their dataclass of flags and a `load` that places the model.
tools/chat.py and tools/evaluate.py share how adapters are checked and how the template is chosen.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.checkpoint.model import Checkpoint
from utils.checkpoint.template import template_of_flags
from utils.common.console import print_line
from utils.common.errors import RunError, UsageError
from utils.common.file_hashes import hash_files
from utils.common.processes import is_main_process, process_rank
from utils.data.row_schema import ColumnMap
from utils.distributed.process_group import check_port, init_process_group, on_all_processes
from utils.inference.adapters import AttachAdapters
from utils.inference.answer_settings import PATHS
from utils.inference.answer_writer import AnswerFile
from utils.inference.arguments import (
    DEFAULT_PROMPTS,
    InferenceArguments,
    ModelFlags,
    adapter_names,
    choose_dtype,
    parse_flags,
)
from utils.inference.generate import AnswerSettings, Job, answer_rows, settings_of
from utils.inference.merge_export import MergeSource, merge_and_save, read_template
from utils.inference.placement import input_device
from utils.inference.prompt_reader import BASE_NAME, PromptForm, Prompts, read_prompt_rows
from utils.inference.run_report import print_header, print_merged, print_summary
from utils.inference.sampling import Sampling
from utils.inference.work_queue import Replica
from utils.layers.quantization import stored_bits
from utils.lora.adapter import check_base, read_origin, warn_of_old_ids
from utils.lora.formats import files_of_adapter
from utils.models.chat_options import chat_options
from utils.models.templates import ChatTemplate

# (flags, checkpoint, dtype of the weights, attach) -> the model with its adapters, and this process's replica of it.
Load = Callable[[Any, Checkpoint, torch.dtype, AttachAdapters], tuple[PreTrainedModel, Replica]]


def run_inference(kind: type[InferenceArguments], load: Load, description: str) -> None:
    """
    Answer the rows that sys.argv names; with --merge_and_save, merge first.

    Args:
        kind: the script's dataclass of flags.
        load: places the model, once rows and checkpoint are known to be good.
        description: the text of --help.

    Raises:
        UsageError: a flag, the rows, the checkpoint or an adapter is wrong.
        RunError: more than half of the rows have no answer; the output is complete.
    """
    args = parse_flags(kind, description)
    args.collect_faults().report()
    checkpoint = open_checkpoint(args)
    tokenizer = checkpoint.load_tokenizer()
    dtype, weights = choose_dtype(args)
    prompts = read_prompts(args, tokenizer) if args.answers_rows else None
    check_adapters(args, checkpoint)
    print_header(args, checkpoint, weights, prompts)
    if args.merge_and_save and is_main_process():
        source = MergeSource(checkpoint, tokenizer, args.adapter_path[0], args.lora_alpha)
        began = time.monotonic()
        merge_and_save(source, args.merge_and_save, dtype)
        print_merged(args, time.monotonic() - began)
        print(json.dumps({"merged_checkpoint": args.merge_and_save}), flush=True)
    if prompts is None:
        return
    job = open_job(args, prompts, checkpoint, dtype)
    model, replica = load(args, checkpoint, dtype, AttachAdapters.of(args))
    outcome = answer_rows(job, model, tokenizer, input_device(model), replica)
    if is_main_process():
        print_summary(args, outcome.summary, time.monotonic() - job.began)
        print(json.dumps(outcome.summary), flush=True)
    if 2 * outcome.failed > len(job.requests):
        raise RunError(
            f"{outcome.failed} of {len(job.requests)} rows could not be answered: {args.output_path} is complete and "
            'says why in their "error"'
        )


def open_checkpoint(args: ModelFlags) -> Checkpoint:
    """Open the checkpoint of --model_name_or_path, quantised as --quantize says; raises as `Checkpoint.open`."""
    return Checkpoint.open(args.model_name_or_path, quantize=stored_bits(args.quantize))


def read_prompts(args: InferenceArguments, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """
    Read --input_path with the template and the columns that the flags name.

    Raises:
        UsageError: no row has a prompt, or see `choose_template` and `read_prompt_rows`.
    """
    template, why = choose_template(args, tokenizer)
    names = _names_to_choose_from(args)
    choices = (*names, BASE_NAME) if names else ()
    form = PromptForm(args.prompt_column, args.prompt_template, choices, ColumnMap.parse(args.columns))
    rows = read_prompt_rows(args.input_path or DEFAULT_PROMPTS, tokenizer, template, form)
    if all(row.error for row in rows):  # known before the model takes its time to load
        raise UsageError(f"--input_path: none of its {len(rows):,} rows can be used; the first: {rows[0].error}")
    return Prompts(tokenizer, template, why, rows)


def _names_to_choose_from(args: ModelFlags) -> tuple[str, ...]:
    """Names of the adapters, if there are several and each row chooses one."""
    return tuple(adapter_names(args.adapter_path)) if len(args.adapter_path) > 1 else ()


def open_job(args: InferenceArguments, prompts: Prompts, checkpoint: Checkpoint, dtype: torch.dtype) -> Job:
    """
    Join the processes, claims --output_path and finds the answers that an earlier run left.

    Every process must call it, before the model takes its time to load.

    Raises:
        UsageError: see `check_port` and `AnswerFile.begin`.
    """
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.seed)
    names = _names_to_choose_from(args)
    settings = AnswerSettings(
        args.max_new_tokens, sampling, args.num_return_sequences, tuple(args.stop_strings), names
    )
    recorded = settings_of(  # keys of journals: never renamed
        settings,
        generation=checkpoint.generation.name,
        lora_alpha=args.lora_alpha,
        template=prompts.template.name,
        **prompts.template.options,
        stop_ids=prompts.template.stop_ids(prompts.tokenizer),
        dtype=str(dtype),
        quantize=args.quantize,
    )
    check_port()
    init_process_group(use_deepspeed=False)
    recorded |= on_all_processes(lambda: _hash_inputs(args, checkpoint))[0]
    paths = {name: getattr(args, name) for name in PATHS}
    output = AnswerFile(args.output_path, recorded, process_rank(), args.overwrite, paths)
    return Job(prompts.template, prompts.rows, settings, output, output.begin(prompts.rows), args.batch_size)


def _hash_inputs(args: ModelFlags, checkpoint: Checkpoint) -> dict[str, Any]:
    """Hash every byte of model and adapters, to notice weights changed in place."""
    if not is_main_process():  # its files count for all processes
        return {}
    adapters = [hash_files(files_of_adapter(path)) for path in args.adapter_path]
    return {**checkpoint.content_hashes(), "adapter_files": adapters}


def check_adapters(args: ModelFlags, checkpoint: Checkpoint) -> None:
    """
    Check that each adapter was trained on the checkpoint's weights.

    With --allow_base_mismatch nothing is checked.

    Raises:
        UsageError: see `check_base`.
    """
    for path in args.adapter_path:
        if not args.allow_base_mismatch:
            check_base(path, checkpoint)
        if warning := warn_of_old_ids(path, checkpoint):
            print_line(warning)


def choose_template(args: ModelFlags, tokenizer: PreTrainedTokenizerBase) -> tuple[ChatTemplate, str]:
    """
    Return the template of --template, else the adapter's, else native; and why.

    The template of an adapter merged into the checkpoint counts where no adapter on the command line records one.

    Raises:
        UsageError: several adapters were trained with different templates; or a flag sets what the template has not.
    """
    name, why = args.template, "flag"
    if name is None:
        origins = [origin for path in args.adapter_path if (origin := read_origin(path))]
        trained = {origin.template for origin in origins}
        merged = None if origins else read_template(args.model_name_or_path)
        if len(trained) > 1:
            names = ", ".join(sorted(trained))
            raise UsageError(f"the adapters were trained with the templates {names}: choose one with --template")
        if trained:
            name, why = trained.pop(), "the adapter's"
        elif merged:
            name, why = merged, "the merged adapter's"
        else:
            name, why = "native", "default"
    return template_of_flags(tokenizer, name, chat_options(args)), why
