"""
The official chat templates of glm-4-9b-chat to GLM-5.2, written anew: conversations in, their text or pieces out.

`render_chat` returns the text that the release's chat_template.jinja makes, `render_pieces` the same text in pieces,
which say what is a special token and what the model writes itself. `utils/models/turn_template.py` calls them. The
templates themselves are not needed: a checkpoint may lack its own, and jinja's text cannot say where tokens are. The
older generations, ChatGLM-6B to ChatGLM3-6B, have no such template; `utils/models/chat_formats.py` and
`turn_formats.py` write theirs.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from utils.models import chat_renderers_glm4, chat_renderers_glm45
from utils.models.chat_pieces import Piece, joined

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # the first is what templates read
ORGANISATIONS = ("zai-org/", "thudm/")


class Renderer(NamedTuple):
    """How one generation is rendered."""

    render: Callable[..., list[Piece]]  # of messages, tools, add_generation_prompt, options
    names: tuple[str, ...]  # other names of the generation, in lower case


def glm45(form: chat_renderers_glm45.Form, *names: str) -> Renderer:
    """Return the renderer of a generation from 4.5 on."""
    return Renderer(partial(chat_renderers_glm45.render_glm45, form), names)


RENDERERS = {
    "glm-4-9b-chat": Renderer(
        chat_renderers_glm4.render_glm4_9b,
        ("glm4", "glm-4-9b", "glm-4-9b-hf", "glm-4-9b-chat-hf", "glm-4-9b-chat-1m", "glm-4-9b-chat-1m-hf"),
    ),
    "glm-4-0414": Renderer(chat_renderers_glm4.render_glm4_0414, ("glm4-0414", "glm-4-9b-0414", "glm-4-32b-0414")),
    "glm-z1-0414": Renderer(chat_renderers_glm4.render_glm_z1, ("glm-z1", "glm-z1-9b-0414", "glm-z1-32b-0414")),
    "glm-4.5": glm45(chat_renderers_glm45.GLM_4_5, "glm-4.5-air"),
    "glm-4.6": glm45(chat_renderers_glm45.GLM_4_5),
    "glm-4.7": glm45(chat_renderers_glm45.GLM_4_7),
    "glm-4.7-flash": glm45(chat_renderers_glm45.GLM_4_7),
    "glm-5": glm45(chat_renderers_glm45.GLM_4_7),
    "glm-5.1": glm45(chat_renderers_glm45.GLM_5_1),
    "glm-5.2": glm45(chat_renderers_glm45.GLM_5_2),
}
GENERATION_OF = {name: key for key, renderer in RENDERERS.items() for name in (key, *renderer.names)}


def renderer_for(generation: str) -> Renderer:
    """Return the renderer of a generation, a release or a flag, in any case; raises ValueError for another name."""
    name = generation.lower()
    for organisation in ORGANISATIONS:
        name = name.removeprefix(organisation)
    key = GENERATION_OF.get(name) or GENERATION_OF.get(name.removesuffix("-fp8"))
    if key is None:
        raise ValueError(f"unknown generation {generation!r}; the known ones are {', '.join(sorted(GENERATION_OF))}")
    return RENDERERS[key]


def render_chat(
    generation: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = True,
    **options: Any,
) -> str:
    """Return the text that the official template makes of a conversation; raises ValueError where that fails."""
    return "".join(piece.text for piece in render_pieces(generation, messages, tools, add_generation_prompt, options))


def render_pieces(
    generation: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = True,
    options: Mapping[str, Any] | None = None,
) -> list[Piece]:
    """
    Return a conversation's pieces; their texts, joined, are the official template's text.

    `options` are what the template reads besides (`enable_thinking`, `clear_thinking`, `reasoning_effort`); it ignores
    others. What follows the generation prompt with which an assistant turn begins is that message's. Raises ValueError
    where the official template fails; the line names the message by its number, from 1.
    """
    renderer = renderer_for(generation)
    if not messages:
        raise ValueError("the conversation has no messages")
    for tool in tools or ():
        if not isinstance(tool, Mapping):
            raise ValueError(f"a tool is {tool!r}, not an object")
    cleaned = [clean_message(number, message) for number, message in enumerate(messages)]
    return joined(renderer.render(cleaned, tools, bool(add_generation_prompt), options or {}))


def clean_message(number: int, message: Any) -> dict[str, Any]:
    """Return what a template sees of a message: no key without a value, and reasoning under one name."""
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number + 1} is {message!r}, not an object")
    cleaned = {key: value for key, value in message.items() if value is not None}
    reasoning = next((cleaned[key] for key in REASONING_KEYS if key in cleaned), None)
    return cleaned if reasoning is None else {**cleaned, "reasoning_content": reasoning}
