"""
Chats -> token ids, in the template of the tokenizer's generation: `encode_chat`, `encode_prompt`, `template_for`.

Training rows, the inference scripts, the chat page and merged checkpoints all take their template from here. The forms
themselves are in `utils/models/chat_formats.py`, one class a generation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from utils.models.chat_formats import AlpacaTemplate, ChatTemplate
from utils.models.conversation import Message
from utils.models.family import generation_of

TEMPLATES = (ChatTemplate.name, AlpacaTemplate.name)  # what --template takes


def template_for(tokenizer: PreTrainedTokenizerBase, name: str = ChatTemplate.name) -> ChatTemplate:
    """The template `name`, one of TEMPLATES, in the form of the tokenizer's generation."""
    native = generation_of(tokenizer).chat_template()
    return AlpacaTemplate(native) if name == AlpacaTemplate.name else native


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: ChatTemplate | None = None
) -> list[int]:
    """
    The token ids that generation starts from.

    Args:
        messages: a conversation that ends with the question, its roles in an order that the template has a form for.
        template: the native one of the tokenizer's generation unless given.
    """
    return (template or template_for(tokenizer)).encoded_prompt(tokenizer, messages).ids()


CHAT_ROLES = ("system", "user", "assistant")
UNSUPPORTED_KEYS = ("tools", "tool_calls", "metadata")  # of a message: released templates make tokens of them


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    **options: Any,
) -> list[int]:
    """
    The token ids of a chat in the native template of the tokenizer's generation.

    Contents are plain text: `<|user|>` in one is no role token. An empty content keeps its role token.

    Args:
        tokenizer: what `load_tokenizer` returns.
        messages: `{"role": "system" | "user" | "assistant", "content": text}`, the oldest first. ChatGLM3-6B and
            GLM-4-9B take any order of roles; ChatGLM-6B and ChatGLM2-6B an optional system message, then user and
            assistant in turn. Keys that no template of the family reads, such as "name", have no effect.
        add_generation_prompt: True gives the ids that generation starts from, those of `encode_prompt`. False gives
            the chat and nothing after its last message, as the released templates do: no template writes a token
            that ends an answer. ChatGLM3-6B and GLM-4-9B then lack the final `<|assistant|>`. ChatGLM-6B and
            ChatGLM2-6B have no form of a question without its closing (`答：`, `[gMASK] <sop>`), so a chat that ends
            with the user has the same ids either way; an answer's ids follow the prompt that it answers.
        options: variables of the chat template, such as `enable_thinking`. As in transformers, a template ignores
            those that it does not know; those of these four generations know none.

    Returns:
        Token ids, the special tokens that open the chat included.

    Raises:
        ValueError: no messages; or a message, named by its number from 1, that is no mapping, lacks a key, has an
            unknown role, a content that is no text, or tools (`UNSUPPORTED_KEYS`); or roles in an order that the
            generation has no form for, which for ChatGLM-6B and ChatGLM2-6B includes an answer as the last message
            with `add_generation_prompt`.
    """
    if not messages:
        raise ValueError("messages is empty: a chat has at least one message")
    chat = [_checked_message(number, message) for number, message in enumerate(messages, start=1)]
    template = template_for(tokenizer)
    template.check_roles(chat, add_generation_prompt)
    if add_generation_prompt:
        return encode_prompt(tokenizer, chat, template)
    return template.encoded_chat(tokenizer, chat)


def _checked_message(number: int, message: Mapping[str, Any]) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number}: it is a {type(message).__name__}, not a dict of role and content")
    for key in ("role", "content"):
        if key not in message:
            raise ValueError(f"message {number}: it has no {key!r}: a message is a dict of role and content")
    role, content = message["role"], message["content"]
    if role not in CHAT_ROLES:
        raise ValueError(f"message {number}: the role is {role!r:.60}, not one of {', '.join(CHAT_ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"message {number}: the content is a {type(content).__name__}, not a text")
    for key in UNSUPPORTED_KEYS:
        if message.get(key):
            raise ValueError(f"message {number}: {key!r} is not supported: put the text in the content")
    return Message(role, content)
