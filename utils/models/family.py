"""The generations of the family: how each is recognised, its tokenizer, and the names of its layers."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.models.tokenization_base import VocabFileTokenizer
from utils.models.tokenization_chatglm import ChatGLMTokenizer
from utils.models.tokenization_chatglm2 import ROLE_TOKENS, ChatGLM2Tokenizer, ChatGLM3Tokenizer
from utils.models.tokenization_glm4 import ChatGLM4Tokenizer, is_tiktoken_file

if TYPE_CHECKING:
    from utils.models.architectures import Architecture


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
    needed_tokens: tuple[str, ...] = ()  # what its chats are made of, where files of another family may lack it

    @property
    def architecture(self) -> "Architecture":
        """The model class and how it is split; importing it imports torch, which tokenising can do without."""
        from utils.models import architectures

        return architectures.GLM_ARCHITECTURE if self.is_glm else architectures.CHATGLM_ARCHITECTURE


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
GLM4_HF = Generation(
    "GLM-4-9B-hf",
    None,
    "tokenizer.json",
    *GLM_LAYERS,
    released_layout=False,
    needed_tokens=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
)
# What a merged checkpoint of theirs becomes: saved by transformers, with the tokenizer of the release beside it.
MERGED = {generation.name: replace(generation, released_layout=False) for generation in (CHATGLM2, CHATGLM3)}
MERGED_FROM = "chatglm_generation"  # the key of `config.json` that says which it was
SUPPORTED = (
    "ChatGLM-6B (-int4, -int8), ChatGLM2-6B (-32k, -int4), ChatGLM3-6B (-base, -32k, -128k), CodeGeeX2-6B, "
    "GLM-4-9B (-chat, -chat-1m, -hf), CodeGeeX4-9B"
)
# What --generation takes.
BY_FLAG = {"chatglm": CHATGLM, "chatglm2": CHATGLM2, "chatglm3": CHATGLM3, "glm4": GLM4}
# A word in the name of a release -> the flag of its generation.
RELEASED_NAMES = {"chatglm2": "chatglm2", "codegeex2": "chatglm2", "chatglm3": "chatglm3"}
LARGEST_GLM3 = 100_000  # rows of an embedding; ChatGLM3 has 65,024, GLM-4 151,552
CODE_FILES = ("tokenization_chatglm.py", "modeling_chatglm.py")


def identify(
    directory: Path, config: dict[str, Any], tokenizer_config: dict[str, Any]
) -> tuple[Generation | None, str | None]:
    """
    The generation of a checkpoint directory, None where it is none of them; and where the files leave it open, why it
    is taken for that one.

    ChatGLM2 and ChatGLM3 have one architecture and one SentencePiece model. They are told apart by the role tokens
    that only ChatGLM3 has, in the tokenizer's configuration or in the release's code (read as text, never run), else
    by the name of the release in the two configurations: the last part of a path, never the directories before it.

    Args:
        config: its `config.json`.
        tokenizer_config: its `tokenizer_config.json`.
    """
    if config.get("model_type") == "glm":
        return MERGED.get(config.get(MERGED_FROM), GLM4_HF), None
    if config.get("model_type") not in ("chatglm", None):  # ChatGLM2-6B's first config.json has none
        return None, None
    if "inner_hidden_size" in config:
        return CHATGLM, None
    if "ffn_hidden_size" not in config or "vision_config" in config:
        return None, None
    vocab_file = directory / "tokenizer.model"
    if is_tiktoken_file(vocab_file) if vocab_file.is_file() else config.get("padded_vocab_size", 0) > LARGEST_GLM3:
        return GLM4, None
    code = [directory / name for name in CODE_FILES if (directory / name).is_file()]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in code]
    if any(role in text for text in (json.dumps(tokenizer_config), *texts) for role in ROLE_TOKENS):
        return CHATGLM3, None
    if any("class ChatGLMTokenizer" in text for text in texts):
        return CHATGLM2, None
    named = _named(config.get("_name_or_path")) | _named(tokenizer_config.get("name_or_path"))
    if len(named) == 1:
        return BY_FLAG[named.pop()], None
    by_directory = _named(directory.resolve())
    if len(by_directory) == 1:
        return BY_FLAG[by_directory.pop()], "by the name of the directory"
    return CHATGLM2, "the older of the two"


def _named(path: Any) -> set[str]:
    """The flags of the generations that the last part of a path names."""
    name = str(path or "").replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
    return {flag for mark, flag in RELEASED_NAMES.items() if mark in name}
