"""
Write base and adapter as one merged checkpoint (--merge_and_save).

In: an opened checkpoint, its tokenizer, an adapter. Out: a directory that other programs open without code of this
repository (ChatGLM-6B: the released layout). Called by utils/inference/job.py.

`merge_and_unload` and `save_pretrained` alone would not do: what was written is read again, must answer fixed prompts
as base and adapter do, and its chat template must give the tokens of training. In one text a tokenizer finds special
tokens wherever they are spelled, and joins a newline with the white space after it. Two of Unicode's noncharacters,
which the chat template inserts and the exported tokenizer drops, prevent both.
"""

import ctypes
import itertools
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from utils.checkpoint.directory import check_name
from utils.checkpoint.model import Checkpoint, load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.console import Progress, print_line
from utils.common.errors import UsageError
from utils.common.files import apply_umask
from utils.common.json_files import read_json_object
from utils.data.collators import left_pad
from utils.lora.adapter import load_adapter, read_origin
from utils.models.checkpoint_files import GENERATION_KEY
from utils.models.checkpoint_template import CheckpointTemplate
from utils.models.conversation import Message
from utils.models.convert_tokenizer import fast_tokenizer, special_tokens
from utils.models.family import CHATGLM_6B, MERGED
from utils.models.jinja_templates import chat_template, keep_apart
from utils.models.templates import TEMPLATES, AlpacaTemplate, ChatTemplate, encode_prompt, template_for

TEMPLATE_FILE = "template.json"
GENERATION_FILE = "generation_config.json"
CHECK_PROMPTS = ("你好", "请写一句祝福的话。", "1+1=?", "Translate into Chinese: The weather is fine today.")
CHECK_TOKENS = 16  # answer tokens that are compared for each prompt
USER, ASSISTANT = Message("user", " 你好\n"), Message("assistant", "\n<|user|> sop")
CHECK_CHATS = ([USER], [Message("system", "你是客服。"), USER, ASSISTANT, USER])
# Files of a released ChatGLM-6B that are copied beside the merged weights; never its code.
RELEASED_FILES = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    CHATGLM_6B.vocab_file,
)
# Files of a base with a tokenizer.json, which GLM-4-0414 and GLM-Z1 keep; the last is a directory.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)
# Files of a base whose content gets into the merged checkpoint.
COPIED_FILES = (*RELEASED_FILES, *TOKENIZER_FILES, "tokenizer.model", GENERATION_FILE, TEMPLATE_FILE)


@dataclass(frozen=True)
class MergeSource:
    """What a merged checkpoint is made of."""

    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    adapter_path: str | Path
    lora_alpha: int | None = None  # of an adapter that does not record it


def merge_and_save(source: MergeSource, directory: str | Path, dtype: torch.dtype) -> None:
    """
    Write base and adapter, merged in `dtype`, to `directory`: all of it or nothing.

    ChatGLM-6B keeps its released layout. The others become what transformers saves of `GlmForCausalLM` or
    `Glm4ForCausalLM`, with a `tokenizer.json`, a chat template and the stop tokens in `generation_config.json`.
    GLM-4-0414 and GLM-Z1 keep the tokenizer and the chat template of their base.

    Raises:
        UsageError: the base is quantised, a file of it is a link to elsewhere, `directory` holds something already,
            or see `load_adapter`.
        RuntimeError: in float32, what was written answers fixed prompts with other greedy tokens (in 16 bits only
            their number is printed); or its chat template gives other tokens than training.
    """
    checkpoint, tokenizer = source.checkpoint, source.tokenizer
    target = Path(directory)
    _check_mergeable(checkpoint, target)
    origin = read_origin(source.adapter_path)
    template = origin.template if origin else read_template(checkpoint.directory)
    generation_config = _generation_config(checkpoint, tokenizer)
    progress = Progress("merging", 4, "steps")
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        progress.shown(),
        tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary,
    ):
        progress.advance(0, "reading the weights")
        model = checkpoint.empty_model(dtype)
        checkpoint.fill(model, {"": "cpu"})
        progress.advance(1, "answering with base and adapter")
        adapted = load_adapter(model, source.adapter_path, source.lora_alpha)
        before = _greedy_tokens(model, tokenizer)
        merged = adapted.merge_and_unload()
        merged.generation_config = generation_config
        progress.advance(1, f"writing {target}")
        complete = Path(temporary) / "checkpoint"
        complete.mkdir()
        if checkpoint.generation.name in MERGED:
            _save_glm(merged, source, complete, template)
        else:
            _save_released_layout(merged, checkpoint, complete)
        if template:
            (complete / TEMPLATE_FILE).write_text(json.dumps({"template": template}))
        del model, adapted, merged
        _return_freed_memory()
        progress.advance(1, "answering with what was written")
        after = _greedy_tokens(load_model(str(complete), dtype=dtype), load_tokenizer(str(complete)))
        equal = int((before == after).sum())
        print_line(f"greedy tokens before and after merging: {equal} of {before.numel()} equal")
        if equal < before.numel() and dtype == torch.float32:
            raise RuntimeError(f"{target} is not written: it does not answer as the base with the adapter does")
        keeps_template = checkpoint.generation.keeps_tokenizer or template == CheckpointTemplate.name
        if (complete / "tokenizer.json").is_file() and not keeps_template:
            _check_chats(complete, tokenizer, template_for(tokenizer, template or ChatTemplate.name))
        apply_umask(complete)
        if target.exists():
            target.rmdir()
        complete.rename(target)
        progress.advance(1, "")


