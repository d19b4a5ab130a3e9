"""The flags that both inference scripts share, and what follows from them."""

import argparse
import json
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.checkpoint.model import Checkpoint
from utils.common.errors import UsageError
from utils.common.file_hashes import hash_files
from utils.common.processes import is_main_process, print_once, process_rank
from utils.distributed.process_group import check_port, init_process_group, on_all_processes
from utils.inference.answer_writer import AnswerFile
from utils.inference.arguments import DEFAULT_PROMPTS, adapter_names
from utils.inference.engine import can_serve
from utils.inference.generate import AnswerSettings, Job, answer_rows, settings_of
from utils.inference.merge_export import merge_and_save, read_template
from utils.inference.placement import input_device
from utils.inference.prompt_reader import BASE, PromptForm, read_requests
from utils.inference.sampling import Sampling
from utils.inference.work_queue import SINGLE_REPLICA, Replica
from utils.layers.quantization import stored_bits
from utils.lora.adapter import check_base, load_adapter, merge_adapter, read_origin, warn_of_old_ids
from utils.lora.formats import files_of_adapter
from utils.lora.multi_lora import add_adapters
from utils.models.templates import ChatTemplate, template_for


def check_adapters(args: argparse.Namespace) -> None:
    """
    Raises:
        UsageError: see `check_base`.
    """
    if not args.adapter_path:
        return
    checkpoint = Checkpoint.open(args.model_name_or_path, quantize=stored_bits(args.quantize))
    for path in args.adapter_path:
        if not args.any_base:
            check_base(path, checkpoint)
        if warning := warn_of_old_ids(path, checkpoint):
            print_once(warning)


def export_or_answer(args: argparse.Namespace, dtype: torch.dtype) -> bool:
    """Writes the merged checkpoint if `args` ask for it, and says whether there are rows to answer."""
    if not args.merge_and_save:
        return True
    if is_main_process():
        merge_and_save(args.model_name_or_path, args.adapter_path[0], args.merge_and_save, dtype, args.lora_alpha)
        print(json.dumps({"merged_checkpoint": args.merge_and_save}), flush=True)
    return args.input_path is not None


def put_adapters(model: PreTrainedModel, args: argparse.Namespace, shards: bool = False) -> PreTrainedModel:
    """
    The model with the adapters of `args`: one in its weights where that is exact, in float32 on a model that is not
    offloaded, or where it `shards`; otherwise beside them, and so are several, for each row to choose.

    Raises:
        UsageError: see `load_adapter` and `add_adapters`; or several cannot be sharded.
    """
    if len(args.adapter_path) > 1:
        if shards:
            raise UsageError("several adapters on a sharded model are not supported: give one, or --tp_size 1")
        add_adapters(
            model, dict(zip(adapter_names(args.adapter_path), args.adapter_path, strict=True)), args.lora_alpha
        )
        return model
    for path in args.adapter_path:
        merge = shards or (model.dtype == torch.float32 and can_serve(model))
        return (merge_adapter if merge else load_adapter)(model, path, args.lora_alpha)
    return model


def resolve_template(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """
    The flag decides; without it, what the adapter was trained with; without an adapter, the model's own.

    Raises:
        UsageError: several adapters were trained with different ones.
    """
    name, why = args.template, "flag"
    if name is None:
        origins = [origin for path in args.adapter_path if (origin := read_origin(path))]
        trained = {origin.template for origin in origins}
        if len(trained) > 1:
            raise UsageError(
                f"the adapters were trained with the templates {', '.join(sorted(trained))}: one --template"
            )
        name, why = (trained.pop(), "the adapter's") if trained else ("native", "default")
        merged = read_template(args.model_name_or_path)
        if merged and not origins:
            name, why = merged, "the merged adapter's"
    print_once(f"template {name} ({why})")
    return template_for(tokenizer, name)


def open_job(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> Job:
    """
    Reads the rows and what is known of their answers, before the model takes its time to load. Every process must
    call it; they are a group from here on.

    Raises:
        UsageError: see `check_port`, `read_requests` and `AnswerFile.begin`.
    """
    template = resolve_template(args, tokenizer)
    names = tuple(adapter_names(args.adapter_path)) if len(args.adapter_path) > 1 else ()
    form = PromptForm(args.prompt_column, args.prompt_template, (*names, BASE) if names else (), args.columns)
    requests = read_requests(args.input_path or DEFAULT_PROMPTS, tokenizer, template, form)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.seed)
    settings = AnswerSettings(args.max_new_tokens, sampling, args.num_return_sequences, tuple(args.stop), names)
    checkpoint = Checkpoint.open(args.model_name_or_path, quantize=stored_bits(args.quantize))
    recorded = settings_of(
        settings,
        generation=checkpoint.generation.name,
        lora_alpha=args.lora_alpha,
        template=template.name,
        stop_ids=template.stop_ids(tokenizer),
        dtype=str(dtype),
        quantize=args.quantize,
    )
    check_port()
    init_process_group(use_deepspeed=False)
    recorded |= on_all_processes(lambda: _hash_files_read(args, checkpoint))[0]
    output = AnswerFile(args.output_path, recorded, process_rank(), args.overwrite)
    return Job(template, requests, settings, output, output.begin(requests), args.batch_size)


def _hash_files_read(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """Of model and adapters; on the main process, whose files stand for all."""
    if not is_main_process():
        return {}
    adapters = [hash_files(files_of_adapter(path)) for path in args.adapter_path]
    return {**checkpoint.content_hashes(), "adapter_files": adapters}


def answer(
    job: Job, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, replica: Replica = SINGLE_REPLICA
) -> None:
    answer_rows(job, model, tokenizer, input_device(model), replica)
