"""
The conversations of GLM-4.5 to GLM-5.2, as their official templates write them.

`chat_renderers.py` calls `render_glm45` with the form of a generation. All of them write reasoning as
`<think>...</think>`, calls as `<tool_call>` with one `<arg_key>` and `<arg_value>` an argument, and results as
`<tool_response>`; a `Form` holds what differs. No token ends an assistant turn.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.models.chat_pieces import MISSING, Piece, items_of, json_text, value_of

TOKENS = re.compile(r"(</?(?:think|tool_call|tool_response|arg_key|arg_value)>)")  # of the template's own text
TOOLS_TEXT = (
    "\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{tools}</tools>\n\n"
    "For each function call, output the function name and arguments within the following XML format:\n"
)
CALL_EXAMPLE = (
    "<tool_call>{function-name}",
    "<arg_key>{arg-key-1}</arg_key>",
    "<arg_value>{arg-value-1}</arg_value>",
    "<arg_key>{arg-key-2}</arg_key>",
    "<arg_value>{arg-value-2}</arg_value>",
    "...",
    "</tool_call>",
)
MEDIA_REMINDER = (
    "<reminder>You are unable to process this {medium} because you don't have multi-modal input ability. "
    "Try different methods.</reminder>"
)
MEDIA = {
    "image": "image",
    "image_url": "image",
    "video": "video",
    "video_url": "video",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}
HIDDEN_TOOL_KEYS = ("defer_loading", "strict")


@dataclass(frozen=True)
class Form:
    """What the official template of one generation writes differently from the others'."""

    newline: str = ""  # behind role tokens, and between the parts of calls and results
    thinking_off: tuple[str, ...] = ("</think>",)  # ends the prompt with thinking off
    thinking_on: tuple[str, ...] = ("<think>",)  # ends the prompt with thinking on
    no_reasoning: tuple[str, ...] = ("</think>",)  # opens a turn whose reasoning is not written
    nothink_mark: bool = False  # thinking off: `/nothink` ends each user message
    can_keep_thinking: bool = True  # `clear_thinking=False` keeps the reasoning of turns before the last user message
    strips_reasoning: bool = True  # and takes an empty reasoning for none
    opens_empty_reasoning: bool = False  # of a turn without reasoning: see `reasoning_of`
    bare_tools: bool = False  # the function part of a tool alone, without deferred tools; results of 5.1 on
    says_effort: bool = False  # a system turn of the reasoning effort comes first
    splits_outputs: bool = False  # a result list of `output` objects is one response each; 5.1 takes only text parts
    reminds_of_media: bool = False  # an image, video or audio part becomes a sentence


# Sources: chat_template.jinja of zai-org/GLM-4.5 and GLM-4.5-Air, and of zai-org/GLM-4.6.
GLM_4_5 = Form(
    newline="\n",
    thinking_off=("\n", "<think>", "</think>"),
    thinking_on=(),
    no_reasoning=("\n", "<think>", "</think>"),
    nothink_mark=True,
    can_keep_thinking=False,
)
# Source: chat_template.jinja of zai-org/GLM-4.7 and GLM-4.7-Flash; zai-org/GLM-5 has the same text.
GLM_4_7 = Form()
# Source: chat_template.jinja of zai-org/GLM-5.1.
GLM_5_1 = Form(strips_reasoning=False, opens_empty_reasoning=True, bare_tools=True)
# Source: chat_template.jinja of zai-org/GLM-5.2.
GLM_5_2 = Form(
    thinking_off=("<think>", "</think>"),
    no_reasoning=("<think>", "</think>"),
    strips_reasoning=False,
    bare_tools=True,
    says_effort=True,
    splits_outputs=True,
    reminds_of_media=True,
)


def render_glm45(
    form: Form,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    prompt: bool,
    options: Mapping[str, Any],
) -> list[Piece]:
    """Return the pieces of a conversation; a message of a role that the template does not know is left out."""
    return Conversation(form, messages, tools, options).pieces(prompt)


def tokens(*texts: str) -> list[Piece]:
    """Return the template's own texts as pieces, each special token in them on its own."""
    return [Piece(part, is_token=bool(TOKENS.fullmatch(part))) for text in texts for part in TOKENS.split(text)]


def token(text: str) -> Piece:
    """Return the piece of a special token."""
    return Piece(text, is_token=True)


