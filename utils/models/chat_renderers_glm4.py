"""
The conversations of glm-4-9b-chat, GLM-4-0414 and GLM-Z1-0414, as their official templates write them.

`chat_renderers.py` calls these. In all three a turn is `<|role|>`, the metadata (the function that an assistant
message calls), a newline and the content; no token ends an assistant turn.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from utils.models.chat_pieces import MISSING, Piece, items_of, json_text, value_of

OPENING = [Piece("[gMASK]", is_token=True), Piece("<sop>", is_token=True)]
ROLES = ("system", "user", "assistant", "observation")  # these have a token of their own
TOOLS_HEADING = "# 可用工具"
AFTER_FUNCTION = "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
INTRODUCTION_9B = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。"
)
INTRODUCTION_Z1 = INTRODUCTION_9B.replace("智谱AI训练", "智谱 AI 公司训练")
# What glm-4-9b-chat is told about the tools that are not functions.
BUILTIN_TOOLS = {
    "python": (
        "\n## python\n\n"
        "当你向 `python` 发送包含 Python 代码的消息时，该代码将会在一个有状态的 Jupyter notebook 环境中执行。\n"
        "`python` 返回代码执行的输出，或在执行 60 秒后返回超时。\n"
        "`/mnt/data` 将会持久化存储你的文件。在此会话中，`python` 无法访问互联网。"
        "不要使用 `python` 进行任何网络请求或者在线 API 调用，这些在线内容的访问将不会成功。"
    ),
    "simple_browser": (
        "\n## simple_browser\n\n你可以使用 `simple_browser` 工具。该工具支持以下函数：\n"
        "`search(query: str, recency_days: int)`：使用搜索引擎进行查询并显示结果，"
        "可以使用 `recency_days` 参数控制搜索内容的时效性。\n"
        "`mclick(ids: list[int])`：获取一系列指定 id 的页面内容。每次调用时，须选择3-10个页面。"
        "选择多个角度的页面，同时尽可能选择可信任的信息来源。"
        "考虑到部分页面是无法加载的，你也可以多打开一些可能有用的页面而不用担心内容过多。\n"
        "`open_url(url: str)`：打开指定的 URL。\n\n使用 `【{引用 id}†{引用文本}】` 来引用内容。\n\n"
        "操作步骤：1. 使用 `search` 来获得信息列表; 2. 使用 `mclick` 来获取指定 ID 页面的内容; "
        "3. 根据获得的内容进行回复。在回复中应当引用信息来源。\n"
        " 如果用户提供了 URL，也可以用 `open_url` 直接打开页面。\n"
        "如果初次搜索结果没有找到合适的信息，也可以再次使用 `search` 进行搜索。"
    ),
    "cogview": (
        "\n## cogview\n\n如果用户的请求中包含了对图像的描述，你可以使用 `cogview` 来生成图像并展示给用户。"
        "你需要向 `cogview` 发送图像描述，规则：\n"
        "- 发送给 `cogview` 的消息必须使用英语。用户的中文描述必须完全翻译为英语。\n"
        "- 应当尽可能详细地描述图像生成的需求，需求描述约 100 英文单词。\n"
        "- 保持用户原始描述的意图。不要虚构内容或者没见过的人物。\n"
        "- 如无特殊说明，所在地为中国，持有中国立场并遵循中国社会主义价值观。"
    ),
}


def render_glm4_9b(messages: Sequence[Mapping[str, Any]], tools: Any, prompt: bool, options: Any) -> list[Piece]:
    """
    Return the pieces of a glm-4-9b-chat conversation.

    Source: the chat_template of THUDM/glm-4-9b-chat. It reads the tools of a message's own `tools` key, wherever the
    message stands, and neither the argument nor the options; it takes any role, and leaves out messages without
    content.
    """
    pieces = list(OPENING)
    for number, message in enumerate(messages):
        own_tools = value_of(message, "tools")
        if own_tools is not MISSING:
            pieces += [role_piece("system"), Piece(tools_text_9b(own_tools, number))]
        content = value_of(message, "content")
        if content:
            pieces += turn(number, str(value_of(message, "role")), value_of(message, "metadata"), content)
    return pieces + [role_piece("assistant")] * prompt


def tools_text_9b(tools: Any, number: int) -> str:
    """Return the system text of a message's tools; raises ValueError for a function tool without its function."""
    texts = [f"\n{INTRODUCTION_9B}\n\n{TOOLS_HEADING}"]
    for tool in items_of(tools, f"message {number + 1}: tools"):
        kind = value_of(tool, "type")
        if kind == "function":
            function = value_of(tool, "function")
            if function is MISSING:
                raise ValueError(f"message {number + 1}: a tool of type function lacks its function")
            texts.append("\n" + function_text(function))
        elif isinstance(kind, str):
            texts.append(BUILTIN_TOOLS.get(kind, ""))
    return "".join(texts)


