"""
Prompts as tokens in, answers as text out, in the order in which they are done.

`BatchGenerator` makes sequences of this replica's share of the rows, sizes the batch by free memory, and has the
engine (`engine_generate.py`) or transformers' `generate` (`hf_generate.py`) answer them. `answer_rows` and
tools/evaluate.py call it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.common.processes import process_rank
from utils.inference.answer_writer import Answer
from utils.inference.batch_sizing import BatchPlan, MemoryBudget, plan_batches
from utils.inference.engine import can_serve
from utils.inference.engine.scheduler import StopRule, TokenSequence
from utils.inference.engine_generate import EngineGenerator, EngineStats
from utils.inference.hf_generate import HfGenerator
from utils.inference.prompt_reader import BASE_NAME, PromptRow
from utils.inference.sampling import GREEDY, Sampling
from utils.inference.stop_strings import StopStrings, decode
from utils.inference.work_queue import SINGLE_REPLICA, Replica, fetch_share
from utils.lora.multi_lora import adapter_choice_of
from utils.models.chat_formats import ChatTemplate


@dataclass(frozen=True)
class AnswerSettings:
    """
    What decides an answer beside model and prompt. The field names are keys in journals.

    Args:
        max_new_tokens: of an answer.
        sequences: answers that are sampled of each row.
        stop: stop strings; an answer ends before the first one.
        adapters: names of several adapters, in the model's order.
    """

    max_new_tokens: int = 512
    sampling: Sampling = GREEDY
    sequences: int = 1
    stop: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptCodec:
    """What turns tokens into an answer: a tokenizer, and the template that its prompts were made with."""

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate

    def split_answer(self, ids: Sequence[int]) -> list[str]:
        """The answer's texts, as `ChatTemplate.parse_answer` takes them."""
        separator = self.template.separator_id(self.tokenizer)
        parts: list[list[int]] = [[]]
        for token in ids:
            if token == separator:
                parts.append([])
            else:
                parts[-1].append(token)
        return [decode(self.tokenizer, part) for part in parts]


