"""A base model with an adapter in its weights, written as a checkpoint of its own."""

import itertools
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from utils.checkpoint.directory import check_name
from utils.checkpoint.model import Checkpoint, load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.errors import UsageError
from utils.common.json_files import read_json_object
from utils.common.processes import print_once
from utils.data.collators import left_pad
from utils.lora.adapter import load_adapter, read_origin
from utils.models.conversation import Message
from utils.models.convert_tokenizer import fast_tokenizer, special_tokens
from utils.models.family import CHATGLM_6B, MERGED, MERGED_FROM
from utils.models.jinja_templates import chat_template, keep_apart
from utils.models.templates import TEMPLATES, AlpacaTemplate, ChatTemplate, encode_prompt, template_for

TEMPLATE_FILE = "template.json"
GENERATION_FILE = "generation_config.json"
PROOF = ("你好", "请写一句祝福的话。", "1+1=?", "Translate into Chinese: The weather is fine today.")
PROOF_TOKENS = 16
USER, ASSISTANT = Message("user", " 你好\n"), Message("assistant", "\n<|user|> sop")
PROOF_CHATS = ([USER], [Message("system", "你是客服。"), USER, ASSISTANT, USER])
# Of a released ChatGLM-6B, beside its weights; never its code.
KEPT = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", CHATGLM_6B.vocab_file)
# Files of a base whose content reaches what is written.
READ = (
    *(*KEPT, "tokenizer.model", "tokenizer.json", GENERATION_FILE, TEMPLATE_FILE),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates"),
)


def merge_and_save(
    path_or_id: str,
    adapter_path: str,
    directory: str | Path,
    dtype: torch.dtype,
    lora_alpha: int | None = None,
) -> None:
    """
    Writes the checkpoint in `path_or_id` with an adapter added into its weights, in `dtype`, to `directory`, which
    appears complete or not at all.

    ChatGLM-6B keeps its released layout. The others become what transformers saves of `GlmForCausalLM`, with a
    `tokenizer.json`, a chat template and the stop tokens in `generation_config.json`, to open with no code of this
    repository. What was written is read again: it must answer fixed prompts, greedily, as the base with the adapter
    beside its weights does, and its chat template must give fixed chats the tokens of training.

    Raises:
        UsageError: the base is quantised, a file of it is a link to elsewhere, `directory` holds something already,
            or see `load_adapter`.
        RuntimeError: in float32, the greedy tokens differ; or those of a chat do.
    """
    checkpoint = Checkpoint.open(path_or_id)
    target = Path(directory)
    if checkpoint.quantization:
        raise UsageError(f"{path_or_id} is quantised and cannot take an adapter: merge into the checkpoint in full")
    check_name("--merge_and_save", target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"--merge_and_save {target} exists and is not empty: choose another directory")
    for name in READ:
        _refuse_link(checkpoint.directory, name)
    origin = read_origin(adapter_path)
    recorded = origin.template if origin else read_template(checkpoint.directory)
    tokenizer = load_tokenizer(path_or_id)
    settings = _generation_config(checkpoint, tokenizer)
    model = load_model(path_or_id, dtype=dtype)
    adapted = load_adapter(model, adapter_path, lora_alpha)
    before = _greedy(model, tokenizer)
    merged = adapted.merge_and_unload()
    merged.generation_config = settings
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        complete = Path(temporary) / "checkpoint"
        complete.mkdir()
        if checkpoint.generation.name in MERGED:
            _save_glm(merged, tokenizer, checkpoint, complete, recorded == AlpacaTemplate.name)
        else:
            _save_released_layout(merged, checkpoint, complete)
        if recorded:
            (complete / TEMPLATE_FILE).write_text(json.dumps({"template": recorded}))
        del model, adapted, merged
        after = _greedy(load_model(str(complete), dtype=dtype), load_tokenizer(str(complete)))
        equal = int((before == after).sum())
        print_once(f"greedy tokens before and after merging: {equal} of {before.numel()} equal")
        if equal < before.numel() and dtype == torch.float32:
            raise RuntimeError(f"{target} is not written: it does not answer as the base with the adapter does")
        if (complete / "tokenizer.json").is_file():
            _prove_chats(complete, tokenizer, template_for(tokenizer, recorded or ChatTemplate.name))
        if target.exists():
            target.rmdir()
        complete.rename(target)


