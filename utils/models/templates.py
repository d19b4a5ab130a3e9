"""Row or chat -> input_ids and labels. The only place that knows prompt templates, for training and inference."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

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
from utils.models.tokenization_chatglm import ChatGLMTokenizer
from utils.models.tokenization_chatglm2 import CHATGLM2_PREFIX, ChatGLM2Tokenizer, ChatGLM3Tokenizer


def fold_system(messages: Sequence[Message]) -> Sequence[Message]:
    """For a template without system turns: the system text before the first user's, a newline between."""
    if messages[0].role != "system":
        return messages
    system, first, *others = messages
    return [first._replace(content=f"{system.content}\n{first.content}"), *others]


class ChatGLMTemplate:
    """
    ChatGLM-6B: `prompt [gMASK] <sop> target <eop>`; the bare question, or numbered rounds once there is a history.

    Source: `ChatGLMForConditionalGeneration.chat` of THUDM/chatglm-6b.
    """

    name = "native"
    ids_version = 1  # of the ids that texts become; a new one refuses datasets made with the one before
    round_form = "[Round {i}]\n问：{question}\n答：{answer}\n"
    first_round = 0
    answer_mark = "\n答："
    system_turns = False  # whether a system message is a turn of its own

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt as text."""
        messages = fold_system(messages)
        return messages[0].content if len(messages) == 1 else self.rounds(messages)

    def rounds(self, messages: Sequence[Message]) -> str:
        turns = [message.content for message in messages]
        last = len(turns) // 2
        history = "".join(
            self.round_form.format(i=i + self.first_round, question=turns[2 * i], answer=turns[2 * i + 1])
            for i in range(last)
        )
        final = self.round_form.format(i=last + self.first_round, question=turns[-1], answer="")
        return history + final.rstrip("\n")

    def encoded_prompt(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> EncodedText:
        return encode_many(tokenizer, [self.unencoded_prompt(tokenizer, messages)])[0]

    def chat(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
        """
        The ids of a conversation and nothing after its last message.

        After a question that is the whole prompt: its closing belongs to the question. An answer's ids follow the
        prompt that it answers, without the token that ends it.
        """
        if messages[-1].role != "assistant":
            return self.encoded_prompt(tokenizer, messages).ids()
        return self.encoded_prompt(tokenizer, messages[:-1]).ids() + encode_text(tokenizer, messages[-1].content)

    def check_roles(self, messages: Sequence[Message]) -> None:
        """
        Raises:
            ValueError: the messages are not an optional system message, then user and assistant in turn.
        """
        start = 1 if messages[0].role == "system" else 0
        if start == len(messages):
            raise ValueError("message 1: a system message alone is no chat: a user's message must follow it")
        for number, message in enumerate(messages[start:]):
            expected = ("user", "assistant")[number % 2]
            if message.role != expected:
                raise ValueError(
                    f"message {start + number + 1}: the role is {message.role!r}, not {expected!r}: here one optional "
                    "system message comes first, then user and assistant in turn"
                )

    def check_is_question(self, messages: Sequence[Message]) -> None:
        """
        Raises:
            ValueError: the last message is an answer, so the model has nothing to answer.
        """
        if messages[-1].role == "assistant":
            raise ValueError(
                f"message {len(messages)}: the role is 'assistant', and this generation can only answer a user: pass "
                "add_generation_prompt=False, or end with the user's message"
            )

    def unencoded_prompt(
        self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], untrained: Collection[int] = ()
    ) -> UnencodedText:
        """`untrained` numbers the answers in `messages` that training on every turn leaves out."""
        text = self.render(messages)
        opening, closing = computed_once(tokenizer, "frame", lambda: self.frame(tokenizer))
        return UnencodedText(opening, text, self.answer_mark if text.endswith(self.answer_mark) else "", closing)

    def frame(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[TokenSpan], TokenSpan]:
        """The special tokens before and after a prompt that is one text."""
        ids = [tokenizer.gmask_token_id, tokenizer.bos_token_id]
        return [], TokenSpan(np.array(ids, np.int32))

    def unencoded_target(self, tokenizer: PreTrainedTokenizerBase, text: str) -> UnencodedText:
        return UnencodedText([], text, "", self.stop_span(tokenizer))

    def single_turn(self, tokenizer: PreTrainedTokenizerBase) -> tuple[UnencodedText, UnencodedText]:
        """
        What stands round the texts of any row of one turn: the drafts of an empty prompt and target. The prompt's text
        is `render` of it, and every span of the openings is tokens.
        """
        empty = (Message("user", ""),)
        return computed_once(
            tokenizer,
            (type(self), "single turn"),
            lambda: (self.unencoded_prompt(tokenizer, empty), self.unencoded_target(tokenizer, "")),
        )

    def stop_span(self, tokenizer: PreTrainedTokenizerBase) -> TokenSpan:
        """The token that ends a target."""
        return computed_once(
            tokenizer, "stop", lambda: TokenSpan(np.array(self.stop_ids(tokenizer)[:1], np.int32), True)
        )

    def training_rows(self, row: Conversation) -> list[Conversation]:
        """
        The rows whose examples together have every trained assistant turn as a target: here one a turn. The prompt of
        ChatGLM-6B sees itself in both directions, so nothing can be learnt inside it; and that of ChatGLM2 and of
        alpaca is one text, in which an answer's tokens and those round it may be one.
        """
        return [row.first_messages(end) for end in row.trained_ends]

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Tokens that end an answer; a target ends with the first."""
        return [tokenizer.eos_token_id]

    def clean(self, answer: str) -> str:
        return answer


