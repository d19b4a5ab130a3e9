"""
The chat templates from GLM-4.5 on, which tag reasoning, calls and results; see `utils/models/chat_renderers.py`.

They are one form with the differences that `TaggedForm` names. Sources: chat_template of zai-org/GLM-4.5, GLM-4.7,
GLM-5.1 and GLM-5.2.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.models.chat_pieces import (
    ASSISTANT,
    NOTHINK,
    OBSERVATION,
    OPENING,
    THINK,
    THINK_END,
    Piece,
    literal,
    printed,
    role_token,
)

TOOLS_HEAD = (
    "\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>\n"
)
TOOLS_TAIL = (
    "</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"
    "<tool_call>{{function-name}}{gap}<arg_key>{{arg-key-1}}</arg_key>{gap}<arg_value>{{arg-value-1}}</arg_value>{gap}"
    "<arg_key>{{arg-key-2}}</arg_key>{gap}<arg_value>{{arg-value-2}}</arg_value>{gap}...{gap}</tool_call>"
)
REMINDER = (
    "<reminder>You are unable to process this {medium} because you don't have multi-modal input ability. "
    "Try different methods.</reminder>"
)
MEDIA = {
    name: medium
    for medium, names in {
        "image": ("image", "image_url"),
        "video": ("video", "video_url"),
        "audio": ("audio", "audio_url", "input_audio"),
    }.items()
    for name in names
}


@dataclass(frozen=True)
class TaggedForm:
    """What differs between the templates from GLM-4.5 on."""

    gap: str = ""  # between a tag and what is beside it
    has_nothink: bool = False  # whether thinking is turned off by a suffix of the user's messages
    strips_reasoning: bool = True
    knows_clear_thinking: bool = True
    thinking_off: str = THINK_END  # how a prompt ends with thinking off
    # How an answer begins that shows no reasoning: "never" with thinking_off, "pair" always with <think></think>,
    # "turn" with that where thinking is on, or another answer to the same question has reasoning.
    empty_reasoning: str = "never"
    unwraps_tools: bool = False  # whether a tool is shown as its function, and may be deferred
    joins_results: bool = False  # whether the parts of a result are one text
    has_effort: bool = False  # whether a system message says the effort of reasoning
    names_media: bool = False  # whether a sentence stands for a picture, video or sound


GLM_4_5 = TaggedForm(gap="\n", has_nothink=True, knows_clear_thinking=False, thinking_off=f"\n{THINK}{THINK_END}")
GLM_4_7 = TaggedForm()
GLM_5_1 = TaggedForm(strips_reasoning=False, empty_reasoning="turn", unwraps_tools=True, joins_results=True)
GLM_5_2 = TaggedForm(
    strips_reasoning=False,
    thinking_off=f"{THINK}{THINK_END}",
    empty_reasoning="pair",
    unwraps_tools=True,
    joins_results=True,
    has_effort=True,
    names_media=True,
)


def render_tagged(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    add_generation_prompt: bool,
    options: Mapping[str, Any],
    *,
    form: TaggedForm,
) -> list[Piece]:
    """The pieces of a chat from GLM-4.5 on; messages of roles that a template does not know are left out."""
    return _Chat(messages, tools, options, form).render(add_generation_prompt)


class _Chat:
    """One chat while it is rendered."""

    def __init__(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        options: Mapping[str, Any],
        form: TaggedForm,
    ):
        self.messages, self.options, self.form = messages, options, form
        unwrap = form.unwraps_tools
        self.tools = [_unwrapped(tool) if unwrap else tool for tool in tools or ()]
        self.has_tools = bool(tools)
        self.thinking_off = "enable_thinking" in options and not options["enable_thinking"]
        users = [number for number, message in enumerate(messages) if message.get("role") == "user"]
        self.last_user = users[-1] if users else -1

    def render(self, add_generation_prompt: bool) -> list[Piece]:
        pieces = literal(OPENING)
        if self.form.has_effort and not self.thinking_off:
            effort = "High" if self.options.get("reasoning_effort") == "high" else "Max"
            pieces += literal(f"<|system|>Reasoning Effort: {effort}")
        if self.has_tools:
            pieces += self.describe_tools()
        for number, message in enumerate(self.messages):
            role = message.get("role")
            if role == "user":
                pieces += self.user(message)
            elif role == "assistant":
                pieces += self.assistant(number, message)
            elif role == "tool":
                pieces += self.result(number, message)
            elif role == "system":
                text = self.visible_text(message.get("content"))
                pieces += [*role_token("system"), *literal(self.form.gap), Piece(text)]
        if add_generation_prompt:
            pieces += literal(ASSISTANT + self.prompt_end)
        return pieces

    @property
    def prompt_end(self) -> str:
        if self.thinking_off:
            return self.form.thinking_off
        return "" if self.form.has_nothink else THINK

    def describe_tools(self) -> list[Piece]:
        pieces = literal(f"<|system|>{TOOLS_HEAD}")
        for tool in self.tools:
            if not (self.form.unwraps_tools and isinstance(tool, Mapping) and tool.get("defer_loading")):
                pieces.append(Piece(f"{self.schema(tool)}\n"))
        return [*pieces, *literal(TOOLS_TAIL.format(gap=self.form.gap))]

    def schema(self, tool: Any) -> str:
        if self.form.unwraps_tools and isinstance(tool, Mapping):
            tool = {name: value for name, value in tool.items() if name not in ("defer_loading", "strict")}
        return json.dumps(tool, ensure_ascii=False)

    def user(self, message: Mapping[str, Any]) -> list[Piece]:
        text = self.visible_text(message.get("content"))
        pieces = [*role_token("user"), *literal(self.form.gap), Piece(text)]
        if self.form.has_nothink and self.thinking_off and not text.endswith(NOTHINK):
            pieces += literal(NOTHINK)
        return pieces

    def assistant(self, number: int, message: Mapping[str, Any]) -> list[Piece]:
        form, gap = self.form, self.form.gap
        content = self.visible_text(message.get("content"))
        reasoning = message.get("reasoning_content")
        if not isinstance(reasoning, str):
            reasoning = None
            if THINK_END in content:
                reasoning, content = content.split(THINK_END)[0], content.split(THINK_END)[-1]
                if form.strips_reasoning:
                    reasoning = reasoning.rstrip("\n").split(THINK)[-1].lstrip("\n")
                else:
                    reasoning = reasoning.split(THINK)[-1]
        keeps = form.knows_clear_thinking and "clear_thinking" in self.options and not self.options["clear_thinking"]
        if form.empty_reasoning == "turn" and reasoning is None and self.is_thinking_turn(number):
            reasoning = ""
        shown = (keeps or number > self.last_user) and reasoning is not None
        if form.empty_reasoning == "never":
            shown = shown and bool(reasoning)
        pieces = [Piece(ASSISTANT, is_token=True)]
        if shown and (reasoning or form.empty_reasoning == "turn" and not self.thinking_off):
            if form.strips_reasoning:
                reasoning = reasoning.strip()
            if gap:  # the model writes the newline and <think>
                pieces += literal(f"{gap}{THINK}", number)
            else:
                pieces += literal(THINK)
            pieces += [Piece(reasoning, message=number)] if reasoning else []
            pieces += literal(THINK_END, number)
        else:
            pair = shown and form.empty_reasoning == "turn"
            pieces += literal(f"{THINK}{THINK_END}" if pair else form.thinking_off)
        if content.strip():
            pieces.append(Piece(gap + content.strip(), message=number))
        for call in message.get("tool_calls") or ():
            pieces += self.call(number, call)
        return pieces

    def is_thinking_turn(self, number: int) -> bool:
        """Whether an answer without reasoning belongs to a turn with thinking on."""
        if number > self.last_user and not self.thinking_off:
            return True
        question = max((index for index in range(number) if self.messages[index].get("role") == "user"), default=-1)
        for message in self.messages[question + 1 :]:
            if message.get("role") == "user":
                break
            if message.get("role") == "assistant" and isinstance(message.get("reasoning_content"), str):
                return True
        return False

    def call(self, number: int, call: Any) -> list[Piece]:
        gap = self.form.gap
        function = call.get("function") or call if isinstance(call, Mapping) else {}
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str):
            raise ValueError(f"message {number + 1}: a call has no name")
        if not isinstance(arguments, Mapping):
            raise ValueError(
                f"message {number + 1}: the arguments of {name} are a {type(arguments).__name__}, not a dict"
            )
        pieces = [*literal(f"{gap}<tool_call>", number), Piece(name + gap, message=number)]
        for key, value in arguments.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            pieces += [
                *literal("<arg_key>", number),
                Piece(printed(key), message=number),
                *literal(f"</arg_key>{gap}<arg_value>", number),
                Piece(text, message=number),
                *literal(f"</arg_value>{gap}", number),
            ]
        return [*pieces, *literal("</tool_call>", number)]

    def result(self, number: int, message: Mapping[str, Any]) -> list[Piece]:
        content, gap = message.get("content"), self.form.gap
        follows = number > 0 and self.messages[number - 1].get("role") == "tool"
        opening = [] if follows else literal(OBSERVATION)
        if isinstance(content, str):
            texts = [content]
        elif self.form.joins_results:
            texts = [self.referenced_tools(content) or self.visible_text(content)]
        else:
            opening = literal(OBSERVATION)
            if content is not None and not isinstance(content, Sequence | Mapping):
                raise ValueError(
                    f"message {number + 1}: the content is a {type(content).__name__}, not a text or list"
                )
            texts = [
                printed(part["output"]) if isinstance(part, Mapping) and "output" in part else str(part)
                for part in content or ()
            ]
        pieces = opening
        for text in texts:
            pieces += [*literal(f"{gap}<tool_response>{gap}"), Piece(text), *literal(f"{gap}</tool_response>")]
        return pieces

    def referenced_tools(self, content: Any) -> str:
        """The tools that the parts of a result refer to; "" if they refer to none."""
        if not isinstance(content, Sequence) or not content:
            return ""
        if not (isinstance(content[0], Mapping) and content[0].get("type") == "tool_reference"):
            return ""
        text = "<tools>\n"
        for part in content:
            for tool in self.tools:
                if isinstance(tool, Mapping) and isinstance(part, Mapping) and tool.get("name") == part.get("name"):
                    text += f"{self.schema(tool)}\n"
        return f"{text}</tools>"

    def visible_text(self, content: Any) -> str:
        """The texts of a content's parts; another value as Jinja prints it."""
        if content is None:
            return ""
        if not isinstance(content, Sequence) or isinstance(content, str):
            return str(content)
        text = ""
        for part in content:
            if isinstance(part, str):
                text += part
            elif isinstance(part, Mapping):
                kind = part.get("type")
                if kind == "text":
                    text += printed(part.get("text"))
                elif self.form.names_media and kind in MEDIA:
                    text += REMINDER.format(medium=MEDIA[kind])
        return text


def _unwrapped(tool: Any) -> Any:
    return tool["function"] if isinstance(tool, Mapping) and "function" in tool else tool
