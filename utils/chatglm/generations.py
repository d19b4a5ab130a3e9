"""The generations of the family: how each is recognised, its tokenizer, and the names of its layers."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.chatglm.tokenization_chatglm import ChatGLMTokenizer
from utils.chatglm.tokenization_chatglm2 import ROLE_TOKENS, ChatGLM2Tokenizer, ChatGLM3Tokenizer
from utils.chatglm.tokenization_glm4 import ChatGLM4Tokenizer, is_tiktoken_file
from utils.chatglm.vocab_file import VocabFileTokenizer

if TYPE_CHECKING:
    from utils.chatglm.architectures import Architecture


@dataclass(frozen=True)
class Generation:
    """One generation of the family."""

    name: str
    tokenizer_class: type[VocabFileTokenizer] | None  # None: transformers reads the tokenizer.json itself
    vocab_file: str
    lora_target_modules: tuple[str, ...]
    linear_layers: tuple[str, ...]  # of a block; what is quantised
    is_glm: bool = True  # transformers' own GlmForCausalLM
    released_layout: bool = True  # of a GlmForCausalLM: keys and config are those of the release

    @property
    def architecture(self) -> "Architecture":
        """The model class and how it is split; importing it imports torch, which tokenising can do without."""
        from utils.chatglm import architectures

        return architectures.GLM if self.is_glm else architectures.CHATGLM


CHATGLM = Generation(
    name="ChatGLM-6B",
    tokenizer_class=ChatGLMTokenizer,
    vocab_file="ice_text.model",
    lora_target_modules=("query_key_value",),
    linear_layers=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    is_glm=False,
)
QKV = ("q_proj", "k_proj", "v_proj")
GLM_LAYERS = (QKV, (*QKV, "o_proj", "gate_up_proj", "down_proj"))
CHATGLM2 = Generation("ChatGLM2-6B", ChatGLM2Tokenizer, "tokenizer.model", *GLM_LAYERS)
CHATGLM3 = Generation("ChatGLM3-6B", ChatGLM3Tokenizer, "tokenizer.model", *GLM_LAYERS)
GLM4 = Generation("GLM-4-9B", ChatGLM4Tokenizer, "tokenizer.model", *GLM_LAYERS)
GLM4_HF = Generation("GLM-4-9B-hf", None, "tokenizer.json", *GLM_LAYERS, released_layout=False)
# What a merged checkpoint of theirs becomes: saved by transformers, with the tokenizer of the release beside it.
MERGED = {generation.name: replace(generation, released_layout=False) for generation in (CHATGLM2, CHATGLM3)}
MERGED_FROM = "chatglm_generation"  # the key of `config.json` that says which it was
SUPPORTED = (
    "ChatGLM-6B (-int4, -int8), ChatGLM2-6B (-32k, -int4), ChatGLM3-6B (-base, -32k, -128k), GLM-4-9B (-chat, -hf)"
)


def identify(directory: Path, config: dict[str, Any]) -> Generation | None:
    """
    The generation of a checkpoint directory with this `config.json`; None where it is none of them.

    ChatGLM2 and ChatGLM3 have one architecture and one SentencePiece model; what tells them apart is what their files
    say of themselves: the name they were released under, or the role tokens that only ChatGLM3 has.
    """
    if config.get("model_type") == "glm":
        return MERGED.get(config.get(MERGED_FROM), GLM4_HF)
    if config.get("model_type") != "chatglm":
        return None
    if "inner_hidden_size" in config:
        return CHATGLM
    if "ffn_hidden_size" not in config or "vision_config" in config:
        return None
    vocab_file = directory / "tokenizer.model"
    if vocab_file.is_file() and is_tiktoken_file(vocab_file):
        return GLM4
    tokenizer_config = {}
    if (directory / "tokenizer_config.json").is_file():
        tokenizer_config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    names = (config.get("_name_or_path"), tokenizer_config.get("name_or_path"), directory.resolve().name)
    for name in names:
        for generation, mark in ((CHATGLM2, "chatglm2"), (CHATGLM3, "chatglm3"), (GLM4, "glm-4")):
            if mark in str(name).lower():
                return generation
    code = directory / "tokenization_chatglm.py"  # read as text, never run
    said = json.dumps(tokenizer_config) + (code.read_text(encoding="utf-8") if code.is_file() else "")
    return CHATGLM3 if ROLE_TOKENS[1] in said else CHATGLM2
