"""
What the files of a checkpoint directory say about its generation.

In: `CheckpointFiles`, config.json and tokenizer_config.json as data; the release's code and chat templates as text,
which is never run. Out: one small function for each row of the table in `utils/models/family.py`, which asks them in
order.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from utils.models.tokenization_chatglm2 import ROLE_TOKENS
from utils.models.tokenization_glm4 import is_tiktoken_file

CODE_FILES = ("tokenization_chatglm.py", "modeling_chatglm.py")  # of a release: read as text, never run
TEMPLATE_FILE = "chat_template.jinja"  # of newer releases; older ones have it in tokenizer_config.json
# A generation prompt that opens the reasoning, as GLM-Z1's ends; an early revision has a backslash and an n there.
OPENED_REASONING = re.compile(r"""<\|assistant\|>(\s|\\+n|[-"'{}%~+])*<think>(?!</think>)""")
# The key of a merged `config.json`, and of a `tokenizer_config.json` that we saved, with the generation's name.
GENERATION_KEY = "chatglm_generation"
GLM4_VOCAB_FILE = "tokenizer.model"
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

    @property
    def is_multimodal(self) -> bool:
        """Whether the language model is a part of one that also sees, like GLM-4.1V."""
        return bool({"vision_config", "text_config"} & self.config.keys())

    @cached_property
    def chat_templates(self) -> list[str]:
        """The text of the release's chat templates: of the file, else of the tokenizer's configuration."""
        file = self.directory / TEMPLATE_FILE
        if file.is_file():
            return [file.read_text(encoding="utf-8", errors="replace")]
        template = self.tokenizer_config.get("chat_template")
        named = template if isinstance(template, list) else [template]
        texts = [entry.get("template") if isinstance(entry, dict) else entry for entry in named]
        return [text for text in texts if isinstance(text, str)]

    @property
    def recorded_generation(self) -> str | None:
        """The name of the generation that this toolkit wrote into a checkpoint."""
        name = self.config.get(GENERATION_KEY) or self.tokenizer_config.get(GENERATION_KEY)
        return name if isinstance(name, str) else None


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
    vocab_file = files.directory / GLM4_VOCAB_FILE
    if vocab_file.is_file():
        return is_tiktoken_file(vocab_file)
    return files.config.get("padded_vocab_size", 0) > MAX_CHATGLM3_VOCAB


def is_glm4_hf(files: CheckpointFiles) -> bool:
    """The checkpoint is transformers' own `GlmForCausalLM`."""
    return files.config.get("model_type") == "glm" and not files.is_multimodal


def is_glm4_architecture(files: CheckpointFiles) -> bool:
    """The checkpoint is transformers' own `Glm4ForCausalLM`."""
    return files.config.get("model_type") == "glm4" and not files.is_multimodal


def is_glm4_0414(files: CheckpointFiles) -> bool:
    """Its chat template begins an answer without reasoning (`is_glm_z1` is asked first)."""
    return is_glm4_architecture(files) and bool(files.chat_templates)


def is_glm_z1(files: CheckpointFiles) -> bool:
    """Its chat template begins every answer with `<think>`."""
    return is_glm4_architecture(files) and any(OPENED_REASONING.search(text) for text in files.chat_templates)
