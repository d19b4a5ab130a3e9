"""
Chat templates as token ids: what a template is, and the forms that are one text (ChatGLM-6B, ChatGLM2-6B, alpaca).

`utils/models/templates.py` picks the class of a tokenizer's generation (its row in `utils/models/family.py` names it)
and encodes chats with it; `utils/data/encode.py` makes training rows of the same pieces. So training and inference
share one form. The generations with role tokens are in `utils/models/turn_formats.py`. A template makes token ids
itself, rather than one text for the tokenizer, because a text may spell a special token, and because truncation must
not cut the template's own tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from utils.models.conversation import Conversation, Message
from utils.models.token_spans import (
    NO_TOKENS,
    EncodedText,
    TokenSpan,
    UnencodedText,
    computed_once,
    encode_many,
    encode_text,
    token_span,
)
from utils.models.tokenization_chatglm2 import ChatGLM2Tokenizer


class ChatTemplate(ABC):
    """
    The form of a conversation; a training row is the encoded prompt and the encoded target.

    In every method `tokenizer` is one of the template's own generation, and a prompt is a conversation that ends with
    a message for the assistant to answer.

    Args:
        options: variables of the released template, such as `enable_thinking`; a conversation's own come first.
    """

    name = "native"  # the other template is "alpaca", see below
    ids_version = 1  # increment when the same texts get other ids: older datasets are then refused
    has_system_role = False  # whether a system message has a role token; else its text precedes the first question
    has_tools = False  # whether there is a form of tools, their calls and results
    has_reasoning = False  # whether there is a form of reasoning before an answer
    known_options: tuple[str, ...] = ()  # names of `options` that have an effect
    opening_tokens: tuple[str, ...] = ()  # special tokens that open every conversation
    prompt_ending = ""  # of `render`, which truncation must keep; "" if special tokens end a prompt

    def __init__(self, options: Mapping[str, Any] | None = None):
        self.options = dict(options or {})

    @abstractmethod
    def render(self, prompt: Conversation) -> str:
        """The prompt's text: what a one-text template encodes, and what answer files show."""

    @abstractmethod
    def unencoded_prompt(self, tokenizer: PreTrainedTokenizerBase, prompt: Conversation) -> UnencodedText:
        """
        The pieces of a prompt.

        Earlier answers that are `trained` are marked so where the template encodes them apart.
        """

    @abstractmethod
    def unencoded_row(
        self, tokenizer: PreTrainedTokenizerBase, row: Conversation
    ) -> tuple[UnencodedText, UnencodedText]:
        """
        The pieces of a training row: its prompt, and its last message with the token that ends it.

        Raises:
            ValueError: the template's options contradict the row.
        """

    @abstractmethod
    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens that end an answer; the target of an answer without calls ends with the first."""

    @abstractmethod
    def training_rows(self, row: Conversation, trained: Sequence[int]) -> list[Conversation]:
        """
        The rows whose examples together train on the messages with the numbers `trained`, each once.

        Each row ends with a message that is trained on; in each, `Message.trained` of all the assistant's messages
        says whether they are.
        """

    @abstractmethod
    def encoded_chat(self, tokenizer: PreTrainedTokenizerBase, chat: Conversation) -> list[int]:
        """The ids of a conversation and nothing after its last message."""

    @abstractmethod
    def check_roles(self, messages: Sequence[Message], add_generation_prompt: bool) -> None:
        """
        Args:
            add_generation_prompt: whether the model is to answer.

        Raises:
            ValueError: the generation has no form for messages in this order.
        """

    def check_expressible(self, conversation: Conversation) -> None:
        """
        Check that the template has a form of everything in a conversation.

        Raises:
            ValueError: it has tools or reasoning, which this generation has no form of.
        """
        if not self.has_tools and (
            conversation.tools
            or any(message.tool_calls or message.role == "tool" for message in conversation.messages)
        ):
            raise ValueError("it has tools, and the chats of this model have no form of them")
        if not self.has_reasoning and any(message.reasoning for message in conversation.messages):
            raise ValueError(
                "it has reasoning, and the chats of this model have no form of it: remove it, or write it into the "
                "answer's text"
            )

    def clean(self, answer: str) -> str:
        """The text that a user gets of a decoded answer."""
        return answer

    def separator_id(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """The token that the model writes between the parts of an answer, if its calls are parts of their own."""
        return None

    def parse_answer(self, texts: Sequence[str], tools: str) -> Message:
        """
        The message that a decoded answer is.

        Args:
            texts: the answer, split at `separator_id`.
            tools: JSON text of the tools that the prompt offers; "": none, and nothing is read as a call.
        """
        return Message("assistant", self.clean("".join(texts)))

    def encoded_prompt(self, tokenizer: PreTrainedTokenizerBase, prompt: Conversation) -> EncodedText:
        """A prompt as tokens."""
        return encode_many(tokenizer, [self.unencoded_prompt(tokenizer, prompt)])[0]

    def single_turn_texts(self, row: Conversation) -> tuple[str, str] | None:
        """
        The texts of question and answer, between which all rows of one turn have the tokens of `single_turn`.

        None if this row has others: several turns, tools, reasoning or options.
        """
        messages, tools, options = row  # nearly every row comes here: no property, no copy
        if len(messages) != 2 or tools or options:
            return None
        question, (_, answer, reasoning, tool_calls, _) = messages
        return None if reasoning or tool_calls else (self.render(Conversation((question,))), answer)

    def single_turn(self, tokenizer: PreTrainedTokenizerBase) -> tuple[UnencodedText, UnencodedText]:
        """The pieces of a row of one turn, whose opening and closing all such rows share."""
        row = Conversation((Message("user", "?"), Message("assistant", "!")))
        return computed_once(tokenizer, (type(self), "single turn"), lambda: self.unencoded_row(tokenizer, row))

    def stop_span(self, tokenizer: PreTrainedTokenizerBase) -> TokenSpan:
        """The token that ends the target of an answer."""
        return computed_once(
            tokenizer, "stop", lambda: TokenSpan(np.array(self.stop_ids(tokenizer)[:1], np.int32), trained=True)
        )


def only_trained(row: Conversation, trained: Sequence[int]) -> Conversation:
    """The row up to the last message in `trained`, with each of the assistant's messages marked."""
    messages = tuple(
        message._replace(trained=number in trained) if message.role == "assistant" else message
        for number, message in enumerate(row.messages[: trained[-1] + 1])
    )
    return row._replace(messages=messages)


