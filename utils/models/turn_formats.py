"""
The chat templates of the generations whose turns follow role tokens, on `utils/models/turn_template.py`.

`utils/models/family.py` names the class of each generation. GLM-4.5 and later have no row there yet; their classes
serve tests, and the models to come.
"""

import ast
import contextlib
import json
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from keyword import iskeyword
from typing import Any

from transformers import PreTrainedTokenizerBase

from utils.models.chat_formats import only_trained
from utils.models.chat_pieces import Piece
from utils.models.chat_renderers_glm4 import tools_text_9b
from utils.models.conversation import Conversation, Message, ToolCall
from utils.models.token_spans import UnencodedText, token_ids
from utils.models.tokenization_chatglm2 import ChatGLM2Tokenizer
from utils.models.turn_template import ASSISTANT, OBSERVATION, ReleasedChat, TurnTemplate

THINK, THINK_END = "<think>", "</think>"
_TAGGED_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_TAGGED_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


class ApartTemplate(TurnTemplate):
    """
    ChatGLM3-6B and GLM-4-9B, whose released tokenizers encode each text and each newline apart.

    A message without content keeps its role token; the `chat_template` of GLM-4-9B leaves it out.
    """

    joins_texts = False

    @abstractmethod
    def texts_with_tools(self, number: int, message: Mapping[str, Any]) -> list[str]:
        """The texts that message `number`, which has tools, becomes, each in a turn of its role."""

    def render_released(self, messages, tools, add_generation_prompt, options) -> list[Piece]:
        pieces = [Piece(token, is_token=True) for token in self.opening_tokens]
        for number, message in enumerate(messages):
            writer = number if message["role"] == "assistant" else None
            contents = self.texts_with_tools(number, message) if message.get("tools") else [message["content"]]
            for content in contents:
                text = f"{message.get('metadata', '')}\n{content}"
                pieces += [Piece(f"<|{message['role']}|>", is_token=True), Piece(text, message=writer)]
        return [*pieces, Piece(ASSISTANT, is_token=True)] if add_generation_prompt else pieces


class ChatGLM3Template(ApartTemplate):
    """
    ChatGLM3-6B: `[gMASK] sop <|user|> \\n prompt <|assistant|> \\n target </s>`.

    Source: `build_chat_input` of THUDM/chatglm3-6b's tokenizer; a call is a line of Python as in `process_response` of
    its model and in its tool_using/README.
    """

    opening_tokens = ChatGLM2Tokenizer.opening_tokens
    tools_sentence = "Answer the following questions as best as you can. You have access to the following tools:"

    def texts_with_tools(self, number: int, message: Mapping[str, Any]) -> list[str]:
        return [f"{message['content']}\n{json.dumps(message['tools'], indent=4, ensure_ascii=False)}"]

    def released_chat(self, conversation: Conversation) -> ReleasedChat:
        chat = super().released_chat(conversation)
        for message in chat.messages:
            if "metadata" in message:
                message["content"] = f"```python\n{python_call(message['content'])}\n```"
        tools = chat.tools and [tool.get("function", tool) for tool in chat.tools]
        return tools_in_system(chat._replace(tools=tools), self.tools_sentence)

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return [tokenizer.eos_token_id, *token_ids(tokenizer, "<|user|>", OBSERVATION)]

    def parse_arguments(self, text: str) -> str | None:
        code = text.removeprefix("```python").removesuffix("```").strip()
        try:
            call = ast.parse(code, mode="eval").body
            if not (isinstance(call, ast.Call) and getattr(call.func, "id", "") == "tool_call" and not call.args):
                return None
            values: dict[str, Any] = {}
            for keyword in call.keywords:
                value = ast.literal_eval(keyword.value)
                values |= value if keyword.arg is None else {keyword.arg: value}
            return json.dumps(values, ensure_ascii=False)
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
            return None