class ChatGLM2Template(ChatGLMTemplate):
    """
    ChatGLM2-6B: `[gMASK] sop prompt target </s>`, the prompt always in numbered rounds.

    Source: `build_prompt` of THUDM/chatglm2-6b's tokenizer.
    """

    round_form = "[Round {i}]\n\n问：{question}\n\n答：{answer}\n\n"
    first_round = 1
    answer_mark = "\n\n答："

    def render(self, messages: Sequence[Message]) -> str:
        return self.rounds(fold_system(messages))

    def frame(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[TokenSpan], TokenSpan]:
        return [token_span(tokenizer, *CHATGLM2_PREFIX)], NO_TOKENS


class ChatGLM3Template(ChatGLMTemplate):
    """
    ChatGLM3-6B: `[gMASK] sop <|user|> \\n prompt <|assistant|> \\n target </s>`. A system message is a turn of its own
    before the user's: `<|system|> \\n text`.

    Source: `build_chat_input` of THUDM/chatglm3-6b's tokenizer; each newline is encoded apart from the text.
    """

    prefix = ("[gMASK]", "sop")
    system_turns = True

    def render(self, messages: Sequence[Message]) -> str:
        if len(messages) == 1:
            return messages[0].content
        return "".join(f"<|{message.role}|>\n{message.content}" for message in messages) + "<|assistant|>"

    def unencoded_prompt(
        self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], untrained: Collection[int] = ()
    ) -> UnencodedText:
        newline = encode_template_text(tokenizer, "\n")
        spans, answered = [token_span(tokenizer, *self.prefix)], False
        for number, message in enumerate(messages):
            answers = message.role == "assistant" and number not in untrained
            # The role token of the user's next turn is what ends an answer.
            role = token_span(tokenizer, f"<|{message.role}|>")
            spans += (TokenSpan(role.ids, answered), TokenSpan(newline, answers), TextSpan(message.content, answers))
            answered = answers
        return UnencodedText(spans[:-1], messages[-1].content, "", token_span(tokenizer, "<|assistant|>"))

    def chat(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation without the `<|assistant|>` that a prompt ends with."""
        return self.encoded_prompt(tokenizer, messages)._replace(closing=NO_TOKENS).ids()

    def check_roles(self, messages: Sequence[Message]) -> None:
        """Accepts any order of roles, as the released template does."""

    def check_is_question(self, messages: Sequence[Message]) -> None:
        """Accepts an answer at the end, as the released template does: `<|assistant|>` follows it."""

    def frame(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[TokenSpan], TokenSpan]:
        return [token_span(tokenizer, *self.prefix)], NO_TOKENS

    def unencoded_target(self, tokenizer: PreTrainedTokenizerBase, text: str) -> UnencodedText:
        newline = computed_once(tokenizer, "newline", lambda: TokenSpan(encode_template_text(tokenizer, "\n"), True))
        return UnencodedText([newline], text, "", self.stop_span(tokenizer))

    def training_rows(self, row: Conversation) -> list[Conversation]:
        # Turns are encoded apart, and a token sees what is before it alone: one example has them all.
        return [row.first_messages(row.trained_ends[-1])]

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return [tokenizer.eos_token_id, *token_ids(tokenizer, "<|user|>", "<|observation|>")]

    def clean(self, answer: str) -> str:
        return answer.strip()  # the newline after <|assistant|> is the model's to write


class GLM4Template(ChatGLM3Template):
    """
    GLM-4-9B: `[gMASK] <sop> <|user|> \\n prompt <|assistant|> \\n target <|user|>`; a turn ends where the next begins.

    Source: `apply_chat_template` of THUDM/glm-4-9b-chat's tokenizer.
    """

    prefix = ("[gMASK]", "<sop>")
    ids_version = 2  # in version 1 the tokenizer lacked most of tiktoken's merges: other ids in 40 % of Chinese rows

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return token_ids(tokenizer, "<|user|>", "<|endoftext|>", "<|observation|>")


class AlpacaTemplate(ChatGLMTemplate):
    """
    The English frame that the first BELLE training script of this toolkit put round a row, between the special tokens
    of the tokenizer's own generation: its "paired with an input" form, which a row with a prompt got, and which has no
    instruction of its own. An earlier turn stands before the last one in the same form.
    """

    name = "alpaca"
    opening = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
    )
    turn_form = "### Input:\n{question}\n\n### Response:"
    answer_mark = "\n\n### Response:"

    def __init__(self, native: ChatGLMTemplate):
        self.native, self.ids_version = native, native.ids_version

    def render(self, messages: Sequence[Message]) -> str:
        turns = [
            self.turn_form.format(question=message.content) if message.role == "user" else f"{message.content}\n\n"
            for message in fold_system(messages)
        ]
        return self.opening + "".join(turns)

    def frame(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[TokenSpan], TokenSpan]:
        return self.native.frame(tokenizer)

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return self.native.stop_ids(tokenizer)

    def clean(self, answer: str) -> str:
        return answer.strip()


TEMPLATES = (ChatGLMTemplate.name, AlpacaTemplate.name)


def template_for(tokenizer: PreTrainedTokenizerBase, name: str = ChatGLMTemplate.name) -> ChatGLMTemplate:
    """The template `name`, one of TEMPLATES, in the form that the tokenizer's generation gives it."""
    native = GLM4Template()
    for tokenizer_class, template in (
        (ChatGLMTokenizer, ChatGLMTemplate),
        (ChatGLM3Tokenizer, ChatGLM3Template),
        (ChatGLM2Tokenizer, ChatGLM2Template),
    ):
        if isinstance(tokenizer, tokenizer_class):
            native = template()
            break
    return AlpacaTemplate(native) if name == AlpacaTemplate.name else native


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: ChatGLMTemplate | None = None
) -> list[int]:
    """The input of generation; without a template, in that of the tokenizer's generation."""
    return (template or template_for(tokenizer)).encoded_prompt(tokenizer, messages).ids()


