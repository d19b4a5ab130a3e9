"""
The base of chat templates whose turns follow role tokens: ChatGLM3-6B, GLM-4-9B and all later ones.

A conversation becomes the pieces that the released template is made of (`utils/models/chat_renderers.py`), and the
pieces become tokens, with what the model writes itself marked as trained. `utils/models/turn_formats.py` has a class
for each generation.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from utils.models.chat_formats import ChatTemplate, only_trained
from utils.models.chat_pieces import Piece
from utils.models.chat_renderers import render_pieces
from utils.models.conversation import Conversation, Message, ToolCall
from utils.models.token_spans import (
    NO_TOKENS,
    TextSpan,
    TokenSpan,
    UnencodedText,
    encode_many,
    encode_template_text,
    token_ids,
    token_span,
)
from utils.models.tokenization_glm4 import ChatGLM4Tokenizer

ASSISTANT, OBSERVATION = "<|assistant|>", "<|observation|>"


class ReleasedChat(NamedTuple):
    """A conversation in the form that the released template takes."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    numbers: list[int]  # of the message of the conversation that each of `messages` comes from


class TurnTemplate(ChatTemplate):
    """
    Turns between role tokens: `[gMASK] <sop> <|user|> question <|assistant|> answer <|user|>`.

    The next role token ends what the model writes: `<|observation|>` a call of a tool, `<|user|>` an answer.
    """

    renderer: str  # name of the generation in utils/models/chat_renderers.py
    has_system_role = True
    has_tools = True
    joins_texts = True  # whether neighbouring texts are one text for the tokenizer
    opening_tokens = ChatGLM4Tokenizer.opening_tokens

    def released_chat(self, conversation: Conversation) -> ReleasedChat:
        """
        The conversation as ChatGLM3-6B to GLM-Z1 take it.

        A call is a message of its own: its `metadata` is the tool's name, its content the arguments. The role of a
        result is "observation".
        """
        chat = ReleasedChat([], json.loads(conversation.tools) if conversation.tools else None, [])
        for number, message in enumerate(conversation.messages):
            role = "observation" if message.role == "tool" else message.role
            released = (
                [{"role": role, "content": message.content}] if message.content or not message.tool_calls else []
            )
            released += [
                {"role": role, "metadata": call.name, "content": call.arguments} for call in message.tool_calls
            ]
            chat.messages.extend(released)
            chat.numbers.extend([number] * len(released))
        return chat

    def pieces(self, conversation: Conversation, add_generation_prompt: bool) -> list[Piece]:
        """
        The pieces of the released template; `Piece.message` counts the messages of `conversation`.

        Raises:
            ValueError: the released template errs.
        """
        messages, tools, numbers = self.released_chat(conversation)
        options = self.options | dict(conversation.options)
        return [
            piece if piece.message is None else piece._replace(message=numbers[piece.message])
            for piece in self.render_released(messages, tools, add_generation_prompt, options)
        ]

    def render_released(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
        options: dict[str, Any],
    ) -> list[Piece]:
        """The pieces of messages in the form of the released template; raises ValueError where that errs."""
        return render_pieces(self.renderer, messages, tools, add_generation_prompt, options)

    def target_pieces(self, row: Conversation, prompt: Sequence[Piece]) -> list[Piece]:
        """
        What the model writes in the row's last message, behind the pieces of its prompt.

        Raises:
            ValueError: the template opens this answer in another way than the prompt ends, or leaves it out.
        """
        last = len(row.messages) - 1
        pieces = self.pieces(row, add_generation_prompt=False)
        start = next((index for index, piece in enumerate(pieces) if piece.message == last), None)
        if start is None:
            raise ValueError("its answer is blank")
        opening = _last_turn(pieces[:start])
        if [piece.text for piece in opening] != [piece.text for piece in _last_turn(prompt)]:
            raise ValueError("thinking is on, and its answer has no reasoning: turn thinking off for it")
        return pieces[start:]

    def spans(
        self, tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece], trained: Sequence[int]
    ) -> list[TextSpan | TokenSpan]:
        """
        The pieces as spans; what the model writes in the messages `trained` is marked.

        So is the token after such a message, which ends it.
        """
        spans: list[TextSpan | TokenSpan] = []
        after_trained = False
        for text, is_token, message in pieces:
            is_trained = message in trained
            if is_token:
                token = token_span(tokenizer, text)
                spans.append(TokenSpan(token.ids, is_trained or after_trained))
            elif not self.joins_texts:
                metadata, newline, content = text.partition("\n")
                if metadata:
                    spans.append(TextSpan(f"{metadata}\n", is_trained))
                else:
                    spans.append(TokenSpan(encode_template_text(tokenizer, newline), is_trained))
                spans.append(TextSpan(content, is_trained))
            elif spans and _continues(spans[-1], is_trained):
                spans[-1] = TextSpan(spans[-1].text + text, is_trained)
            else:
                spans.append(TextSpan(text, is_trained))
            after_trained = is_trained
        return spans

    def single_turn_texts(self, row: Conversation) -> tuple[str, str] | None:
        texts = super().single_turn_texts(row)
        return (f"\n{texts[0]}", f"\n{texts[1]}") if self.joins_texts and texts else texts

    def render(self, prompt: Conversation) -> str:
        messages, tools, _ = prompt
        if len(messages) == 1 and not tools:
            return messages[0].content
        text = "".join(piece.text for piece in self.pieces(prompt, add_generation_prompt=True))
        return text.removeprefix("".join(self.opening_tokens))

    def unencoded_prompt(self, tokenizer: PreTrainedTokenizerBase, prompt: Conversation) -> UnencodedText:
        trained = [number for number, message in enumerate(prompt.messages) if message.trained]
        return self._unencoded_prompt(tokenizer, self.pieces(prompt, add_generation_prompt=True), trained)

    def _unencoded_prompt(
        self, tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece], trained: Sequence[int]
    ) -> UnencodedText:
        closing = _last_turn(pieces)
        spans = self.spans(tokenizer, pieces[: len(pieces) - len(closing)], trained)
        closing_spans = self.spans(tokenizer, closing, ())
        while spans and isinstance(spans[-1], TokenSpan):  # </tool_response>, /nothink
            closing_spans.insert(0, spans.pop())
        closing_ids = [
            encode_template_text(tokenizer, span.text) if isinstance(span, TextSpan) else span.ids
            for span in closing_spans
        ]
        text = spans.pop().text if spans else ""  # else a question without text
        return UnencodedText(spans, text, "", TokenSpan(np.concatenate(closing_ids)))

    def unencoded_row(
        self, tokenizer: PreTrainedTokenizerBase, row: Conversation
    ) -> tuple[UnencodedText, UnencodedText]:
        *earlier, last = range(len(row.messages))
        pieces = self.pieces(row._replace(messages=row.prompt), add_generation_prompt=True)
        spans = self.spans(tokenizer, self.target_pieces(row, pieces), [last])
        trained = [number for number in earlier if row.messages[number].trained]
        prompt = self._unencoded_prompt(tokenizer, pieces, trained)
        text = ""
        if row.messages[-1].tool_calls:  # a call that is cut short is no call
            ending = TokenSpan(token_span(tokenizer, OBSERVATION).ids, trained=True)
        else:
            ending = self.stop_span(tokenizer)
            if isinstance(spans[-1], TextSpan):
                text = spans.pop().text
        return prompt, UnencodedText(spans, text, "", ending)

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return token_ids(tokenizer, "<|user|>", "<|endoftext|>", OBSERVATION)

    def training_rows(self, row: Conversation, trained: Sequence[int]) -> list[Conversation]:
        # One has them all: turns are encoded apart, and a token sees only what precedes it.
        return [only_trained(row, trained)]

    def encoded_chat(self, tokenizer: PreTrainedTokenizerBase, chat: Conversation) -> list[int]:
        """The ids of a conversation, without the start of an answer."""
        return self.encoded_pieces(tokenizer, self.pieces(chat, add_generation_prompt=False))

    def encoded_pieces(self, tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece]) -> list[int]:
        """The ids of pieces."""
        spans = UnencodedText(self.spans(tokenizer, pieces, ()), "", "", NO_TOKENS)
        return encode_many(tokenizer, [spans])[0].ids()

    def separator_id(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        return token_ids(tokenizer, ASSISTANT)[0]

    def check_roles(self, messages: Sequence[Message], add_generation_prompt: bool) -> None:
        """Accept every order, as the released template does."""

    def clean(self, answer: str) -> str:
        return answer.strip()  # the model writes the newline after <|assistant|>

    def parse_answer(self, texts: Sequence[str], tools: str) -> Message:
        calls = [self.parse_call(text) if tools else None for text in texts]
        contents = [text for text, call in zip(texts, calls, strict=True) if call is None]
        return Message("assistant", self.clean("".join(contents)), tool_calls=tuple(call for call in calls if call))

    def parse_call(self, text: str) -> ToolCall | None:
        """The call in a text of the form `name \\n arguments`; None for another text."""
        name, _, arguments = text.partition("\n")
        name, arguments = name.strip(), self.parse_arguments(arguments.strip())
        return ToolCall(name, arguments) if name and arguments is not None else None

    def parse_arguments(self, text: str) -> str | None:
        """The JSON text of a call's arguments, None if they are none."""
        try:
            return text if isinstance(json.loads(text), dict) else None
        except (ValueError, RecursionError):
            return None


def _last_turn(pieces: Sequence[Piece]) -> Sequence[Piece]:
    """The pieces from the last `<|assistant|>` on."""
    for index in range(len(pieces) - 1, -1, -1):
        if pieces[index].is_token and pieces[index].text == ASSISTANT:
            return pieces[index:]
    return []


def _continues(span: TextSpan | TokenSpan, is_trained: bool) -> bool:
    """Whether a text behind `span` is part of it."""
    return isinstance(span, TextSpan) and span.trained == is_trained