class GLM4Template(ApartTemplate):
    """
    GLM-4-9B: `[gMASK] <sop> <|user|> \\n prompt <|assistant|> \\n target <|user|>`.

    Source: `apply_chat_template` of THUDM/glm-4-9b-chat's tokenizer; tools as its `chat_template` describes them.
    """

    ids_version = 2  # in version 1 the tokenizer lacked most of tiktoken's merges: other ids in 40 % of Chinese rows

    def texts_with_tools(self, number: int, message: Mapping[str, Any]) -> list[str]:
        described = tools_text_9b(message["tools"], number).removeprefix("\n")
        return [described, message["content"]] if message["content"] else [described]

    def released_chat(self, conversation: Conversation) -> ReleasedChat:
        return tools_in_system(super().released_chat(conversation), "")


class GLM40414Template(TurnTemplate):
    """GLM-4-9B-0414 and GLM-4-32B-0414: as GLM-4-9B, but role, newline and text are one text for the tokenizer."""

    renderer = "glm-4-0414"


class GLMZ1Template(TurnTemplate):
    """
    GLM-Z1-9B-0414 and GLM-Z1-32B-0414: as GLM-4-0414, and the prompt ends in `<think>`.

    The released template has no form of an answer with reasoning; what the model writes behind the prompt is the
    reasoning, `</think>` and the answer. Earlier answers stand without their reasoning.
    """

    renderer = "glm-z1-0414"
    has_reasoning = True

    def target_pieces(self, row: Conversation, prompt: Sequence[Piece]) -> list[Piece]:
        last, message = len(row.messages) - 1, row.messages[-1]
        pieces = [Piece(self.written(message), message=last)]
        for call in message.tool_calls:
            pieces += [Piece(ASSISTANT, True, last), Piece(f"{call.name}\n{call.arguments}", message=last)]
        return pieces

    def written(self, message: Message) -> str:
        """What the model writes of an answer behind `<think>`, calls left out."""
        if message.reasoning:
            return f"{message.reasoning}{THINK_END}{message.content}"
        if THINK_END in message.content:
            return message.content.lstrip().removeprefix(THINK)
        return f"{THINK_END}{message.content}"

    def parse_answer(self, texts: Sequence[str], tools: str) -> Message:
        reasoning, ended, answer = texts[0].partition(THINK_END)  # the prompt ends in <think>
        message = super().parse_answer([answer, *texts[1:]] if ended else texts[1:], tools)
        return message._replace(reasoning=reasoning.strip())

    def single_turn_texts(self, row: Conversation) -> tuple[str, str] | None:
        texts = super().single_turn_texts(row)
        if texts is None:
            return None
        question = row.messages[0].content.rpartition(THINK_END)[2].strip()
        return f"\n{question}", self.written(row.messages[1])

    def training_rows(self, row: Conversation, trained: Sequence[int]) -> list[Conversation]:
        # One an answer, since earlier ones have another form.
        return [only_trained(row, [number]) for number in trained]