def render_glm4_0414(messages: Sequence[Mapping[str, Any]], tools: Any, prompt: bool, options: Any) -> list[Piece]:
    """
    Return the pieces of a GLM-4-0414 conversation.

    Source: chat_template.jinja of zai-org/GLM-4-9B-0414 and GLM-4-32B-0414. System messages come first, wherever they
    stood; a message of another role than system, user, assistant and observation is left out.
    """
    opening = "\n" + TOOLS_HEADING + "\n"
    pieces = [*OPENING, *tools_pieces(opening, tools), *system_pieces(messages)]
    for number, message in enumerate(messages):
        role = value_of(message, "role")
        if role in ("user", "assistant", "observation"):
            pieces += turn(number, role, called_function(message), value_of(message, "content"))
    return pieces + [role_piece("assistant")] * prompt


def render_glm_z1(messages: Sequence[Mapping[str, Any]], tools: Any, prompt: bool, options: Any) -> list[Piece]:
    """
    Return the pieces of a GLM-Z1-0414 conversation.

    Source: chat_template.jinja of zai-org/GLM-Z1-9B-0414 and GLM-Z1-32B-0414. As GLM-4-0414, but every content is cut
    to what follows its last `</think>`, so it writes no reasoning; the prompt opens the reasoning. The vocabulary has
    no `<think>`: it is text. Raises ValueError where a content is no text, a left out message's too.
    """
    opening = f"\n{INTRODUCTION_Z1}\n\n{TOOLS_HEADING}"
    pieces = [*OPENING, *tools_pieces(opening, tools), *system_pieces(messages)]
    for number, message in enumerate(messages):
        role, content = value_of(message, "role"), value_of(message, "content")
        if role == "system":
            continue
        if not isinstance(content, str):
            found = "no content" if content is MISSING else f"a content of type {type(content).__name__}"
            raise ValueError(f"message {number + 1} has {found}; GLM-Z1 takes only text")
        if role in ("user", "assistant", "observation"):
            pieces += turn(number, role, called_function(message), content.split("</think>")[-1].strip())
    return pieces + [role_piece("assistant"), Piece("\n<think>")] * prompt


def role_piece(role: str) -> Piece:
    """Return the piece that opens a turn: a token for a known role, plain text for another."""
    return Piece(f"<|{role}|>", is_token=role in ROLES)


def turn(number: int, role: str, metadata: Any, content: Any) -> list[Piece]:
    """Return a turn: its role, its metadata, a newline, its content."""
    return [role_piece(role), Piece(f"{metadata}\n{content}", message=number if role == "assistant" else None)]


def called_function(message: Mapping[str, Any]) -> Any:
    """Return the metadata of an assistant message: the function that it calls; nothing for another role."""
    return value_of(message, "metadata") or "" if value_of(message, "role") == "assistant" else ""


def system_pieces(messages: Sequence[Mapping[str, Any]]) -> list[Piece]:
    """Return the turns of all system messages."""
    contents = [value_of(message, "content") for message in messages if value_of(message, "role") == "system"]
    return [piece for content in contents for piece in (role_piece("system"), Piece(f"\n{content}"))]


def tools_pieces(opening: str, tools: Sequence[Mapping[str, Any]] | None) -> list[Piece]:
    """Return the system turn of the tools, each wrapped or bare; nothing without tools."""
    if not tools:
        return []
    functions = [value_of(tool, "function") or tool for tool in tools]
    return [role_piece("system"), Piece(opening + "".join("\n" + function_text(function) for function in functions))]


def function_text(function: Any) -> str:
    """Return what the model reads of a function: its name, its JSON and how to call it."""
    return f"## {value_of(function, 'name')}\n\n{json_text(function, indent=4)}{AFTER_FUNCTION}"
