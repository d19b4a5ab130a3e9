"""A base model with an adapter in its weights, written as a checkpoint of its own."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from utils.batching import left_pad
from utils.chatglm.fast_tokenizer import fast_tokenizer
from utils.chatglm.generations import CHATGLM, MERGED_FROM
from utils.chatglm.tokenization_chatglm2 import ChatGLM2Tokenizer
from utils.chatglm.vocab_file import VocabFileTokenizer
from utils.checkpoint import Checkpoint, load_model, load_tokenizer
from utils.distributed import print_once
from utils.errors import UsageError
from utils.lora import load_adapter, read_origin
from utils.prompts import encode_prompt, template_for
from utils.rows import Message

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

TEMPLATE_FILE = "template.json"
PROOF = ("你好", "请写一句祝福的话。", "1+1=?", "Translate into Chinese: The weather is fine today.")
PROOF_TOKENS = 16
KEPT = ("*.json", "*.model", "*.py", "*.jinja", "*.txt")  # of a released directory, beside the weights


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
    repository. What was written is read again, and must answer fixed prompts, greedily, as the base with the adapter
    beside its weights does.

    Raises:
        UsageError: the base is quantised, `directory` holds something already, or see `load_adapter`.
        RuntimeError: in float32, the greedy tokens differ.
    """
    checkpoint = Checkpoint.open(path_or_id)
    target = Path(directory)
    if checkpoint.quantization:
        raise UsageError(f"{path_or_id} is quantised and cannot take an adapter: merge into the checkpoint in full")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"--merge_and_save {target} exists and is not empty: choose another directory")
    tokenizer = load_tokenizer(path_or_id)
    adapted = load_adapter(load_model(path_or_id, dtype=dtype), adapter_path, lora_alpha)
    before = _greedy(adapted, tokenizer)
    merged = adapted.merge_and_unload()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        complete = Path(temporary) / "checkpoint"
        complete.mkdir()
        if checkpoint.generation is CHATGLM:
            _save_released_layout(merged, checkpoint, complete)
        else:
            _save_glm(merged, tokenizer, checkpoint, complete)
        origin = read_origin(adapter_path)
        if origin:
            (complete / TEMPLATE_FILE).write_text(json.dumps({"template": origin.template}))
        del adapted, merged
        after = _greedy(load_model(str(complete), dtype=dtype), load_tokenizer(str(complete)))
        equal = int((before == after).sum())
        print_once(f"greedy tokens before and after merging: {equal} of {before.numel()} equal")
        if equal < before.numel() and dtype == torch.float32:
            raise RuntimeError(f"{target} is not written: it does not answer as the base with the adapter does")
        if target.exists():
            target.rmdir()
        complete.rename(target)


def read_template(path_or_id: str) -> str | None:
    """The template of the adapter that a merged checkpoint took; None for any other checkpoint."""
    file = Path(path_or_id) / TEMPLATE_FILE
    return json.loads(file.read_text(encoding="utf-8"))["template"] if file.is_file() else None


@torch.inference_mode()
def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """(prompts, PROOF_TOKENS) int64; no token ends an answer."""
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


def _save_released_layout(model: PreTrainedModel, checkpoint: Checkpoint, directory: Path) -> None:
    """The weights under their released names, and the other files of the base as they are."""
    state = model.state_dict()
    for target in model.all_tied_weights_keys:  # the release holds both; transformers would drop the copy
        state[target] = state[target].clone()
    model.save_pretrained(directory, state_dict=state)
    for pattern in KEPT:
        for file in checkpoint.directory.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, directory / file.name)
    _edit(directory / "config.json", torch_dtype=str(model.dtype).removeprefix("torch."))


def _save_glm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint, directory: Path
) -> None:
    stop_ids = template_for(tokenizer).stop_ids(tokenizer)
    base_generation = checkpoint.directory / "generation_config.json"
    settings = json.loads(base_generation.read_text(encoding="utf-8")) if base_generation.is_file() else {}
    settings |= {"eos_token_id": stop_ids, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig.from_dict(settings)
    model.config.eos_token_id, model.config.pad_token_id = stop_ids, tokenizer.pad_token_id
    model.save_pretrained(directory)
    if not isinstance(tokenizer, VocabFileTokenizer):  # of a checkpoint that has its tokenizer.json
        tokenizer.save_pretrained(directory)
        return
    rope = model.config.rope_parameters  # under the names of older readers too
    older = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor")}
    _edit(directory / "config.json", **{MERGED_FROM: checkpoint.generation.name}, **older)
    try:
        fast_tokenizer(tokenizer).save_pretrained(directory)
        _edit(directory / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")  # in every version
    except ValueError as error:
        print_once(f"without tokenizer.json, which other programs need: {error}")
    if isinstance(tokenizer, ChatGLM2Tokenizer):  # the scripts here go on reading the release's own file
        tokenizer.save_vocabulary(str(directory))
        _edit(directory / "tokenizer_config.json", pad_with_unk=tokenizer.pad_with_unk)


def _edit(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(values | changes, ensure_ascii=False, indent=2), encoding="utf-8")