class OneTextTemplate(ChatTemplate):
    """A template whose prompt is one text between special tokens, encoded at once."""

    @abstractmethod
    def special_tokens_around(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[TokenSpan], TokenSpan]:
        """The special tokens before and after a prompt's text."""

    def unencoded_prompt(self, tokenizer: PreTrainedTokenizerBase, prompt: Conversation) -> UnencodedText:
        text = self.render(prompt)
        opening, closing = computed_once(tokenizer, "around", lambda: self.special_tokens_around(tokenizer))
        return UnencodedText(opening, text, self.prompt_ending if text.endswith(self.prompt_ending) else "", closing)

    def unencoded_row(
        self, tokenizer: PreTrainedTokenizerBase, row: Conversation
    ) -> tuple[UnencodedText, UnencodedText]:
        prompt = self.unencoded_prompt(tokenizer, row._replace(messages=row.prompt))
        return prompt, UnencodedText([], row.messages[-1].content, "", self.stop_span(tokenizer))

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return [tokenizer.eos_token_id]

    def training_rows(self, row: Conversation, trained: Sequence[int]) -> list[Conversation]:
        # One a turn. The prompt of ChatGLM-6B sees itself in both directions, so nothing can be learnt inside it; in
        # the one text of the others, the tokens of an answer may reach into what stands beside it.
        return [only_trained(row, [number]) for number in trained]

    def encoded_chat(self, tokenizer: PreTrainedTokenizerBase, chat: Conversation) -> list[int]:
        """
        The ids of a conversation.

        After a question that is the whole prompt: its closing belongs to the question. An answer's ids follow the
        prompt that it answers, without the token that ends it.
        """
        if chat.target is None:
            return self.encoded_prompt(tokenizer, chat).ids()
        prompt = self.encoded_prompt(tokenizer, chat._replace(messages=chat.prompt)).ids()
        return prompt + encode_text(tokenizer, chat.target)

    def check_roles(self, messages: Sequence[Message], add_generation_prompt: bool) -> None:
        first = 1 if messages[0].role == "system" else 0
        if first == len(messages):
            raise ValueError("message 1: a system message alone is no chat: add a user's message")
        for number, message in enumerate(messages[first:]):
            expected = ("user", "assistant")[number % 2]
            if message.role != expected:
                raise ValueError(
                    f"message {first + number + 1}: the role is {message.role!r}, not {expected!r}: this generation "
                    "takes an optional system message, then user and assistant in turn"
                )
        if add_generation_prompt and messages[-1].role == "assistant":
            raise ValueError(
                f"message {len(messages)}: the role is 'assistant', and this generation answers a user's message: end "
                "with one, or pass add_generation_prompt=False"
            )


