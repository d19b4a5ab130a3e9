"""
The released chat templates from GLM-4-9B on, as pieces: text for text what their Jinja templates make.

`render_chat` joins the pieces to the text; `utils/models/turn_formats.py` makes token ids and loss masks of them. The
released templates are Jinja and make one text, in which a message may spell a special token, and which does not say
what the model writes itself. Messages are dicts in the form that the released template takes, as transformers hands
them to it: without keys whose value is None, reasoning as `reasoning_content`.

Sources: chat_template of THUDM/glm-4-9b-chat, zai-org/GLM-4-32B-0414 and GLM-Z1-32B-0414; those from GLM-4.5 on are in
`utils/models/chat_renderers_glm45.py`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from utils.models.chat_pieces import (
    OPENING,
    THINK_END,
    Piece,
    literal,
    printed,
    role_token,
)
from utils.models.chat_renderers_glm45 import GLM_4_5, GLM_4_7, GLM_5_1, GLM_5_2, render_tagged

# What precedes the list of tools.
TOOLS_HEAD_9B = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
TOOLS_HEAD_0414 = "# 可用工具\n"
TOOLS_HEAD_Z1 = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
TOOL_FORM = "\n## {name}\n\n{schema}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
ROLES_9B = ("system", "user", "assistant", "observation")  # those with a token


def render_9b_chat(
    messages: Sequence[Mapping[str, Any]], tools: Any, add_generation_prompt: bool, options: Mapping[str, Any]
) -> list[Piece]:
    """
    GLM-4-9B: tools are those in a message's `tools`; a message without content is left out.

    Raises:
        ValueError: a built-in tool (python, simple_browser, cogview), whose text is not known here.
    """
    pieces = literal(OPENING)
    for number, message in enumerate(messages):
        role = str(printed(message.get("role")))
        if "tools" in message:
            pieces += [*role_token("system"), Piece("\n"), Piece(_tools_of_9b(number, message["tools"]))]
        content = message.get("content")
        if content:
            writer = number if role == "assistant" else None
            pieces += role_token(role) if role in ROLES_9B else [Piece(f"<|{role}|>")]
            pieces += [
                Piece(f"{printed(message.get('metadata'))}\n", message=writer),
                Piece(printed(content), message=writer),
            ]
    return pieces + (role_token("assistant") if add_generation_prompt else [])


def _tools_of_9b(number: int, tools: Any) -> str:
    text = TOOLS_HEAD_9B
    for tool in _iterate(tools, f"message {number + 1}: tools"):
        kind = _get(tool, "type")
        if kind in ("python", "simple_browser", "cogview"):
            raise ValueError(f"message {number + 1}: the built-in tool {kind} is not supported: describe a function")
        if kind == "function":
            text += _describe(_get(tool, "function"))
    return text


def render_0414(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    add_generation_prompt: bool,
    options: Mapping[str, Any],
    *,
    tools_head: str = TOOLS_HEAD_0414,
    thinks: bool = False,
) -> list[Piece]:
    """
    GLM-4-0414, and GLM-Z1-0414 if it `thinks`.

    Tools and all system messages come first. A call is an assistant's message with the tool's name as `metadata`.
    Messages of other roles are left out. GLM-Z1 cuts every content but the system's to what follows `</think>`, and
    its prompt ends in `<think>`.
    """
    pieces = literal(OPENING)
    if tools:
        described = "".join(_describe(_function_of(tool)) for tool in tools)
        pieces += [*role_token("system"), Piece("\n"), Piece(tools_head + described)]
    for message in messages:
        if message.get("role") == "system":
            pieces += [*role_token("system"), Piece("\n"), Piece(printed(message.get("content")))]
    for number, message in enumerate(messages):
        role, content, metadata = message.get("role"), message.get("content"), message.get("metadata")
        if role == "system":
            continue
        if thinks:
            if not isinstance(content, str):
                raise ValueError(f"message {number + 1}: the content is a {type(content).__name__}, not a text")
            content = content.split(THINK_END)[-1].strip()
        if role == "assistant":
            name = printed(metadata) if metadata else ""
            pieces += [*role_token(role), Piece(f"{name}\n", message=number), Piece(printed(content), message=number)]
        elif role in ("user", "observation"):
            pieces += [*role_token(role), Piece("\n"), Piece(printed(content))]
    if add_generation_prompt:
        pieces += [*role_token("assistant"), *([Piece("\n<think>")] if thinks else [])]
    return pieces


def _function_of(tool: Mapping[str, Any]) -> Any:
    return tool.get("function") or tool


def _describe(function: Any) -> str:
    if function is None:
        raise ValueError("a tool has no function")
    schema = json.dumps(function, ensure_ascii=False, indent=4)
    return TOOL_FORM.format(name=printed(_get(function, "name")), schema=schema)


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def _iterate(value: Any, what: str) -> Any:
    if not isinstance(value, str | Sequence | Mapping):
        raise ValueError(f"{what} is a {type(value).__name__}, not a list")
    return value


Render = Callable[[Sequence[Mapping[str, Any]], Any, bool, Mapping[str, Any]], list[Piece]]
RENDERERS: dict[str, Render] = {
    "glm-4-9b-chat": render_9b_chat,
    "glm-4-0414": render_0414,
    "glm-z1-0414": partial(render_0414, tools_head=TOOLS_HEAD_Z1, thinks=True),
    "glm-4.5": partial(render_tagged, form=GLM_4_5),
    "glm-4.6": partial(render_tagged, form=GLM_4_5),
    "glm-4.7": partial(render_tagged, form=GLM_4_7),
    "glm-4.7-flash": partial(render_tagged, form=GLM_4_7),
    "glm-5": partial(render_tagged, form=GLM_4_7),
    "glm-5.1": partial(render_tagged, form=GLM_5_1),
    "glm-5.2": partial(render_tagged, form=GLM_5_2),
}
# Names of releases, of rows of utils/models/family.py and their flags, in lower case -> the name above.
OTHER_NAMES = {
    **dict.fromkeys(("glm-4-9b", "glm-4-9b-hf", "glm-4-9b-chat-hf", "glm-4-9b-chat-1m", "glm4"), "glm-4-9b-chat"),
    **dict.fromkeys(("glm-4-9b-0414", "glm-4-32b-0414", "glm-4-32b-base-0414", "glm4-0414"), "glm-4-0414"),
    **dict.fromkeys(("glm-z1-9b-0414", "glm-z1-32b-0414", "glm-z1"), "glm-z1-0414"),
    "glm-4-9b-chat-1m-hf": "glm-4-9b-chat",
    "glm-4.5-air": "glm-4.5",
}


def render_pieces(
    generation: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = True,
    options: Mapping[str, Any] | None = None,
) -> list[Piece]:
    """The pieces of a chat; see `render_chat`."""
    name = str(getattr(generation, "name", generation)).lower().rpartition("/")[2]
    renderer = RENDERERS.get(OTHER_NAMES.get(name, name))
    if renderer is None:
        raise ValueError(f"no chat template of {generation!r}: there are {', '.join(RENDERERS)}")
    if not messages:
        raise ValueError("messages is empty: a chat has at least one message")
    if any(not isinstance(tool, Mapping) for tool in tools or ()):
        raise ValueError("tools: each is a JSON schema, a dict")
    chat = [_normalise(number, message) for number, message in enumerate(messages, start=1)]
    return renderer(chat, tools, add_generation_prompt, options or {})


def render_chat(
    generation: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = True,
    **options: Any,
) -> str:
    """
    The text of a chat in a generation's released template, from GLM-4-9B on.

    Args:
        generation: a key of RENDERERS, such as "glm-4-0414"; the name of a release, such as "zai-org/GLM-4.5-Air";
            or a row of `utils/models/family.py`.
        messages: dicts as the released template takes them. GLM-4-9B reads tools from a message's `tools`. Up to
            GLM-Z1 a call is an assistant's message with `metadata`, and a result has the role "observation"; from
            GLM-4.5 on they are `tool_calls` and the role "tool".
        tools: JSON schemas of functions, from GLM-4-0414 on.
        add_generation_prompt: whether the text ends with the start of the assistant's answer.
        options: `enable_thinking`, `clear_thinking`, `reasoning_effort`; a template ignores what it does not know.

    Raises:
        ValueError: an unknown generation, no messages, or what the released template errs at.
    """
    return "".join(piece.text for piece in render_pieces(generation, messages, tools, add_generation_prompt, options))


def _normalise(number: int, message: Any) -> dict[str, Any]:
    """The message without keys whose value is None, its reasoning as `reasoning_content`, as transformers has it."""
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number}: it is a {type(message).__name__}, not a dict of role and content")
    message = {key: value for key, value in message.items() if value is not None}
    for key in ("reasoning_content", "thinking", "reasoning"):
        if key in message:
            return message | {"reasoning_content": message[key]}
    return message
