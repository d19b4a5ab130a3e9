"""
A model to talk to, whose answer grows token by token.

In: a model, its tokenizer and template, with or without an adapter; a conversation. Out: `Chat.answer`, texts.
Callers: tools/chat.py in the terminal, tools/chat_page.py in the browser.
"""

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from utils.inference.arguments import flag
from utils.inference.placement import input_device
from utils.inference.stop_strings import decode
from utils.models.conversation import Message
from utils.models.templates import ChatTemplate, encode_prompt

UNFINISHED = "\ufffd"  # decoded from the first bytes of a character whose other tokens have not come yet


@dataclass
class ChatSettings:
    """How an answer is generated; a temperature of 0 is greedy."""

    _argument_group_name = "answers"

    max_new_tokens: int = flag("most tokens of an answer", 512)
    temperature: float = flag("temperature of sampling; 0: greedy", 0.0)
    top_p: float = flag("sample among the most likely tokens that together have this probability", 1.0)
    repetition_penalty: float = flag("above 1: tokens that occurred become less likely", 1.0)


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


@dataclass
class Chat:
    """
    A model to talk to, with an adapter that can be switched off.

    The switch belongs to the model, so answers are generated one after another: an abandoned answer has ended before
    the next one begins.

    Args:
        model_name: for a person, as `adapter_name`, which is None without an adapter.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    model_name: str
    adapter_name: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def has_adapter(self) -> bool:
        """Whether the model has an adapter."""
        return self.adapter_name is not None

    def answer(self, messages: Sequence[Message], settings: ChatSettings, use_adapter: bool = True) -> Iterator[str]:
        """
        Yield the answer to the last message, longer each time, at last the whole.

        Closing the iterator before that stops the model at its next token.

        Raises:
            Exception: what `generate` raised.
        """
        input_ids = torch.tensor([encode_prompt(self.tokenizer, messages, self.template)])  # (1, T)
        tokens, errors, abandoned = _TokenQueue(), [], _StopOnEvent()
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p} if settings.temperature else {}

        def generate() -> None:
            switched_off = self.has_adapter and not use_adapter
            try:
                adapter = self.model.disable_adapter() if switched_off else contextlib.nullcontext()
                with self.lock, torch.inference_mode(), adapter:
                    if abandoned.event.is_set():
                        return
                    self.model.generate(
                        input_ids=input_ids.to(input_device(self.model)),
                        attention_mask=torch.ones_like(input_ids, device=input_device(self.model)),
                        max_new_tokens=settings.max_new_tokens,
                        do_sample=bool(settings.temperature),
                        num_beams=1,
                        repetition_penalty=settings.repetition_penalty,
                        eos_token_id=self.template.stop_ids(self.tokenizer),
                        pad_token_id=self.tokenizer.pad_token_id,
                        streamer=tokens,
                        stopping_criteria=[abandoned],
                        **sampling,
                    )
            except Exception as error:
                errors.append(error)
                tokens.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        answer_ids, stop_ids = [], set(self.template.stop_ids(self.tokenizer))
        try:
            while (new_ids := tokens.queue.get()) is not None:
                answer_ids += [token for token in new_ids if token not in stop_ids]
                yield self._text(answer_ids).rstrip(UNFINISHED)
        finally:
            abandoned.event.set()
        thread.join()
        if errors:
            raise errors[0]
        yield self._text(answer_ids)

    def _text(self, ids: Sequence[int]) -> str:
        return self.template.clean(decode(self.tokenizer, ids))