class Conversation:
    """A conversation in the form of one generation."""

    def __init__(
        self,
        form: Form,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        options: Mapping[str, Any],
    ):
        self.form = form
        self.messages = messages
        self.roles = [value_of(message, "role") for message in messages]
        self.tools = tools
        self.thinks = bool(options.get("enable_thinking", True))
        self.keeps_thinking = form.can_keep_thinking and not options.get("clear_thinking", True)
        self.effort = "High" if options.get("reasoning_effort") == "high" else "Max"
        self.last_user = max((number for number, role in enumerate(self.roles) if role == "user"), default=-1)

    def pieces(self, prompt: bool) -> list[Piece]:
        """Return all pieces, those of the generation prompt last."""
        result = [token("[gMASK]"), token("<sop>")]
        if self.form.says_effort and self.thinks:
            result += [token("<|system|>"), Piece(f"Reasoning Effort: {self.effort}")]
        if self.tools:
            result += self.tools_turn(self.tools)
        for number, (role, message) in enumerate(zip(self.roles, self.messages, strict=True)):
            try:
                result += self.turn(number, role, message)
            except ValueError as error:
                raise ValueError(f"message {number + 1}: {error}") from error
        return result + self.prompt(self.thinks) if prompt else result

    def turn(self, number: int, role: Any, message: Mapping[str, Any]) -> list[Piece]:
        """Return the turn of a message; nothing for an unknown role."""
        content = value_of(message, "content")
        if role == "user":
            text = self.visible_text(content)
            is_marked = self.form.nothink_mark and not self.thinks and not text.endswith("/nothink")
            return [token("<|user|>"), Piece(self.form.newline + text), *[token("/nothink")] * is_marked]
        if role == "system":
            return [token("<|system|>"), Piece(self.form.newline + self.visible_text(content))]
        if role == "tool":
            return self.result_turn(number, content)
        return self.assistant_turn(number, message) if role == "assistant" else []

    def visible_text(self, content: Any) -> str:
        """Return a content as text: of a list its strings and text parts, of another type what Python prints."""
        if isinstance(content, Mapping) or not isinstance(content, Sequence) or isinstance(content, str):
            return str(content)
        texts = []
        for part in content:
            kind = value_of(part, "type")
            if isinstance(part, str):
                texts.append(part)
            elif kind == "text":
                texts.append(str(value_of(part, "text")))
            elif self.form.reminds_of_media and isinstance(kind, str) and kind in MEDIA:
                texts.append(MEDIA_REMINDER.format(medium=MEDIA[kind]))
        return "".join(texts)

    def tools_turn(self, tools: Sequence[Mapping[str, Any]]) -> list[Piece]:
        """Return the system turn that lists the tools and shows how to call them."""
        listed = tools
        if self.form.bare_tools:
            listed = [tool for tool in map(bare_tool, tools) if not value_of(tool, "defer_loading")]
        lines = [self.tool_text(tool) + "\n" for tool in listed]
        before, after = TOOLS_TEXT.split("{tools}")
        example = tokens(self.form.newline.join(CALL_EXAMPLE))
        return [token("<|system|>"), Piece(before + "".join(lines) + after), *example]

    def tool_text(self, tool: Any) -> str:
        """Return a tool as JSON; raises ValueError for a function that is no object where its keys are written."""
        if not self.form.bare_tools:
            return json_text(tool)
        if not isinstance(tool, Mapping):
            raise ValueError(f"the function of a tool is {tool!r}, not an object")
        pairs = [f'"{key}": {json_text(value)}' for key, value in tool.items() if key not in HIDDEN_TOOL_KEYS]
        return "{" + ", ".join(pairs) + "}"

    def assistant_turn(self, number: int, message: Mapping[str, Any]) -> list[Piece]:
        """Return an assistant's turn: the generation prompt that it begins with, then what the model writes."""
        form = self.form
        reasoning, answer = self.reasoning_of(number, message)
        if reasoning is not None and (self.keeps_thinking or number > self.last_user):
            thinking = [Piece(form.newline), token("<think>"), Piece(reasoning), token("</think>")]
        else:
            thinking = tokens(*form.no_reasoning)
        answer = answer.strip()
        turn = [token("<|assistant|>"), *thinking, Piece(form.newline + answer if answer else "")]
        turn += self.calls(value_of(message, "tool_calls"))
        turn = [piece for piece in turn if piece.text]
        prompts = [self.prompt(thinks) for thinks in (True, False)]
        length = max([len(prompt) for prompt in prompts if turn[: len(prompt)] == prompt], default=1)
        return turn[:length] + [piece._replace(message=number) for piece in turn[length:]]

    def prompt(self, thinks: bool) -> list[Piece]:
        """Return the generation prompt with thinking on or off."""
        ending = self.form.thinking_on if thinks else self.form.thinking_off
        return [piece for piece in (token("<|assistant|>"), *tokens(*ending)) if piece.text]

    def reasoning_of(self, number: int, message: Mapping[str, Any]) -> tuple[str | None, str]:
        """Return a message's reasoning (None: without) and answer; the content may hold both, around `</think>`."""
        form = self.form
        reasoning, answer = value_of(message, "reasoning_content"), self.visible_text(value_of(message, "content"))
        if not isinstance(reasoning, str):
            reasoning = None
            if "</think>" in answer:
                before = answer.split("</think>")[0]
                if form.strips_reasoning:
                    before = before.rstrip("\n")
                reasoning = before.split("<think>")[-1]
                if form.strips_reasoning:
                    reasoning = reasoning.lstrip("\n")
                answer = answer.split("</think>")[-1]
        if form.strips_reasoning:
            reasoning = reasoning.strip() if reasoning else None
        elif reasoning is None and form.opens_empty_reasoning:
            opens = self.thinks if number > self.last_user else self.thinks_elsewhere(number)
            reasoning = "" if opens else None
        return reasoning, answer

    def thinks_elsewhere(self, number: int) -> bool:
        """Return whether an assistant message behind the same user message has reasoning of its own key."""
        users = [index for index, role in enumerate(self.roles) if role == "user"]
        start = max((user for user in users if user < number), default=None)
        if start is None:  # in front of the first user message
            return False
        end = min((user for user in users if user > number), default=len(self.roles))
        return any(
            self.roles[index] == "assistant" and isinstance(value_of(self.messages[index], "reasoning_content"), str)
            for index in range(start, end)
        )

    def calls(self, calls: Any) -> list[Piece]:
        """Return the calls of a message; raises ValueError for one without name or argument object."""
        newline, pieces = self.form.newline, []
        for call in items_of(calls, "tool_calls") if calls else ():
            call = value_of(call, "function") or call
            name, arguments = value_of(call, "name"), value_of(call, "arguments")
            if not isinstance(name, str):
                raise ValueError("a tool call has no name")
            if not isinstance(arguments, Mapping):
                raise ValueError(f"the arguments of the call of {name} are {arguments!r}, not an object")
            pieces += [Piece(newline), token("<tool_call>"), Piece(name + newline)]
            for key, value in arguments.items():
                shown = value if isinstance(value, str) else json_text(value)
                pieces += [token("<arg_key>"), Piece(str(key)), token("</arg_key>"), Piece(newline)]
                pieces += [token("<arg_value>"), Piece(shown), token("</arg_value>"), Piece(newline)]
            pieces.append(token("</tool_call>"))
        return pieces

    def result_turn(self, number: int, content: Any) -> list[Piece]:
        """Return a tool's results; results of neighbouring messages share one role token."""
        opening = [] if number and self.roles[number - 1] == "tool" else [token("<|observation|>")]
        if isinstance(content, str):
            return opening + self.response(content)
        if not self.form.bare_tools:
            texts = [output_text(item) for item in items_of(content, "the content of the tool")]
            return [token("<|observation|>"), *(piece for text in texts for piece in self.response(text))]
        first = content[0] if isinstance(content, Sequence) and content else MISSING
        if value_of(first, "type") == "tool_reference":
            return opening + self.response(self.referenced_tools(content))
        if self.form.splits_outputs and value_of(first, "output") is not MISSING:
            outputs = [value_of(item, "output") for item in content]
            if not all(isinstance(output, str) for output in outputs):
                raise ValueError("an output of the tool is not text")
            return opening + [piece for output in outputs for piece in self.response(output)]
        return opening + self.response(self.visible_text(content))

    def response(self, text: str) -> list[Piece]:
        """Return one result of a tool."""
        newline = self.form.newline
        return [
            Piece(newline),
            token("<tool_response>"),
            Piece(newline + text + newline),
            token("</tool_response>"),
        ]

    def referenced_tools(self, references: Sequence[Any]) -> str:
        """Return the tools that a result refers to by name; raises ValueError without tools."""
        if self.tools is None:
            raise ValueError("a tool_reference needs tools")
        lines = ["<tools>\n"]
        for reference in references:
            for tool in map(bare_tool, self.tools):
                if value_of(tool, "name") == value_of(reference, "name"):  # none on both sides is equal too
                    lines.append(self.tool_text(tool) + "\n")
        return "".join(lines) + "</tools>"


def bare_tool(tool: Mapping[str, Any]) -> Any:
    """Return the function part of a tool, wrapped or bare."""
    return tool.get("function", tool)


def output_text(item: Any) -> str:
    """Return a result's `output`; what Python prints of it where it has none."""
    output = value_of(item, "output")
    return str(item if output is MISSING else output)