def read_template(path_or_id: str | Path) -> str | None:
    """
    The template of the adapter that a merged checkpoint took; None for any other checkpoint.

    Raises:
        UsageError: the file that says it is not what `merge_and_save` writes.
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
    A link may lead to another file of the directory, or to where a hub cache keeps the files of this repository.

    Raises:
        UsageError: `name`, or a file below it, is a link to elsewhere: private files would come into what is shared.
    """
    root = directory.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for file in itertools.chain([directory / name], (directory / name).glob("**/*")):
        if file.exists() and not any(file.resolve().is_relative_to(place) for place in allowed):
            raise UsageError(f"{file} is a link to {file.resolve()}, which a merge does not copy: put the file there")


def _generation_config(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """
    A base's settings for `generate`, with the stop tokens of its chats, in a form that transformers can write: it
    refuses to write settings that have no effect beside the others, such as a temperature beside do_sample false.

    Raises:
        UsageError: transformers cannot read the file.
    """
    file = checkpoint.directory / GENERATION_FILE
    settings = {"bos_token_id": checkpoint.config.bos_token_id} | (read_json_object(file) if file.exists() else {})
    settings |= {"eos_token_id": template_for(tokenizer).stop_ids(tokenizer), "pad_token_id": tokenizer.pad_token_id}
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
        print_once(f"{GENERATION_FILE} without {', '.join(without_effect)}: no effect beside its other settings")
    return config


@torch.inference_mode()
def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """(prompts, PROOF_TOKENS) int64, whatever the model's own settings for `generate` are; no token ends an answer."""
    model.generation_config = GenerationConfig()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    prompts = [encode_prompt(tokenizer, [Message("user", text)]) for text in PROOF]
    inputs = {name: tensor.to(device) for name, tensor in left_pad(prompts, tokenizer.pad_token_id).items()}
    output = model.generate(
        **inputs,
        max_new_tokens=PROOF_TOKENS,
        min_new_tokens=PROOF_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to("cpu")
    return output[:, inputs["input_ids"].shape[1] :].cpu()


def _prove_chats(directory: Path, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
    """
    Raises:
        RuntimeError: what was written renders a chat otherwise than rows are made.
    """
    served = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    for chat in PROOF_CHATS:
        messages = [{"role": message.role, "content": message.content} for message in chat]
        made = served.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if list(made) != encode_prompt(tokenizer, chat, template):
            raise RuntimeError(f"{directory} is not written: its chat template makes other tokens than training does")


def _save_released_layout(model: PreTrainedModel, checkpoint: Checkpoint, directory: Path) -> None:
    """The weights under their released names, and the other files of the base as they are."""
    state = model.state_dict()
    for target in model.all_tied_weights_keys:  # the release holds both; transformers would drop the copy
        state[target] = state[target].clone()
    model.save_pretrained(directory, state_dict=state)
    for name in KEPT:
        if (checkpoint.directory / name).is_file():
            shutil.copyfile(checkpoint.directory / name, directory / name)
    _edit(directory / "config.json", torch_dtype=str(model.dtype).removeprefix("torch."))


def _save_glm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint, directory: Path, alpaca: bool
) -> None:
    settings = model.generation_config
    model.config.eos_token_id, model.config.pad_token_id = settings.eos_token_id, settings.pad_token_id
    model.save_pretrained(directory)
    rope = model.config.rope_parameters  # under the names of older readers too
    older = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor")}
    if rope["rope_type"] != "default":
        older["rope_scaling"] = {key: rope[key] for key in ("rope_type", "factor")}
    _edit(directory / "config.json", **older)
    opening = AlpacaTemplate.instruction if alpaca else None
    if checkpoint.generation.tokenizer_class is None:  # the base has a tokenizer.json
        keep_apart(tokenizer.backend_tokenizer)
        tokenizer.chat_template = chat_template(tokenizer, special_tokens(tokenizer.backend_tokenizer), opening)
        tokenizer.save_pretrained(directory)
        return
    _edit(directory / "config.json", **{MERGED_FROM: checkpoint.generation.name})
    try:
        fast_tokenizer(tokenizer, opening).save_pretrained(directory)
        _edit(directory / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")  # in every version
    except ValueError as error:
        print_once(f"without tokenizer.json, which other programs need: {error}")
    if MERGED[checkpoint.generation.name].tokenizer_class:  # the scripts here read the release's own file
        tokenizer.save_vocabulary(str(directory))
        _edit(directory / "tokenizer_config.json", pad_with_unk=tokenizer.pad_with_unk)


def _edit(file: Path, **changes: Any) -> None:
    values = read_json_object(file) if file.is_file() else {}
    file.write_text(json.dumps(values | changes, ensure_ascii=False, indent=2), encoding="utf-8")
