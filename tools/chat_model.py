"""
A model to talk to, whose answers grow token by token.

In: a model, its tokenizer and template, with or without an adapter; conversations. Out: `Chat.answer`, texts.
Callers: tools/chat.py in the terminal, tools/chat_page.py in the browser.
"""

import queue
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from utils.inference.arguments import flag
from utils.inference.engine import Engine, NewTokens, can_serve
from utils.inference.engine.model_runner import EngineConfig
from utils.inference.engine.scheduler import StopRule, TokenSequence
from utils.inference.engine.stream import EngineServer
from utils.inference.placement import input_device
from utils.inference.sampling import Sampling
from utils.inference.stop_strings import UNFINISHED, decode
from utils.lora.multi_lora import adapter_choice_of
from utils.models.conversation import Message
from utils.models.templates import ChatTemplate, encode_prompt

MIN_SEQ_LEN = 2048  # of the first engine; a conversation that outgrows it gets one of twice the length


@dataclass
class ChatSettings:
    """How an answer is generated; a temperature of 0 is greedy."""

    _argument_group_name = "answers"

    max_new_tokens: int = flag("most tokens of an answer", 512)
    temperature: float = flag("temperature of sampling; 0: greedy", 0.0)
    top_p: float = flag("sample among the most likely tokens that together have this probability", 1.0)
    repetition_penalty: float = flag("above 1: tokens that occurred become less likely", 1.0)

    @property
    def sampling(self) -> Sampling:
        """The same for the engine."""
        return Sampling(self.temperature, top_p=self.top_p, repetition_penalty=self.repetition_penalty)


class Question(NamedTuple):
    """A conversation whose last message is to be answered, by the adapter or by the base model."""

    messages: Sequence[Message]
    use_adapter: bool