class ThinkingTemplate(TurnTemplate):
    """
    GLM-4.5 and later: reasoning between `<think>` and `</think>`, calls between `<tool_call>` and `</tool_call>`.

    Where neither a flag nor the row says whether thinking is on, it is on for the rows whose answer has reasoning: an
    answer without it then continues the prompt that inference has with thinking off.
    """

    has_reasoning = True
    known_options = ("enable_thinking", "clear_thinking")

    def released_chat(self, conversation: Conversation) -> ReleasedChat:
        messages = []
        for message in conversation.messages:
            released: dict[str, Any] = {"role": message.role, "content": message.content}
            if message.reasoning:
                released["reasoning_content"] = message.reasoning
            if message.tool_calls:
                released["tool_calls"] = [
                    {"name": call.name, "arguments": json.loads(call.arguments)} for call in message.tool_calls
                ]
            messages.append(released)
        tools = json.loads(conversation.tools) if conversation.tools else None
        return ReleasedChat(messages, tools, list(range(len(messages))))

    def single_turn_texts(self, row: Conversation) -> tuple[str, str] | None:
        return None  # the answer decides how the prompt ends

    def unencoded_row(
        self, tokenizer: PreTrainedTokenizerBase, row: Conversation
    ) -> tuple[UnencodedText, UnencodedText]:
        return super().unencoded_row(tokenizer, self._with_thinking(row))

    def training_rows(self, row: Conversation, trained: Sequence[int]) -> list[Conversation]:
        together = only_trained(row, trained)
        apart = [only_trained(row, [number]) for number in trained]
        pieces = [piece.text for piece in self.pieces(self._with_thinking(together), add_generation_prompt=False)]
        for one in map(self._with_thinking, apart[:-1]):  # an earlier answer may have lost its reasoning
            prompt = self.pieces(one._replace(messages=one.prompt), add_generation_prompt=True)
            written = [piece.text for piece in (*prompt, *self.target_pieces(one, prompt))]
            if pieces[: len(written)] != written:
                return apart
        return [together]

    def parse_answer(self, texts: Sequence[str], tools: str) -> Message:
        text = "".join(texts)
        reasoning, ended, answer = text.partition(THINK_END)
        if not ended:
            reasoning, answer = "", text
        calls = []
        if tools:
            types = argument_types(tools)
            calls = [parse_tagged_call(call, types) for call in _TAGGED_CALL.findall(answer)]
            answer = _TAGGED_CALL.sub("", answer)
        reasoning = reasoning.strip().removeprefix(THINK).strip()
        return Message("assistant", self.clean(answer), reasoning, tuple(calls))

    def _with_thinking(self, row: Conversation) -> Conversation:
        if "enable_thinking" in self.options | dict(row.options):
            return row
        answer = row.messages[-1]
        thinks = bool(answer.reasoning.strip()) or THINK_END in answer.content
        return row._replace(options=(*row.options, ("enable_thinking", thinks)))


class GLM45Template(ThinkingTemplate):
    """GLM-4.5, GLM-4.5-Air and GLM-4.6."""

    renderer = "glm-4.5"
    known_options = ("enable_thinking",)


class GLM47Template(ThinkingTemplate):
    """GLM-4.7, GLM-4.7-Flash and GLM-5."""

    renderer = "glm-4.7"


class GLM51Template(ThinkingTemplate):
    """GLM-5.1."""

    renderer = "glm-5.1"


class GLM52Template(ThinkingTemplate):
    """GLM-5.2."""

    renderer = "glm-5.2"
    known_options = (*ThinkingTemplate.known_options, "reasoning_effort")


def tools_in_system(chat: ReleasedChat, text: str) -> ReleasedChat:
    """The chat with its tools in its system message, with `text` if it has none."""
    messages, tools, numbers = chat
    if not tools:
        return chat
    if messages[0]["role"] != "system":
        messages, numbers = [{"role": "system", "content": text}, *messages], [0, *numbers]
    return ReleasedChat([messages[0] | {"tools": tools}, *messages[1:]], None, numbers)


def argument_types(tools: str) -> dict[tuple[str, str], Any]:
    """(name of a tool, name of an argument) -> the type that its JSON schema says."""
    types = {}
    for tool in json.loads(tools):
        function = tool.get("function", tool)
        properties = (function.get("parameters") or {}).get("properties") or {}
        for name, schema in properties.items():
            types[function["name"], name] = schema.get("type") if isinstance(schema, dict) else None
    return types


def parse_tagged_call(text: str, types: Mapping[tuple[str, str], Any]) -> ToolCall:
    """
    The call in the text between `<tool_call>` and `</tool_call>`.

    A value is JSON, unless its type in `types` is "string" or it is no JSON.
    """
    name = text.partition("<arg_key>")[0].strip()
    arguments = {}
    for key, value in _TAGGED_ARGUMENT.findall(text):
        if types.get((name, key)) != "string":
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(value)
        arguments[key] = value
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def python_call(arguments: str) -> str:
    """The JSON text of a call's arguments as the line of Python that ChatGLM3-6B writes."""
    values = json.loads(arguments)
    if all(name.isidentifier() and not iskeyword(name) for name in values):
        return f"tool_call({', '.join(f'{name}={value!r}' for name, value in values.items())})"
    return f"tool_call(**{values!r})"
