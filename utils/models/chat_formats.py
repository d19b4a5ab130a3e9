"""
How each generation writes a conversation: which special tokens and phrases stand around the messages.

`utils/models/templates.py` picks the class of a tokenizer's generation (its row in `utils/models/family.py` names it)
and encodes chats with it; `utils/data/encode.py` makes training rows of the same pieces. So training and inference
share one form. A template makes token ids itself, rather than one text for the tokenizer, because a text may spell a
special token, and because truncation must not cut the template's own tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from utils.models.conversation import Conversation, Message
from utils.models.token_spans import (
    NO_TOKENS,
    EncodedText,
    TextSpan,
    TokenSpan,
    UnencodedText,
    computed_once,
    encode_many,
    encode_template_text,
    encode_text,
    token_ids,
    token_span,
)
from utils.models.tokenization_chatglm2 import ChatGLM2Tokenizer
from utils.models.tokenization_glm4 import ChatGLM4Tokenizer


class ChatTemplate(ABC):
    """
    The form of a conversation; a training row is the encoded prompt and the encoded target.

    In every method `tokenizer` is one of the template's own generation.
    """

    name = "native"  # the other template is "alpaca", see below
    ids_version = 1  # increment when the same texts get other ids: older datasets are then refused
    has_system_role = False  # whether a system message has a role token; else its text precedes the first question
    opening_tokens: tuple[str, ...] = ()  # special tokens that open every conversation
    prompt_ending = ""  # of `render`, which truncation must keep; "" if special tokens end a prompt

    @abstractmethod
    def render(self, messages: Sequence[Message]) -> str:
        """The prompt's text: what a one-text template encodes, and what answer files show."""

    @abstractmethod
    def unencoded_prompt(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> UnencodedText:
        """
        The pieces of a prompt; `messages` end with the question."""

    @abstractmethod
    def unencoded_target(self, tokenizer: PreTrainedTokenizerBase, text: str) -> UnencodedText:
        """The pieces of an answer that is trained on, with the token that ends it."""

    @abstractmethod
    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens that end an answer; a target ends with the first."""

    @abstractmethod
    def training_rows(self, row: Conversation) -> list[Conversation]:
        """The conversations whose examples together have every trained answer of `row` as a target."""

    @abstractmethod
    def encoded_chat(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation and nothing after its last message."""

    @abstractmethod
    def check_roles(self, messages: Sequence[Message], add_generation_prompt: bool) -> None:
        """
        Args:
            add_generation_prompt: whether the model is to answer.

        Raises:
            ValueError: the generation has no form for messages in this order.
        """

    def clean(self, answer: str) -> str:
        """The text that a user gets of a decoded answer."""
        return answer

    def encoded_prompt(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> EncodedText:
        """A prompt as tokens."""
        return encode_many(tokenizer, [self.unencoded_prompt(tokenizer, messages)])[0]

    def single_turn(self, tokenizer: PreTrainedTokenizerBase) -> tuple[UnencodedText, UnencodedText]:
        """
        The tokens of every row of one turn: an empty question and answer.

        Such a row's prompt text is `render` of its question, and all spans in both openings are tokens.
        """
        empty_question = (Message("user", ""),)
        return computed_once(
            tokenizer,
            (type(self), "single turn"),
            lambda: (self.unencoded_prompt(tokenizer, empty_question), self.unencoded_target(tokenizer, "")),
        )

    def stop_span(self, tokenizer: PreTrainedTokenizerBase) -> TokenSpan:
        """The token that ends a target."""
        return computed_once(
            tokenizer, "stop", lambda: TokenSpan(np.array(self.stop_ids(tokenizer)[:1], np.int32), trained=True)
        )


class OneTextTemplate(ChatTemplate):
    """A template whose prompt is one text between special tokens, encoded at once."""

    @abstractmethod
    def special_tokens_around(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[TokenSpan], TokenSpan]:
        """The special tokens before and after a prompt's text."""

    def unencoded_prompt(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> UnencodedText:
        text = self.render(messages)
        opening, closing = computed_once(tokenizer, "around", lambda: self.special_tokens_around(tokenizer))
        return UnencodedText(opening, text, self.prompt_ending if text.endswith(self.prompt_ending) else "", closing)

    def unencoded_target(self, tokenizer: PreTrainedTokenizerBase, text: str) -> UnencodedText:
        return UnencodedText([], text, "", self.stop_span(tokenizer))

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return [tokenizer.eos_token_id]

    def training_rows(self, row: Conversation) -> list[Conversation]:
        # One a turn. The prompt of ChatGLM-6B sees itself in both directions, so nothing can be learnt inside it; in
        # the one text of the others, the tokens of an answer may reach into what stands beside it.
        return [row.first_messages(number + 1) for number in row.trained_messages("every")]

    def encoded_chat(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
        """
        The ids of a conversation.

        After a question that is the whole prompt: its closing belongs to the question. An answer's ids follow the
        prompt that it answers, without the token that ends it.
        """
        if messages[-1].role != "assistant":
            return self.encoded_prompt(tokenizer, messages).ids()
        return self.encoded_prompt(tokenizer, messages[:-1]).ids() + encode_text(tokenizer, messages[-1].content)

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

    def render(self, messages: Sequence[Message]) -> str:
        messages = fold_system(messages)
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

    def render(self, messages: Sequence[Message]) -> str:
        return self.render_rounds(fold_system(messages))

    def special_tokens_around(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[TokenSpan], TokenSpan]:
        return [token_span(tokenizer, *self.opening_tokens)], NO_TOKENS


class ChatGLM3Template(ChatTemplate):
    """
    ChatGLM3-6B: `[gMASK] sop <|user|> \\n prompt <|assistant|> \\n target </s>`.

    A system message is a turn of its own before the user's: `<|system|> \\n text`. Source: `build_chat_input` of
    THUDM/chatglm3-6b's tokenizer; each newline is encoded apart from the text.
    """

    opening_tokens = ChatGLM2Tokenizer.opening_tokens
    has_system_role = True

    def render(self, messages: Sequence[Message]) -> str:
        if len(messages) == 1:
            return messages[0].content
        return "".join(f"<|{message.role}|>\n{message.content}" for message in messages) + "<|assistant|>"

    def unencoded_prompt(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> UnencodedText:
        newline = encode_template_text(tokenizer, "\n")
        spans, after_trained = [token_span(tokenizer, *self.opening_tokens)], False
        for message in messages:
            trained = message.role == "assistant" and message.trained is not False
            role = token_span(tokenizer, f"<|{message.role}|>")
            # The role token after an answer is what ends it, so it is trained with the answer.
            spans += [
                TokenSpan(role.ids, after_trained),
                TokenSpan(newline, trained),
                TextSpan(message.content, trained),
            ]
            after_trained = trained
        return UnencodedText(spans[:-1], messages[-1].content, "", token_span(tokenizer, "<|assistant|>"))

    def unencoded_target(self, tokenizer: PreTrainedTokenizerBase, text: str) -> UnencodedText:
        newline = computed_once(
            tokenizer, "trained newline", lambda: TokenSpan(encode_template_text(tokenizer, "\n"), trained=True)
        )
        return UnencodedText([newline], text, "", self.stop_span(tokenizer))

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return [tokenizer.eos_token_id, *token_ids(tokenizer, "<|user|>", "<|observation|>")]

    def training_rows(self, row: Conversation) -> list[Conversation]:
        # One has them all: turns are encoded apart, and a token sees only what precedes it.
        return [row.first_messages(row.trained_messages("every")[-1] + 1)]

    def encoded_chat(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation: a prompt without its final `<|assistant|>`."""
        return self.encoded_prompt(tokenizer, messages)._replace(closing=NO_TOKENS).ids()

    def check_roles(self, messages: Sequence[Message], add_generation_prompt: bool) -> None:
        """Accept every order, as the released template does."""

    def clean(self, answer: str) -> str:
        return answer.strip()  # the model writes the newline after <|assistant|>


class GLM4Template(ChatGLM3Template):
    """
    GLM-4-9B: `[gMASK] <sop> <|user|> \\n prompt <|assistant|> \\n target <|user|>`.

    The next role token ends an answer. Source: `apply_chat_template` of THUDM/glm-4-9b-chat's tokenizer.
    """

    opening_tokens = ChatGLM4Tokenizer.opening_tokens
    ids_version = 2  # in version 1 the tokenizer lacked most of tiktoken's merges: other ids in 40 % of Chinese rows

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return token_ids(tokenizer, "<|user|>", "<|endoftext|>", "<|observation|>")


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
        self.native = native
        self.ids_version, self.opening_tokens = native.ids_version, native.opening_tokens

    def render(self, messages: Sequence[Message]) -> str:
        turns = [
            self.question_form.format(question=message.content) if message.role == "user" else f"{message.content}\n\n"
            for message in fold_system(messages)
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
