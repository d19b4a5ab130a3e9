"""
The table of generations: one row each says how it is recognised and which classes and names are its own.

`utils/checkpoint/directory.py` asks `identify` what a checkpoint directory is; everything that differs between
generations is then a field of the row, or of the `Architecture` that the row names. A new generation is one row here,
and the tokenizer, chat template and key map that the row names (CONTRIBUTING.md has the steps). Nothing here imports
torch, which tokenising can do without.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from utils.models.chat_formats import ChatGLM2Template, ChatGLMTemplate, ChatTemplate
from utils.models.tokenization_base import VocabFileTokenizer
from utils.models.tokenization_chatglm import ChatGLMTokenizer
from utils.models.tokenization_chatglm2 import ROLE_TOKENS, ChatGLM2Tokenizer, ChatGLM3Tokenizer
from utils.models.tokenization_glm4 import ChatGLM4Tokenizer, is_tiktoken_file
from utils.models.turn_formats import ChatGLM3Template, GLM4Template

SUPPORTED = (
    "ChatGLM-6B (-int4, -int8), ChatGLM2-6B (-32k, -int4), ChatGLM3-6B (-base, -32k, -128k), CodeGeeX2-6B, "
    "GLM-4-9B (-chat, -chat-1m, -hf), CodeGeeX4-9B"
)
CODE_FILES = ("tokenization_chatglm.py", "modeling_chatglm.py")  # of a release: read as text, never run
MAX_CHATGLM3_VOCAB = 100_000  # rows of an embedding: ChatGLM3-6B has 65,024, GLM-4-9B 151,552


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint directory that tell the generations apart."""

    directory: Path
    config: dict[str, Any]  # config.json
    tokenizer_config: dict[str, Any]  # tokenizer_config.json

    @property
    def is_chatglm(self) -> bool:
        """Whether config.json may be a release's; ChatGLM2-6B's first has no model_type."""
        return self.config.get("model_type") in ("chatglm", None)

    @property
    def is_released_glm(self) -> bool:
        """Whether config.json has the keys of the released ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B."""
        keys = self.config.keys()
        return (
            self.is_chatglm and "ffn_hidden_size" in keys and not {"inner_hidden_size", "vision_config"} & keys
        )  # vision_config: GLM-4V-9B

    @cached_property
    def code(self) -> list[str]:
        """The text of the release's code files."""
        files = [self.directory / name for name in CODE_FILES if (self.directory / name).is_file()]
        return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def is_chatglm_6b(files: CheckpointFiles) -> bool:
    """Only its config.json has `inner_hidden_size`."""
    return files.is_chatglm and "inner_hidden_size" in files.config


def is_chatglm2(files: CheckpointFiles) -> bool:
    """The release's code is there, and knows no role tokens (`is_chatglm3` is asked first)."""
    return files.is_released_glm and any("class ChatGLMTokenizer" in text for text in files.code)


def is_chatglm3(files: CheckpointFiles) -> bool:
    """The tokenizer's configuration or the release's code has role tokens, which ChatGLM2-6B has not."""
    if not files.is_released_glm:
        return False
    texts = (json.dumps(files.tokenizer_config), *files.code)
    return any(role in text for text in texts for role in ROLE_TOKENS)


def is_glm4(files: CheckpointFiles) -> bool:
    """The vocabulary is tiktoken's; without its file, the embedding is larger than ChatGLM3-6B's."""
    if not files.is_released_glm:
        return False
    vocab_file = files.directory / GLM4.vocab_file
    if vocab_file.is_file():
        return is_tiktoken_file(vocab_file)
    return files.config.get("padded_vocab_size", 0) > MAX_CHATGLM3_VOCAB


def is_glm4_hf(files: CheckpointFiles) -> bool:
    """The checkpoint is transformers' own `GlmForCausalLM`."""
    return files.config.get("model_type") == "glm"


@dataclass(frozen=True)
class LayerNames:
    """The linear layers of a decoder block, by the ends of their names."""

    qkv: tuple[str, ...]  # what LoRA adapts by default
    attention_output: str
    mlp_up: str  # with a gate: gate and up in one matrix
    mlp_down: str

    @property
    def linear(self) -> tuple[str, ...]:
        """All of them: what is quantised, and what LoRA can adapt."""
        return (*self.qkv, self.attention_output, self.mlp_up, self.mlp_down)


@dataclass(frozen=True)
class Generation:
    """One generation of the family: a row of the table."""

    name: str  # stands in users' files (run.json, journals, merged checkpoints): never renamed
    flag: str  # what --generation calls it
    is_in: Callable[[CheckpointFiles], bool]  # whether a checkpoint directory holds it
    tokenizer_class: type[VocabFileTokenizer] | None  # None: transformers reads the tokenizer.json itself
    vocab_file: str
    chat_template: type[ChatTemplate]
    architecture: str  # of `utils.models.architectures.ARCHITECTURES`: model class, configuration, key map
    layers: LayerNames
    required_tokens: tuple[str, ...] = ()  # of its chats, where the tokenizer of another family may lack them

    @property
    def lora_target_modules(self) -> tuple[str, ...]:
        """The layers that LoRA adapts by default."""
        return self.layers.qkv

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """All linear layers of a block: what is quantised, and what LoRA can adapt."""
        return self.layers.linear