@dataclass
class Chat:
    """
    A model to talk to, and its adapter, which each question may take or not.

    An engine serves a model that lies on one device, transformers' `generate` any other. The engine stays for the
    whole chat, unless settings change or a conversation outgrows it: both belong to the engine, so one call of
    `answers` waits for the end of another.

    Args:
        model: with at most one adapter, by `add_adapters`; prepared by `prepare_for_decoding`.
        model_name: for a person, as `adapter_name`, which is None without an adapter.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    model_name: str
    adapter_name: str | None = None
    config: EngineConfig | None = None  # of the engine that runs
    server: EngineServer | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def has_adapter(self) -> bool:
        """Whether the model has an adapter."""
        return self.adapter_name is not None

    def answer(self, messages: Sequence[Message], settings: ChatSettings, use_adapter: bool = True) -> Iterator[str]:
        """Yield the answer to the last message, longer each time, at last the whole; see `answers`."""
        with closing(self.answers([Question(messages, use_adapter)], settings)) as answers:
            for (text,) in answers:
                yield text

    def answers(self, questions: Sequence[Question], settings: ChatSettings) -> Iterator[list[str | None]]:
        """
        Yield the answers so far, None for one that has not begun; at last whole ones. There are one or two questions.

        Closing the iterator before that stops the model at its next token.

        Raises:
            Exception: what the engine or `generate` raised.
        """
        sequences = [self._sequence_of(question, settings) for question in questions]
        stop_ids = set(self.template.stop_ids(self.tokenizer))
        answer_ids: list[list[int]] = [[] for _ in questions]
        texts: list[str | None] = [None] * len(questions)
        with self.lock, closing(self._stream(sequences, settings)) as stream:
            for new in stream:
                index = sequences.index(new.sequence)
                answer_ids[index] += [token for token in new.token_ids if token not in stop_ids]
                text = self.template.clean(decode(self.tokenizer, answer_ids[index]))
                texts[index] = text if new.finish_reason else text.rstrip(UNFINISHED)
                yield list(texts)

    def close(self) -> None:
        """End the engine."""
        if self.server is not None:
            self.server.close()
            self.server = self.config = None

    def _sequence_of(self, question: Question, settings: ChatSettings) -> TokenSequence:
        input_ids = encode_prompt(self.tokenizer, question.messages, self.template)
        adapter = int(self.has_adapter and question.use_adapter)
        return TokenSequence(random.getrandbits(48), input_ids, settings.max_new_tokens, adapter)

    def _stream(self, sequences: list[TokenSequence], settings: ChatSettings) -> Iterator[NewTokens]:
        stop = StopRule(frozenset(self.template.stop_ids(self.tokenizer)))
        if not can_serve(self.model):
            return stream_by_transformers(self.model, sequences, settings, stop, self.tokenizer.pad_token_id)
        needed = max(len(sequence.input_ids) + sequence.max_new_tokens for sequence in sequences)
        if not (
            self.server
            and self.server.is_running
            and self.config.sampling == settings.sampling
            and self.config.max_batch_size >= len(sequences)
            and self.config.max_seq_len >= needed
        ):
            self.close()  # first: its KV cache is freed
            self.config = EngineConfig(
                max_batch_size=len(sequences),
                max_seq_len=max(MIN_SEQ_LEN, 1 << (needed - 1).bit_length()),
                stop=stop,
                sampling=settings.sampling,
                compile_layers=False,  # a user would wait half a minute for it
                decode_steps=1,  # each token is seen at once
            )
            self.server = EngineServer(Engine(self.model, self.config))
        return self.server.stream(*sequences)


def stream_by_transformers(
    model: PreTrainedModel, sequences: list[TokenSequence], settings: ChatSettings, stop: StopRule, pad_token_id: int
) -> Iterator[NewTokens]:
    """
    Yield the tokens of one answer after another, by `generate`, which samples by torch's generator.

    Closing the iterator returns after the token that is being computed.
    """
    for sequence in sequences:
        tokens, errors, abandoned = _TokenQueue(), [], _StopOnEvent()
        keywords = {
            "max_new_tokens": sequence.max_new_tokens,
            "do_sample": bool(settings.temperature),
            "num_beams": 1,
            "repetition_penalty": settings.repetition_penalty,
            "eos_token_id": sorted(stop.token_ids),
            "pad_token_id": pad_token_id,
            "streamer": tokens,
            "stopping_criteria": [abandoned],
        }
        if settings.temperature:
            keywords |= {"temperature": settings.temperature, "top_p": settings.top_p}
        thread = threading.Thread(target=_generate, args=(model, sequence, keywords, errors), daemon=True)
        thread.start()
        try:
            while (new_ids := tokens.queue.get()) is not None:
                sequence.answer_ids += new_ids
                yield NewTokens(sequence, new_ids, None)
        finally:
            abandoned.event.set()
            thread.join()
        if errors:
            raise errors[0]
        yield NewTokens(sequence, [], stop.finish_reason(sequence.answer_ids))


@torch.inference_mode()
def _generate(
    model: PreTrainedModel, sequence: TokenSequence, keywords: dict[str, Any], errors: list[Exception]
) -> None:
    """Run `generate` in a thread; an error goes into `errors` and ends the stream."""
    device = input_device(model)
    try:
        if choice := adapter_choice_of(model):
            choice.rows = torch.tensor([[sequence.adapter]], device=device)
        input_ids = torch.tensor([sequence.input_ids], device=device)  # (1, T)
        model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **keywords)
    except Exception as error:
        errors.append(error)
        keywords["streamer"].end()


class _TokenQueue(BaseStreamer):
    """Receives what `generate` streams, without the prompt; None is the end."""

    def __init__(self):
        self.queue: queue.SimpleQueue = queue.SimpleQueue()
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.queue.put(value.flatten().tolist())
        self.prompt_seen = True

    def end(self) -> None:
        self.queue.put(None)


class _StopOnEvent(StoppingCriteria):
    """Ends generation at the next token once `event` is set."""

    def __init__(self):
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)