def _return_freed_memory() -> None:
    """Return freed memory to the system: glibc keeps that of tensors below 32 MB, and what comes next is mapped."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


def _check_mergeable(checkpoint: Checkpoint, target: Path) -> None:
    if checkpoint.quantization:
        raise UsageError(
            f"{checkpoint.directory} is quantised and cannot take an adapter: merge into the unquantised checkpoint"
        )
    check_name("--merge_and_save", target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"--merge_and_save {target} exists and is not empty: choose another directory")
    for name in COPIED_FILES:
        _refuse_link(checkpoint.directory, name)


def read_template(path_or_id: str | Path) -> str | None:
    """
    Return the template of a merged checkpoint; None for any other.

    Raises:
        UsageError: the checkpoint's template.json is not what `merge_and_save` writes.
    """
    file = Path(path_or_id) / TEMPLATE_FILE
    if not file.exists():
        return None
    name = read_json_object(file, {"template": str})["template"]
    if name not in TEMPLATES:
        raise UsageError(f"{file}: the template is {name!r:.60}, not {' or '.join(TEMPLATES)}")
    return name


def _refuse_link(directory: Path, name: str) -> None:
    """
    Refuse a link out of the directory: it would publish a private file.

    In a hub cache a link may lead to the blobs of this repository.

    Raises:
        UsageError: `name`, or a file below it, is such a link.
    """
    root = directory.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for file in itertools.chain([directory / name], (directory / name).glob("**/*")):
        if file.exists() and not any(file.resolve().is_relative_to(root) for root in allowed):
            raise UsageError(f"{file} is a link to {file.resolve()}, which a merge does not copy: put the file there")


def _generation_config(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """
    Return the base's settings for `generate` with the stop tokens of its chats.

    transformers refuses to write settings without effect, for example a temperature beside do_sample false: those are
    dropped, and one line names them.

    Raises:
        UsageError: transformers cannot read the file.
    """
    file = checkpoint.directory / GENERATION_FILE
    settings = {"bos_token_id": checkpoint.config.bos_token_id} | (read_json_object(file) if file.exists() else {})
    stop_ids = template_for(tokenizer).stop_ids(tokenizer)
    if checkpoint.generation.keeps_tokenizer:
        stop_ids = sorted(stop_ids)  # as released
    settings |= {"eos_token_id": stop_ids, "pad_token_id": tokenizer.pad_token_id}
    without_effect: list[str] = []
    while True:
        try:
            config = GenerationConfig.from_dict(dict(settings))
            config.validate(strict=True)
            break
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            reason = str(error)
            named = re.findall(r"^- `(\w+)`:", reason, flags=re.MULTILINE) or re.findall(r"`(\w+)`", reason)
            named = [name for name in dict.fromkeys(named) if name in settings]
            if not named:
                raise UsageError(f"{file} cannot be used: {' '.join(reason.split())[:300]}") from None
            without_effect += named
            settings = {name: value for name, value in settings.items() if name not in named}
    if without_effect:
        print_line(f"{GENERATION_FILE} without {', '.join(without_effect)}: no effect beside its other settings")
    return config


@torch.inference_mode()
def _greedy_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return greedy answers to CHECK_PROMPTS without stopping: (prompts, CHECK_TOKENS) int64."""
    model.generation_config = GenerationConfig()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    prompts = [encode_prompt(tokenizer, [Message("user", text)]) for text in CHECK_PROMPTS]
    inputs = {name: tensor.to(device) for name, tensor in left_pad(prompts, tokenizer.pad_token_id).items()}
    output = model.generate(
        **inputs,
        max_new_tokens=CHECK_TOKENS,
        min_new_tokens=CHECK_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to("cpu")
    return output[:, inputs["input_ids"].shape[1] :].cpu()


def _check_chats(directory: Path, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
    """
    Raises:
        RuntimeError: the chat template in `directory` gives other tokens than `template`, with which rows are encoded.
    """
    served = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    for chat in CHECK_CHATS:
        messages = [{"role": message.role, "content": message.content} for message in chat]
        ids = served.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if list(ids) != encode_prompt(tokenizer, chat, template):
            raise RuntimeError(f"{directory} is not written: its chat template gives other tokens than training does")


def _save_released_layout(model: PreTrainedModel, checkpoint: Checkpoint, directory: Path) -> None:
    """Write the weights under their released names, and copy RELEASED_FILES."""
    state = model.state_dict()
    for target in model.all_tied_weights_keys:  # the release holds both; transformers would drop the copy
        state[target] = state[target].clone()
    model.save_pretrained(directory, state_dict=state)
    for name in RELEASED_FILES:
        if (checkpoint.directory / name).is_file():
            shutil.copyfile(checkpoint.directory / name, directory / name)
    _edit(directory / "config.json", torch_dtype=str(model.dtype).removeprefix("torch."))


def _save_glm(model: PreTrainedModel, source: MergeSource, directory: Path, template: str | None) -> None:
    """
    Write transformers' layout of its model class: weights, configuration, tokenizer and chat template.

    Args:
        template: name of the template that the adapter was trained with, None if it records none.
    """
    tokenizer, settings = source.tokenizer, model.generation_config
    model.config.eos_token_id, model.config.pad_token_id = settings.eos_token_id, settings.pad_token_id
    model.save_pretrained(directory)
    rope = model.config.rope_parameters  # older programs know them by other names: write both
    older = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor")}
    if rope["rope_type"] != "default":
        older["rope_scaling"] = {key: rope[key] for key in ("rope_type", "factor")}
    _edit(directory / "config.json", **older)
    if source.checkpoint.generation.keeps_tokenizer:
        _edit(directory / "config.json", **{GENERATION_KEY: source.checkpoint.generation.name})
        _copy_tokenizer(source.checkpoint.directory, directory)
        return
    opening = AlpacaTemplate.instruction if template == AlpacaTemplate.name else None
    own = tokenizer.chat_template if template == CheckpointTemplate.name else None  # of the base's files
    if source.checkpoint.generation.tokenizer_class is None:  # the base has a tokenizer.json already
        keep_apart(tokenizer.backend_tokenizer)
        made = chat_template(tokenizer, special_tokens(tokenizer.backend_tokenizer), opening)
        tokenizer.chat_template = own or made
        tokenizer.save_pretrained(directory)
        return
    _edit(directory / "config.json", **{GENERATION_KEY: source.checkpoint.generation.name})
    try:
        fast = fast_tokenizer(tokenizer, opening)
        fast.chat_template = own or fast.chat_template
        fast.save_pretrained(directory)
        _edit(directory / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")  # any version knows it
    except ValueError as error:
        print_line(f"tokenizer.json is not written, and other programs need it: {error}")
    if MERGED[source.checkpoint.generation.name].tokenizer_class:  # our scripts read the release's own file
        tokenizer.save_vocabulary(str(directory))
        _edit(directory / "tokenizer_config.json", pad_with_unk=tokenizer.pad_with_unk)


def _copy_tokenizer(base: Path, directory: Path) -> None:
    """Copy the files of a tokenizer that transformers reads, and its chat templates, as they are."""
    for name in TOKENIZER_FILES:
        if (base / name).is_dir():
            shutil.copytree(base / name, directory / name)
        elif (base / name).is_file():
            shutil.copyfile(base / name, directory / name)


def _edit(file: Path, **changes: Any) -> None:
    values = read_json_object(file) if file.is_file() else {}
    file.write_text(json.dumps(values | changes, ensure_ascii=False, indent=2), encoding="utf-8")