def fold_system(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages with the system's text, and a newline, before the first question."""
    if messages[0].role != "system":
        return messages
    system, first, *others = messages
    return [first._replace(content=f"{system.content}\n{first.content}"), *others]


class ChatGLMTemplate(OneTextTemplate):
    """
    ChatGLM-6B: `prompt [gMASK] <sop> target <eop>`.

    The prompt is the bare question, or numbered rounds after a first answer. Source:
    `ChatGLMForConditionalGeneration.chat` of THUDM/chatglm-6b.
    """

    round_form = "[Round {i}]\n问：{question}\n答：{answer}\n"
    first_round = 0
    prompt_ending = "\n答："

    def render(self, prompt: Conversation) -> str:
        messages = fold_system(prompt.messages)
        return messages[0].content if len(messages) == 1 else self.render_rounds(messages)

    def render_rounds(self, messages: Sequence[Message]) -> str:
        """Numbered rounds of question and answer; the last one ends where the answer comes."""
        turns = [message.content for message in messages]
        last = len(turns) // 2
        history = "".join(
            self.round_form.format(i=i + self.first_round, question=turns[2 * i], answer=turns[2 * i + 1])
            for i in range(last)
        )
        final = self.round_form.format(i=last + self.first_round, question=turns[-1], answer="")
        return history + final.rstrip("\n")

    def special_tokens_around(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[TokenSpan], TokenSpan]:
        ids = [tokenizer.gmask_token_id, tokenizer.bos_token_id]
        return [], TokenSpan(np.array(ids, np.int32))


class ChatGLM2Template(ChatGLMTemplate):
    """
    ChatGLM2-6B: `[gMASK] sop prompt target </s>`, the prompt always in numbered rounds.

    Source: `build_prompt` of THUDM/chatglm2-6b's tokenizer.
    """

    opening_tokens = ChatGLM2Tokenizer.opening_tokens
    round_form = "[Round {i}]\n\n问：{question}\n\n答：{answer}\n\n"
    first_round = 1
    prompt_ending = "\n\n答："

    def render(self, prompt: Conversation) -> str:
        return self.render_rounds(fold_system(prompt.messages))

    def special_tokens_around(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[TokenSpan], TokenSpan]:
        return [token_span(tokenizer, *self.opening_tokens)], NO_TOKENS


class AlpacaTemplate(OneTextTemplate):
    """
    English phrases around each turn, between the special tokens of the tokenizer's own generation.

    The first BELLE training script of this toolkit wrote rows so: Alpaca's "paired with an input" form, without an
    instruction. Earlier turns precede the last one in the same form.
    """

    name = "alpaca"
    instruction = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
    )
    question_form = "### Input:\n{question}\n\n### Response:"
    prompt_ending = "\n\n### Response:"

    def __init__(self, native: ChatTemplate):
        super().__init__()
        self.native = native
        self.ids_version, self.opening_tokens = native.ids_version, native.opening_tokens

    def render(self, prompt: Conversation) -> str:
        turns = [
            self.question_form.format(question=message.content) if message.role == "user" else f"{message.content}\n\n"
            for message in fold_system(prompt.messages)
        ]
        return self.instruction + "".join(turns)

    def special_tokens_around(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[TokenSpan], TokenSpan]:
        if isinstance(self.native, OneTextTemplate):
            return self.native.special_tokens_around(tokenizer)
        return [token_span(tokenizer, *self.opening_tokens)], NO_TOKENS

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return self.native.stop_ids(tokenizer)

    def clean(self, answer: str) -> str:
        return answer.strip()