QKV = ("q_proj", "k_proj", "v_proj")
GLM_LAYERS = LayerNames(QKV, attention_output="o_proj", mlp_up="gate_up_proj", mlp_down="down_proj")

CHATGLM_6B = Generation(
    name="ChatGLM-6B",
    flag="chatglm",
    is_in=is_chatglm_6b,
    tokenizer_class=ChatGLMTokenizer,
    vocab_file="ice_text.model",
    chat_template=ChatGLMTemplate,
    architecture="chatglm",
    layers=LayerNames(("query_key_value",), "dense", mlp_up="dense_h_to_4h", mlp_down="dense_4h_to_h"),
)
CHATGLM2 = Generation(
    name="ChatGLM2-6B",
    flag="chatglm2",
    is_in=is_chatglm2,
    tokenizer_class=ChatGLM2Tokenizer,
    vocab_file="tokenizer.model",
    chat_template=ChatGLM2Template,
    architecture="released_chatglm2",
    layers=GLM_LAYERS,
)
CHATGLM3 = Generation(
    name="ChatGLM3-6B",
    flag="chatglm3",
    is_in=is_chatglm3,
    tokenizer_class=ChatGLM3Tokenizer,
    vocab_file="tokenizer.model",
    chat_template=ChatGLM3Template,
    architecture="released_glm",
    layers=GLM_LAYERS,
)
GLM4 = Generation(
    name="GLM-4-9B",
    flag="glm4",
    is_in=is_glm4,
    tokenizer_class=ChatGLM4Tokenizer,
    vocab_file="tokenizer.model",
    chat_template=GLM4Template,
    architecture="released_glm",
    layers=GLM_LAYERS,
)
GLM4_HF = Generation(
    name="GLM-4-9B-hf",
    flag="glm4",
    is_in=is_glm4_hf,
    tokenizer_class=None,
    vocab_file="tokenizer.json",
    chat_template=GLM4Template,
    architecture="glm",
    layers=GLM_LAYERS,
    required_tokens=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
)
# The first row that is in a checkpoint directory is its generation.
GENERATIONS = (GLM4_HF, CHATGLM_6B, GLM4, CHATGLM3, CHATGLM2)
BY_FLAG = {row.flag: row for row in (CHATGLM_6B, CHATGLM2, CHATGLM3, GLM4)}  # what --generation takes
BY_TOKENIZER = {row.tokenizer_class: row for row in BY_FLAG.values()}
# They share one architecture and one SentencePiece model, so files may fit both.
LOOK_ALIKES = (CHATGLM2, CHATGLM3)
# A word in the name of a release -> its generation, for files that fit both.
RELEASE_NAMES = {"chatglm2": CHATGLM2, "codegeex2": CHATGLM2, "chatglm3": CHATGLM3}

# A generation -> what a merged checkpoint of it is: saved by transformers as "glm". ChatGLM2-6B and ChatGLM3-6B keep
# their tokenizer file beside it. ChatGLM-6B is not here: it keeps its released layout.
MERGED = {row.name: replace(row, architecture="glm") for row in LOOK_ALIKES} | {
    row.name: GLM4_HF for row in (GLM4, GLM4_HF)
}
MERGED_FROM = "chatglm_generation"  # the key of a merged `config.json` with the generation's name


def identify(files: CheckpointFiles) -> tuple[Generation | None, str | None]:
    """
    The generation in a checkpoint directory, and the reason where it is a guess.

    Where the files fit both ChatGLM2-6B and ChatGLM3-6B, the name of the release decides: the last part of a path in
    the two configurations, else of the directory.

    Returns:
        The row, None for a model that is not supported; and None, or the reason of a guess.
    """
    for row in GENERATIONS:
        if row.is_in(files):
            if row is GLM4_HF:
                return MERGED.get(str(files.config.get(MERGED_FROM)), GLM4_HF), None
            return row, None
    if not files.is_released_glm:
        return None, None
    recorded = _released_under(files.config.get("_name_or_path"))
    recorded |= _released_under(files.tokenizer_config.get("name_or_path"))
    if len(recorded) == 1:
        return BY_FLAG[recorded.pop()], None
    by_directory = _released_under(files.directory.resolve())
    if len(by_directory) == 1:
        return BY_FLAG[by_directory.pop()], "by the name of the directory"
    return CHATGLM2, "the older of the two"


def _released_under(path: Any) -> set[str]:
    """The flags of the generations whose release the last part of a path names."""
    name = str(path or "").replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
    return {row.flag for word, row in RELEASE_NAMES.items() if word in name}


def chosen_by_flag(identified: Generation, flag: str) -> Generation | None:
    """The generation that `--generation` says; None if the files are clearly another's."""
    if identified.flag == flag:
        return identified
    chosen = BY_FLAG[flag]
    return chosen if {chosen, identified} == set(LOOK_ALIKES) else None


def generation_of(tokenizer: PreTrainedTokenizerBase) -> Generation:
    """
    The generation of a tokenizer that `load_tokenizer` returned.

    Its class tells; of those that transformers reads itself, the special tokens.
    """
    for tokenizer_class in type(tokenizer).__mro__:
        if tokenizer_class in BY_TOKENIZER:
            return BY_TOKENIZER[tokenizer_class]
    tokens = tokenizer.get_added_vocab()
    rows = [row for row in GENERATIONS if row.tokenizer_class is None and tokens.keys() >= set(row.required_tokens)]
    return rows[0] if rows else GLM4_HF
