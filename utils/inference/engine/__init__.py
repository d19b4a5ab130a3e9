"""
Batch generation with continuous batching: token sequences in, the same sequences with their answers out.

`Engine.answer` takes an iterable and yields sequences when they are complete. Who has sequences one by one, and wants
tokens as they are chosen, calls `add`, `step` and `cancel`; `stream.py` does so in a thread, for asyncio and chats.

Pages. The KV cache is pages of 64 tokens, allocated once; a sequence has as many as its tokens need, and those that
    begin alike share the first ones. `pages.py` has the rules.
Slots. A sequence has one of `max_batch_size` rows of the decode batch from the end of its prefill to its last token;
    then a waiting sequence takes it.
Prefill. Waiting prompts are packed without padding and computed together, all but the last token of each, which the
    first decode step computes. A long prompt is computed in chunks, between decode steps of the others.
Decode steps. A step chooses one token for each slot. It runs the same kernels on the same memory whatever the
    sequences are, so on a GPU each batch size is captured once as a CUDA graph, and a prefill for each of 15 lengths:
    of kernels alone (`models/fused_blocks.py`), or of compiled layers. The decode kernel reads a sequence's filled
    tokens where the page table says, so one graph serves all lengths, and the host writes the table between two
    replays. The prefill kernel does the same by a list of tiles, whatever the prompts are.
Looking behind. The host starts the next 4 steps before it reads the tokens of the last 4, so the GPU never waits for
    it. A sequence that ended meanwhile computes a few tokens that are dropped.
Early launch. Kernels of a step launch while those before them end (programmatic dependent launch, Hopper and newer).
    That pays only if a whole chain does it, and most if a GEMM loads its weight before the kernel ahead has ended:
    cuBLAS does neither, hence our GEMMs of few rows.

`scheduler.py` decides in plain Python, `model_runner.py` computes, and `Engine` connects them for
`utils/inference/engine_generate.py`.

Why no library: vLLM has no ChatGLM-6B and pins a torch of its own. transformers' `generate_batch` reached 708 tokens/s
where this reached 9,973, on an H100. For flashinfer's decode attention see `attention.py`.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from utils.inference.engine.model_runner import DecodeResult, EngineConfig, ModelRunner
from utils.inference.engine.pages import pages_for
from utils.inference.engine.scheduler import Scheduler, TokenSequence


def can_serve(model: torch.nn.Module) -> bool:
    """Whether the engine can run the model: it is whole (or a shard) on one device, without hooks of accelerate."""
    return isinstance(model, (PreTrainedModel, PeftModel)) and not any(
        hasattr(module, "_hf_hook") for module in model.modules()
    )


class NewTokens(NamedTuple):
    """
    Tokens by which an answer has grown.

    A stop string and what may become one are held back. So in an answer that a stop string ends, `token_ids` of all
    `NewTokens` together are the tokens before it; `sequence.answer_ids` has the rest too. They are all of
    `answer_ids`, the stop token among them, in every other.
    """

    sequence: TokenSequence
    token_ids: list[int]
    finish_reason: str | None  # "stop" or "length" with the last tokens, else None


class Engine:
    """
    Answers token sequences with a model that `prepare_for_decoding` has prepared.

    Either one `answer` at a time, or `add`, `cancel` and `step`, all from one thread.

    Args:
        model: see `ModelRunner`; its layers stay as they are.
        runner_type: the class that computes; tests pass one that fails.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        config: EngineConfig,
        runner_type: type[ModelRunner] = ModelRunner,
    ):
        self.runner = runner_type(model, config)
        self.scheduler = Scheduler(self.runner.limits, config.stop)
        self.results: deque[DecodeResult] = deque()  # of the plans in flight
        self.added: deque[TokenSequence] = deque()  # that the scheduler has not taken yet
        self.given: dict[TokenSequence, int] = {}  # tokens of each answer that `step` has returned

    def check(self, sequence: TokenSequence) -> None:
        """
        Raises:
            ValueError: the sequence has no prompt, or an answer; or with its answer it is longer than `max_seq_len`
                or than the KV cache.
        """
        tokens, longest = len(sequence.input_ids) + sequence.max_new_tokens, self.runner.max_seq_len
        if not sequence.input_ids or sequence.max_new_tokens < 1:
            raise ValueError("a sequence needs a token of a prompt at least, and max_new_tokens of 1")
        if sequence.answer_ids:
            raise ValueError("the sequence has an answer already: make another one of its prompt")
        if tokens > longest:
            raise ValueError(f"prompt and max_new_tokens are {tokens} tokens, more than max_seq_len {longest}")
        if pages_for(sequence.max_cached_tokens) >= self.runner.pages:  # one is the scratch page
            raise ValueError(f"prompt and max_new_tokens are {tokens} tokens, more than the KV cache holds")

    def add(self, sequence: TokenSequence) -> None:
        """
        Let a sequence wait for its turn, in the order of adding; `step` returns its tokens.

        Raises:
            ValueError: see `check`.
        """
        self.check(sequence)
        self.added.append(sequence)

    def cancel(self, sequence: TokenSequence) -> None:
        """Drop a sequence that was added, unless it has ended: the next step gives its slot to another."""
        self.given.pop(sequence, None)
        if sequence in self.added:
            self.added.remove(sequence)
        else:
            self.scheduler.cancel(sequence)

    @property
    def has_work(self) -> bool:
        """Whether a sequence runs or waits, so that `step` has something to do."""
        return bool(self.added) or bool(self.scheduler.waiting) or self.scheduler.has_running

    def step(self) -> list[NewTokens]:
        """
        Prefill what waits and has a slot, start decode steps, and return the tokens that are known by now.

        The list may be empty. A sequence is in it once at most.
        """
        complete = self._advance(iter(()))
        running = [sequence for sequence in self.scheduler.running if sequence]
        grown = [self._new_tokens(sequence, ended=True) for sequence in complete]
        grown += [self._new_tokens(sequence, ended=False) for sequence in running]
        return [tokens for tokens in grown if tokens.token_ids or tokens.finish_reason]

    def _new_tokens(self, sequence: TokenSequence, ended: bool) -> NewTokens:
        """Return the tokens that `step` has not returned yet, and from now on has."""
        stop, answer_ids = self.scheduler.stop, sequence.answer_ids
        given = self.given.pop(sequence, 0)
        final = max(given, stop.count_final(answer_ids, ended))
        if not ended:
            self.given[sequence] = final
        return NewTokens(sequence, answer_ids[given:final], stop.finish_reason(answer_ids) if ended else None)

    def answer(self, sequences: Iterable[TokenSequence]) -> Iterator[TokenSequence]:
        """
        Yield each sequence when its answer is complete.

        Sequences are taken as slots and pages become free: those of a list with the highest `max_new_tokens` first,
        so that few run on at the end, when a step costs nearly what it costs for many; others in their order.
        """
        if isinstance(sequences, list):
            sequences = sorted(sequences, key=lambda sequence: -sequence.max_new_tokens)
        source = iter(sequences)
        while True:
            complete = self._advance(source)
            yield from complete
            if not complete and not self.has_work:
                return

    @torch.inference_mode()
    def _advance(self, source: Iterator[TokenSequence]) -> list[TokenSequence]:
        """Do one step with sequences that were added and, as slots are free, of `source`; return the complete ones."""
        for prefill in self.scheduler.plan_prefills(chain(self._take_added(), source)):
            self.runner.prefill(prefill)
        complete: list[TokenSequence] = []
        if self.scheduler.has_running:
            decodes = self.scheduler.needs_decoding()
            if decodes:
                self.results.append(self.runner.decode(self.scheduler.plan_decode()))
            if self.results and (self.scheduler.must_finish_oldest() or not decodes):
                complete = self.scheduler.finish(self.runner.wait(self.results.popleft()))
        if not self.scheduler.has_running:  # steps in flight are those of sequences that had ended
            self.scheduler.in_flight.clear()
            self.results.clear()
        return complete

    def _take_added(self) -> Iterator[TokenSequence]:
        while self.added:
            yield self.added.popleft()
