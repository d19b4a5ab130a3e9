"""Row or chat -> input_ids and labels. The only place that knows prompt templates, for training and inference."""

from collections.abc import Sequence
from dataclasses import dataclass

from utils.rows import Message, Row

from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # labels where there is no loss
SPECIAL_TOKENS = 3  # [gMASK] and <sop> after the prompt, <eop> after the target
MIN_SEQ_LENGTH = SPECIAL_TOKENS + 2


@dataclass(frozen=True)
class Example:
    """A training row as tokens: `labels` is IGNORE_INDEX on the prompt and equals `input_ids` on the target."""

    input_ids: list[int]
    labels: list[int]
    tokens_cut: int  # how many tokens of text truncation took


def chat_prompt(messages: Sequence[Message]) -> str:
    """
    The prompt text of ChatGLM-6B's own `chat`: the bare question, or numbered rounds once there is a history.

    Source: `ChatGLMForConditionalGeneration.chat` of THUDM/chatglm-6b.
    """
    if len(messages) == 1:
        return messages[0].content
    turns = [message.content for message in messages]
    rounds = [f"[Round {i}]\n问：{turns[2 * i]}\n答：{turns[2 * i + 1]}\n" for i in range(len(turns) // 2)]
    return "".join(rounds) + f"[Round {len(turns) // 2}]\n问：{turns[-1]}\n答："


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text in which nothing is special: a row that spells out "<eop>" does not end the answer."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """`prompt [gMASK] <sop>`, the input of generation."""
    return tokenizer.build_inputs_with_special_tokens(encode_text(tokenizer, chat_prompt(messages)))


def encode_example(tokenizer: PreTrainedTokenizerBase, row: Row, max_seq_length: int | None = None) -> Example:
    """
    `prompt [gMASK] <sop> target <eop>`, with the loss on the target and on `<eop>`.

    With `max_seq_length` (tokens, at least MIN_SEQ_LENGTH) the texts are cut at their ends, the special tokens never:
    the longer text gives first, and neither goes below half of the room unless it is shorter than that.
    """
    prompt_ids = encode_text(tokenizer, chat_prompt(row.prompt))
    target_ids = encode_text(tokenizer, row.target)
    text_tokens = len(prompt_ids) + len(target_ids)
    if max_seq_length is not None and text_tokens + SPECIAL_TOKENS > max_seq_length:
        room = max_seq_length - SPECIAL_TOKENS
        target_ids = target_ids[: max(room - len(prompt_ids), room // 2)]
        prompt_ids = prompt_ids[: room - len(target_ids)]
    tokens_cut = text_tokens - len(prompt_ids) - len(target_ids)
    prompt_ids = tokenizer.build_inputs_with_special_tokens(prompt_ids)
    target_ids = [*target_ids, tokenizer.eos_token_id]
    return Example(
        input_ids=prompt_ids + target_ids,
        labels=[IGNORE_INDEX] * len(prompt_ids) + target_ids,
        tokens_cut=tokens_cut,
    )
