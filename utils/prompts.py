"""Row or chat -> input_ids and labels. The only place that knows prompt templates, for training and inference."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from utils.chatglm.tokenization_chatglm import ChatGLMTokenizer
from utils.chatglm.tokenization_chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer
from utils.rows import Message, Row, RowError

from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # labels where there is no loss
MIN_TEXT = 2  # tokens of text, one of the prompt and one of the target, below which a row teaches nothing


@dataclass(frozen=True)
class Parts:
    """A prompt or a target as tokens; truncation takes from the end of `text` alone."""

    opening: list[int]
    text: list[int]
    closing: list[int]

    def ids(self, text_tokens: int | None = None) -> list[int]:
        return [*self.opening, *self.text[:text_tokens], *self.closing]

    @property
    def fixed(self) -> int:
        return len(self.opening) + len(self.closing)


@dataclass(frozen=True)
class Example:
    """A training row as tokens: `labels` is IGNORE_INDEX on the prompt and equals `input_ids` on the target."""

    input_ids: list[int]
    labels: list[int]
    tokens_cut: int  # how many tokens of text truncation took


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text in which nothing is special: a row that spells out "<eop>" does not end the answer."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def token_ids(tokenizer: PreTrainedTokenizerBase, *tokens: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(tokens))


def split_closing(ids: list[int], closing: list[int]) -> tuple[list[int], list[int]]:
    """Cuts off the end that `ids` has in common with `closing`."""
    common = 0
    while common < min(len(ids), len(closing)) and ids[-1 - common] == closing[-1 - common]:
        common += 1
    return ids[: len(ids) - common], ids[len(ids) - common :]


class ChatGLMTemplate:
    """
    ChatGLM-6B: `prompt [gMASK] <sop> target <eop>`; the bare question, or numbered rounds once there is a history.

    Source: `ChatGLMForConditionalGeneration.chat` of THUDM/chatglm-6b.
    """

    name = "native"
    round_form = "[Round {i}]\n问：{question}\n答：{answer}\n"
    first_round = 0
    answer_mark = "\n答："

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt as text."""
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

    def prompt(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Parts:
        text = self.render(messages)
        ids, mark = encode_text(tokenizer, text), []
        if text.endswith(self.answer_mark):
            ids, mark = split_closing(ids, encode_text(tokenizer, self.answer_mark))
        return self.prompt_parts(tokenizer, ids, mark)

    def prompt_parts(self, tokenizer: PreTrainedTokenizerBase, ids: list[int], mark: list[int]) -> Parts:
        return Parts([], ids, [*mark, tokenizer.gmask_token_id, tokenizer.bos_token_id])

    def target(self, tokenizer: PreTrainedTokenizerBase, text: str) -> Parts:
        return Parts([], encode_text(tokenizer, text), self.stop_ids(tokenizer)[:1])

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
        return self.rounds(messages)

    def prompt_parts(self, tokenizer: PreTrainedTokenizerBase, ids: list[int], mark: list[int]) -> Parts:
        return Parts(tokenizer.get_prefix_tokens(), ids, mark)


class ChatGLM3Template(ChatGLMTemplate):
    """
    ChatGLM3-6B: `[gMASK] sop <|user|> \\n prompt <|assistant|> \\n target </s>`.

    Source: `build_chat_input` of THUDM/chatglm3-6b's tokenizer; each newline is encoded apart from the text.
    """

    prefix = ("[gMASK]", "sop")

    def render(self, messages: Sequence[Message]) -> str:
        if len(messages) == 1:
            return messages[0].content
        return "".join(f"<|{message.role}|>\n{message.content}" for message in messages) + "<|assistant|>"

    def prompt(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Parts:
        newline = encode_text(tokenizer, "\n")
        opening = token_ids(tokenizer, *self.prefix)
        for message in messages[:-1]:
            opening += [
                *token_ids(tokenizer, f"<|{message.role}|>"),
                *newline,
                *encode_text(tokenizer, message.content),
            ]
        opening += [*token_ids(tokenizer, f"<|{messages[-1].role}|>"), *newline]
        return Parts(opening, encode_text(tokenizer, messages[-1].content), token_ids(tokenizer, "<|assistant|>"))

    def prompt_parts(self, tokenizer: PreTrainedTokenizerBase, ids: list[int], mark: list[int]) -> Parts:
        return Parts(token_ids(tokenizer, *self.prefix), ids, mark)

    def target(self, tokenizer: PreTrainedTokenizerBase, text: str) -> Parts:
        return Parts(encode_text(tokenizer, "\n"), encode_text(tokenizer, text), self.stop_ids(tokenizer)[:1])

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
        self.native = native

    def render(self, messages: Sequence[Message]) -> str:
        turns = [
            self.turn_form.format(question=message.content) if message.role == "user" else f"{message.content}\n\n"
            for message in messages
        ]
        return self.opening + "".join(turns)

    def prompt_parts(self, tokenizer: PreTrainedTokenizerBase, ids: list[int], mark: list[int]) -> Parts:
        return self.native.prompt_parts(tokenizer, ids, mark)

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
    return (template or template_for(tokenizer)).prompt(tokenizer, messages).ids()


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    row: Row,
    max_seq_length: int | None = None,
    template: ChatGLMTemplate | None = None,
) -> Example:
    """
    Prompt and target as a template joins them (that of the tokenizer's generation unless another is given), with the
    loss on the target and its stop token.

    With `max_seq_length` (tokens) the texts are cut at their ends, the template's tokens never: the longer text gives
    first, and neither goes below half of the room unless it is shorter than that.

    Raises:
        RowError: `max_seq_length` leaves no room for text, because of the template or of a history before the prompt.
    """
    template = template or template_for(tokenizer)
    prompt, target = template.prompt(tokenizer, row.prompt), template.target(tokenizer, row.target)
    prompt_tokens, target_tokens = len(prompt.text), len(target.text)
    if max_seq_length is not None:
        room = max_seq_length - prompt.fixed - target.fixed
        if room < MIN_TEXT:
            raise RowError(f"{max_seq_length} tokens leave no room beside the template's {max_seq_length - room}")
        target_tokens = min(target_tokens, max(room - prompt_tokens, room // 2))
        prompt_tokens = min(prompt_tokens, room - target_tokens)
    prompt_ids, target_ids = prompt.ids(prompt_tokens), target.ids(target_tokens)
    return Example(
        input_ids=prompt_ids + target_ids,
        labels=[IGNORE_INDEX] * len(prompt_ids) + target_ids,
        tokens_cut=len(prompt.text) + len(target.text) - prompt_tokens - target_tokens,
    )


PROBES = (
    Row((Message("user", "你好，今天天气怎么样？"), Message("assistant", "晴，28.5 °C。\n\n\t出门走走吧！"))),
    Row(
        (
            Message("user", "Translate: 龘靐  café naïve"),
            Message("assistant", "<eop> is text, 3.14159 × 2 = 6.28318"),
            Message("user", "😀 def f(x):\r\n    return x**2  # 注释"),
            Message("assistant", "ok"),
        )
    ),
)


def fingerprint(tokenizer: PreTrainedTokenizerBase, template: ChatGLMTemplate) -> str:
    """
    What tokenizer and template make of fixed conversations, as a hash: equal where rows tokenised with the one serve
    the other, whatever files the tokenizers were read from.
    """
    made = [
        (example.input_ids, example.labels)
        for example in (encode_example(tokenizer, p, None, template) for p in PROBES)
    ]
    return hashlib.sha256(json.dumps([len(tokenizer), made]).encode()).hexdigest()[:16]
