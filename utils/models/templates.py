"""
Chats -> token ids, in the template of the tokenizer's generation: `encode_chat`, `encode_prompt`, `template_for`.

Training rows, the inference scripts, the chat page and merged checkpoints all take their template from here. The forms
themselves are in `utils/models/chat_formats.py` and `turn_formats.py`, one class a generation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from utils.models.chat_formats import AlpacaTemplate, ChatTemplate
from utils.models.chat_renderers import render_chat as render_chat
from utils.models.checkpoint_template import CheckpointTemplate
from utils.models.conversation import Conversation, Message
from utils.models.family import generation_of
from utils.models.turn_template import TurnTemplate

TEMPLATES = (ChatTemplate.name, AlpacaTemplate.name, CheckpointTemplate.name)  # what --template takes


def template_for(
    tokenizer: PreTrainedTokenizerBase, name: str = ChatTemplate.name, options: Mapping[str, Any] | None = None
) -> ChatTemplate:
    """
    The template `name`, one of TEMPLATES, in the form of the tokenizer's generation.

    Args:
        options: see `ChatTemplate`.

    Raises:
        ValueError: `name` is "checkpoint", and the checkpoint has no template.
    """
    native = generation_of(tokenizer).chat_template(options)
    if name == CheckpointTemplate.name:
        return CheckpointTemplate(tokenizer, native)
    return AlpacaTemplate(native) if name == AlpacaTemplate.name else native


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: ChatTemplate | None = None
) -> list[int]:
    """
    The token ids that generation starts from, of a conversation without tools.

    Args:
        messages: a conversation that ends with the question, its roles in an order that the template has a form for.
        template: the native one of the tokenizer's generation unless given.
    """
    prompt = Conversation(tuple(messages))
    return (template or template_for(tokenizer)).encoded_prompt(tokenizer, prompt).ids()


CHAT_ROLES = ("system", "user", "assistant")


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> list[int]:
    """
    The token ids of a chat in the native template of the tokenizer's generation.

    Contents are plain text: `<|user|>` in one is no role token.

    Args:
        tokenizer: what `load_tokenizer` returns.
        messages: `{"role": "system" | "user" | "assistant", "content": text}`, the oldest first. ChatGLM3-6B and later
            take any order of roles; ChatGLM-6B and ChatGLM2-6B an optional system message, then user and assistant in
            turn. In ChatGLM3-6B and GLM-4-9B a system message may have `tools`, an assistant's `metadata`, the name of
            the tool that it calls, and a result has the role "observation". From GLM-4-0414 on, messages are what the
            released template takes (see `render_chat`).
        add_generation_prompt: True gives the ids that generation starts from, those of `encode_prompt`. False gives
            the chat and nothing after its last message, as the released templates do: no template writes a token
            that ends an answer. ChatGLM3-6B and later then lack the final `<|assistant|>`. ChatGLM-6B and ChatGLM2-6B
            have no form of a question without its closing (`答：`, `[gMASK] <sop>`), so a chat that ends with the user
            has the same ids either way; an answer's ids follow the prompt that it answers.
        tools: JSON schemas of functions, from GLM-4-0414 on.
        options: variables of the chat template, such as `enable_thinking`. As in transformers, a template ignores
            those that it does not know; those of the first four generations know none.

    Returns:
        Token ids, the special tokens that open the chat included.

    Raises:
        ValueError: no messages; or a message, named by its number from 1, that is no mapping, lacks a key, has an
            unknown role, a content that is no text, or tools of a generation that has none there; or roles in an order
            that the generation has no form for, which for ChatGLM-6B and ChatGLM2-6B includes an answer as the last
            message with `add_generation_prompt`; or what the released template errs at.
    """
    if not messages:
        raise ValueError("messages is empty: a chat has at least one message")
    template = template_for(tokenizer, options=options)
    if isinstance(template, TurnTemplate) and template.joins_texts:
        return template.encoded_pieces(
            tokenizer, template.render_released(messages, tools, add_generation_prompt, options)
        )
    if tools:
        raise ValueError('tools: this generation takes them as the "tools" of a system message, if at all')
    for number, message in enumerate(messages, start=1):
        _check_message(number, message, template.has_tools)
    if isinstance(template, TurnTemplate):
        return template.encoded_pieces(
            tokenizer, template.render_released(messages, None, add_generation_prompt, options)
        )
    chat = Conversation(tuple(Message(message["role"], message["content"]) for message in messages))
    template.check_roles(chat.messages, add_generation_prompt)
    return (
        template.encoded_prompt(tokenizer, chat).ids()
        if add_generation_prompt
        else template.encoded_chat(tokenizer, chat)
    )


def _check_message(number: int, message: Mapping[str, Any], has_tools: bool) -> None:
    """
    Check a message of ChatGLM-6B to GLM-4-9B.

    Raises:
        ValueError: see `encode_chat`.
    """
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number}: it is a {type(message).__name__}, not a dict of role and content")
    for key in ("role", "content"):
        if key not in message:
            raise ValueError(f"message {number}: it has no {key!r}: a message is a dict of role and content")
    role, content = message["role"], message["content"]
    roles = (*CHAT_ROLES, "observation") if has_tools else CHAT_ROLES
    if role not in roles:
        raise ValueError(f"message {number}: the role is {role!r:.60}, not one of {', '.join(roles)}")
    if not isinstance(content, str):
        raise ValueError(f"message {number}: the content is a {type(content).__name__}, not a text")
    for key in ("tool_calls",) if has_tools else ("tools", "tool_calls", "metadata"):
        if message.get(key):
            raise ValueError(f"message {number}: {key!r} is not supported: put the text in the content")
    for tool in message.get("tools") or ():
        if not isinstance(tool, Mapping) or not tool.get("function", tool).get("name"):
            raise ValueError(f"message {number}: each of its 'tools' needs a function with a name")