class BatchGenerator:
    """
    Answers rows; greedily unless the settings say otherwise.

    A model on one device, whole or as this process's shard, must be prepared by `prepare_for_decoding`, and the engine
    serves it. One that is spread over devices or offloaded is served by transformers' `generate`.

    Args:
        device: where inputs go.

    `stats` says where the time went, and the batch sizes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        codec: PromptCodec,
        settings: AnswerSettings,
        device: torch.device,
        replica: Replica = SINGLE_REPLICA,
    ):
        self.model, self.codec, self.settings = model, codec, settings
        self.device, self.replica = device, replica
        # Every row takes the model's only adapter; of several it chooses.
        self.usual_adapter = int(not settings.adapters and adapter_choice_of(model) is not None)
        self.stop_strings = StopStrings(codec.tokenizer, settings.stop)
        stop_ids = frozenset(codec.template.stop_ids(codec.tokenizer))
        self.stop = StopRule(stop_ids, self.stop_strings.find if settings.stop else None)
        if can_serve(model):
            self.backend = EngineGenerator(model, self.stop, settings.sampling, replica.group is not None)
        else:
            self.backend = HfGenerator(model, self.stop, settings.sampling, codec.tokenizer.pad_token_id, device)

    @property
    def stats(self) -> EngineStats:
        """Where the time went so far, and the batch sizes."""
        return self.backend.stats

    @torch.inference_mode()
    def run(
        self,
        rows: Sequence[PromptRow],
        batch_size: int = 0,
        show: Callable[[BatchPlan], None] = lambda plan: None,
    ) -> Iterator[Answer]:
        """
        Yield the answers of this replica's share of the rows, short prompts first.

        Out of memory lowers the batch size from there on; a row that has no memory even alone becomes an error row.
        Every process must call it.

        Args:
            batch_size: sequences at once; 0 is as many as fit.
            show: called before the first row is answered.

        Yields:
            `{"index", "prompt", "answer", "finish_reason", "prompt_tokens", "answer_tokens"}`. "finish_reason" is
            "stop" when the model or a stop string ended the answer, "length" when `max_new_tokens` did. Where the
            model wrote them, "reasoning_content" and "tool_calls" (in OpenAI's form) are beside "answer". Rows of
            several adapters have "adapter", rows of several answers "answers". A row that cannot be answered is
            `{"index", "prompt", "answer": None, "finish_reason": "error", "error"}`.

        Raises:
            RankError: out of memory on a sharded model.
        """
        if self.replica.first and process_rank() == 0:
            yield from (error_answer(row, row.error) for row in rows if row.error)
        valid = sorted((row for row in rows if not row.error), key=lambda row: len(row.input_ids))
        if not valid:
            return
        by_index = {row.index: row for row in valid}
        answered: dict[int, list[TokenSequence]] = {}
        failed: set[int] = set()
        for sequence in self._serve([self._sequences_of(row) for row in valid], batch_size, show):
            row = by_index[sequence.sequence_id // self.settings.sequences]
            if row.index in failed:
                continue
            if not sequence.answer_ids:
                failed.add(row.index)
                yield error_answer(row, f"no memory for a prompt of {len(row.input_ids)} tokens and its answer")
                continue
            answered.setdefault(row.index, []).append(sequence)
            if len(answered[row.index]) == self.settings.sequences:
                sequences = sorted(answered.pop(row.index), key=lambda sequence: sequence.sequence_id)
                yield self._answer_of(row, sequences)

    def _serve(
        self, rows: list[list[TokenSequence]], batch_size: int, show: Callable[[BatchPlan], None]
    ) -> Iterator[TokenSequence]:
        """Yield the sequences of this replica's share, those that were too long to try last and without an answer."""
        budget = MemoryBudget.of(self.model, self.device, self.replica)
        tried = [row for row in rows if not budget.skips or budget.fits(row[0])]
        plan = plan_batches(tried, budget, batch_size, self.replica.replicas)
        show(plan)
        yield from self.backend.run(chain.from_iterable(fetch_share(tried, self.replica)), plan)
        yield from chain.from_iterable(fetch_share(rows[len(tried) :], self.replica))  # sorted, so the longest

    def _sequences_of(self, row: PromptRow) -> list[TokenSequence]:
        """One sequence per answer of the row; they stay together, so one replica makes all its answers."""
        settings = self.settings
        adapter = self.usual_adapter
        if row.adapter not in (None, BASE_NAME):
            adapter = settings.adapters.index(row.adapter) + 1
        first_id = row.index * settings.sequences
        return [
            TokenSequence(first_id + number, row.input_ids, settings.max_new_tokens, adapter)
            for number in range(settings.sequences)
        ]

    def _answer_of(self, row: PromptRow, sequences: list[TokenSequence]) -> Answer:
        answers = [self._message_of(sequence, row.tools) for sequence in sequences]
        answer = {"index": row.index, "prompt": row.prompt, **answers[0]}
        del answer["answer_tokens"]  # of the first alone
        answer["prompt_tokens"] = len(row.input_ids)
        answer["answer_tokens"] = sum(answer["answer_tokens"] for answer in answers)
        if row.adapter is not None:
            answer["adapter"] = row.adapter
        if len(answers) > 1:
            answer["answers"] = answers
        return answer

    def _message_of(self, sequence: TokenSequence, tools: str) -> Answer:
        """The answer's text, and its reasoning and calls in OpenAI's form where it has them."""
        ended_by_token = sequence.answer_ids[-1] in self.stop.token_ids
        texts = self.codec.split_answer(sequence.answer_ids[:-1] if ended_by_token else sequence.answer_ids)
        text = "".join(texts)
        cut = self.stop_strings.cut(text)
        message = self.codec.template.parse_answer(texts if cut == text else [cut], tools)
        answer: Answer = {"answer": message.content}
        if message.reasoning:
            answer["reasoning_content"] = message.reasoning
        if message.tool_calls:
            answer["tool_calls"] = [{"type": "function", "function": call._asdict()} for call in message.tool_calls]
        return answer | {
            "finish_reason": "stop" if ended_by_token or cut != text else "length",
            "answer_tokens": len(sequence.answer_ids),
        }


def error_answer(row: PromptRow, error: str) -> Answer:
    """Return the answer of a row that cannot be answered."""
    return {
        "index": row.index,
        "prompt": row.prompt,
        "answer": None,
        "finish_reason": "error",
        "error": error,
    }
