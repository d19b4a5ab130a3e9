"""
The table of generations: one row each says how it is recognised and which classes and names are its own.

`utils/checkpoint/directory.py` asks `identify` what a checkpoint directory is; everything that differs between
generations is then a field of the row, or of the `Architecture` that the row names. A new generation is one row here,
and the tokenizer, chat template and key map that the row names (CONTRIBUTING.md has the steps). Nothing here imports
torch, which tokenising can do without.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from utils.models.chat_formats import ChatGLM2Template, ChatGLMTemplate, ChatTemplate
from utils.models.checkpoint_files import (
    GENERATION_KEY,
    GLM4_VOCAB_FILE,
    CheckpointFiles,
    is_chatglm2,
    is_chatglm3,
    is_chatglm_6b,
    is_glm4,
    is_glm4_0414,
    is_glm4_architecture,
    is_glm4_hf,
    is_glm_z1,
)
from utils.models.tokenization_base import VocabFileTokenizer
from utils.models.tokenization_chatglm import ChatGLMTokenizer
from utils.models.tokenization_chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer
from utils.models.tokenization_glm4 import ChatGLM4Tokenizer
from utils.models.turn_formats import ChatGLM3Template, GLM4Template, GLM40414Template, GLMZ1Template

SUPPORTED = (
    "ChatGLM-6B (-int4, -int8), ChatGLM2-6B (-32k, -int4), ChatGLM3-6B (-base, -32k, -128k), CodeGeeX2-6B, "
    "GLM-4-9B (-chat, -chat-1m, -hf), CodeGeeX4-9B, GLM-4-9B-0414, GLM-4-32B-0414 (-Base), "
    "GLM-Z1-9B-0414, GLM-Z1-32B-0414"
)


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
    keeps_tokenizer: bool = False  # a merged checkpoint has the files of the base's tokenizer, chat template included

    @property
    def lora_target_modules(self) -> tuple[str, ...]:
        """The layers that LoRA adapts by default."""
        return self.layers.qkv

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """All linear layers of a block: what is quantised, and what LoRA can adapt."""
        return self.layers.linear


QKV = ("q_proj", "k_proj", "v_proj")
GLM4_TOKENS = ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>")
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
    vocab_file=GLM4_VOCAB_FILE,
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
    required_tokens=GLM4_TOKENS,
)
GLM4_0414 = Generation(
    name="GLM-4-0414",
    flag="glm4-0414",
    is_in=is_glm4_0414,
    tokenizer_class=None,
    vocab_file="tokenizer.json",
    chat_template=GLM40414Template,
    architecture="glm4",
    layers=GLM_LAYERS,
    required_tokens=GLM4_TOKENS,
    keeps_tokenizer=True,
)
GLM_Z1 = Generation(
    name="GLM-Z1-0414",
    flag="glm-z1",
    is_in=is_glm_z1,
    tokenizer_class=None,
    vocab_file="tokenizer.json",
    chat_template=GLMZ1Template,
    architecture="glm4",
    layers=GLM_LAYERS,
    required_tokens=GLM4_TOKENS,
    keeps_tokenizer=True,
)
# The first row that is in a checkpoint directory is its generation.
GENERATIONS = (GLM4_HF, GLM_Z1, GLM4_0414, CHATGLM_6B, GLM4, CHATGLM3, CHATGLM2)
# What --generation takes.
BY_FLAG = {row.flag: row for row in (CHATGLM_6B, CHATGLM2, CHATGLM3, GLM4, GLM4_0414, GLM_Z1)}
BY_TOKENIZER = {row.tokenizer_class: row for row in BY_FLAG.values() if row.tokenizer_class}


@dataclass(frozen=True)
class LookAlikes:
    """Two generations of one architecture and one vocabulary, whose files may fit both."""

    older: Generation  # what files are taken for that nothing tells apart
    newer: Generation
    is_in: Callable[[CheckpointFiles], bool]  # whether a directory holds one of them
    release_names: dict[str, Generation]  # a word in the name of a release -> its generation

    @property
    def rows(self) -> tuple[Generation, Generation]:
        """Both."""
        return self.older, self.newer

    def released_under(self, path: Any) -> set[str]:
        """The flags of the generations whose release the last part of a path names."""
        name = str(path or "").replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
        return {row.flag for word, row in self.release_names.items() if word in name}


LOOK_ALIKES = (
    LookAlikes(
        CHATGLM2,
        CHATGLM3,
        lambda files: files.is_released_glm,
        {"chatglm2": CHATGLM2, "codegeex2": CHATGLM2, "chatglm3": CHATGLM3},
    ),
    LookAlikes(GLM4_0414, GLM_Z1, is_glm4_architecture, {"glm-4": GLM4_0414, "glm4": GLM4_0414, "z1": GLM_Z1}),
)

# A generation -> what a merged checkpoint of it is: saved by transformers as "glm" or "glm4". ChatGLM2-6B and
# ChatGLM3-6B keep their tokenizer file beside it. ChatGLM-6B is not here: it keeps its released layout.
MERGED = {row.name: replace(row, architecture="glm") for row in (CHATGLM2, CHATGLM3)} | {
    GLM4.name: GLM4_HF,
    GLM4_HF.name: GLM4_HF,
    GLM4_0414.name: GLM4_0414,
    GLM_Z1.name: GLM_Z1,
}


def identify(files: CheckpointFiles) -> tuple[Generation | None, str | None]:
    """
    The generation in a checkpoint directory, and the reason where it is a guess.

    A name that this toolkit recorded comes first, then the table. Where the files fit both of two look-alikes, the
    name of the release decides: the last part of a path in the two configurations, else of the directory.

    Returns:
        The row, None for a model that is not supported; and None, or the reason of a guess.
    """
    merged = MERGED.get(files.recorded_generation or "")
    if merged and merged.architecture == files.config.get("model_type") and not files.is_multimodal:
        return merged, None
    for row in GENERATIONS:
        if row.is_in(files):
            return row, None
    pair = next((pair for pair in LOOK_ALIKES if pair.is_in(files)), None)
    if pair is None:
        return None, None
    recorded = pair.released_under(files.config.get("_name_or_path"))
    recorded |= pair.released_under(files.tokenizer_config.get("name_or_path"))
    if len(recorded) == 1:
        return BY_FLAG[recorded.pop()], None
    by_directory = pair.released_under(files.directory.resolve())
    if len(by_directory) == 1:
        return BY_FLAG[by_directory.pop()], "by the name of the directory"
    return pair.older, "the older of the two"


def look_alikes_of(generation: Generation) -> tuple[Generation, ...]:
    """The generations whose files may be taken for those of `generation`, it among them; empty without one."""
    return next((pair.rows for pair in LOOK_ALIKES if generation in pair.rows), ())


def chosen_by_flag(identified: Generation, flag: str) -> Generation | None:
    """The generation that `--generation` says; None if the files are clearly another's."""
    if identified.flag == flag:
        return identified
    chosen = BY_FLAG[flag]
    return chosen if chosen in look_alikes_of(identified) else None


def record_generation(tokenizer: PreTrainedTokenizerBase, generation: Generation) -> None:
    """
    Note the generation on a tokenizer that transformers read, in place, for `generation_of`.

    Their special tokens are the same from GLM-4-9B-hf to GLM-Z1. Copies, pickles and `save_pretrained` keep the note.
    """
    tokenizer.init_kwargs[GENERATION_KEY] = generation.name


def generation_of(tokenizer: PreTrainedTokenizerBase) -> Generation:
    """
    The generation of a tokenizer that `load_tokenizer` returned.

    Its class tells; of those that transformers reads itself, what `record_generation` noted.
    """
    for tokenizer_class in type(tokenizer).__mro__:
        if tokenizer_class in BY_TOKENIZER:
            return BY_TOKENIZER[tokenizer_class]
    recorded = tokenizer.init_kwargs.get(GENERATION_KEY)
    rows = (row for row in GENERATIONS if row.tokenizer_class is None)
    return next((row for row in rows if row.name == recorded), GLM4_HF)