ROLES = ("system", "user", "assistant")
UNSUPPORTED_KEYS = ("tools", "tool_calls", "metadata")  # of a message: released templates make tokens of them


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    **options: Any,
) -> list[int]:
    """
    The token ids of a chat in the native template of the tokenizer's generation.

    Contents are plain text: `<|user|>` in one is no role token. An empty content keeps its role token.

    Args:
        tokenizer: what `load_tokenizer` returns.
        messages: `{"role": "system" | "user" | "assistant", "content": text}`, the oldest first. ChatGLM3-6B and
            GLM-4-9B take any order of roles; ChatGLM-6B and ChatGLM2-6B an optional system message, then user and
            assistant in turn. Keys that no template of the family reads, such as "name", have no effect.
        add_generation_prompt: True gives the ids that generation starts from, those of `encode_prompt`. False gives
            the chat and nothing after its last message, as the released templates do: no template writes a token
            that ends an answer. ChatGLM3-6B and GLM-4-9B then lack the final `<|assistant|>`. ChatGLM-6B and
            ChatGLM2-6B have no form of a question without its closing (`答：`, `[gMASK] <sop>`), so a chat that ends
            with the user has the same ids either way; an answer's ids follow the prompt that it answers.
        options: variables of the chat template, such as `enable_thinking`. As in transformers, a template ignores
            those that it does not know; those of these four generations know none.

    Returns:
        Token ids, the special tokens that open the chat included.

    Raises:
        ValueError: no messages; or a message, named by its number from 1, that is no mapping, lacks a key, has an
            unknown role, a content that is no text, or tools (`UNSUPPORTED_KEYS`); or roles in an order that the
            generation has no form for, which for ChatGLM-6B and ChatGLM2-6B includes an answer as the last message
            with `add_generation_prompt`.
    """
    if not messages:
        raise ValueError("messages is empty: a chat has at least one message")
    chat = [_checked_message(number, message) for number, message in enumerate(messages, start=1)]
    template = template_for(tokenizer)
    template.check_roles(chat)
    if not add_generation_prompt:
        return template.chat(tokenizer, chat)
    template.check_is_question(chat)
    return encode_prompt(tokenizer, chat, template)


def _checked_message(number: int, message: Mapping[str, Any]) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number}: it is a {type(message).__name__}, not a dict of role and content")
    for key in ("role", "content"):
        if key not in message:
            raise ValueError(f"message {number}: it has no {key!r}: a message is a dict of role and content")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"message {number}: the role is {role!r:.60}, not one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"message {number}: the content is a {type(content).__name__}, not a text")
    for key in UNSUPPORTED_KEYS:
        if message.get(key):
            raise ValueError(f"message {number}: {key!r} is not supported: put the text in the content")
    return Message(role, content)
