"""
Generation through the engine, for models whole on one device or sharded over processes: sequences in, answered out.

`BatchGenerator` calls it. When memory runs out it retries with a smaller batch and cache.
"""

import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from utils.common.errors import RankError
from utils.inference.batch_sizing import BatchPlan, cache_tokens_of, is_out_of_memory
from utils.inference.engine import Engine
from utils.inference.engine.model_runner import EngineConfig, ModelRunner
from utils.inference.engine.scheduler import StopRule, TokenSequence
from utils.inference.sampling import Sampling


@dataclass
class EngineStats:
    """Seconds spent, and the batch size of each engine or, after out of memory, of each attempt."""

    compile_seconds: float = 0.0  # compiling layers, capturing CUDA graphs
    prefill_seconds: float = 0.0
    batch_sizes: list[int] = field(default_factory=list)


class SequenceQueue:
    """Sequences in the order of their prompts' lengths, which can be put back."""

    def __init__(self, sequences: Iterable[TokenSequence]):
        self.sequences, self.returned = iter(sequences), deque()

    def first(self) -> TokenSequence | None:
        """Return the next sequence without taking it; None at the end."""
        if not self.returned:
            self.returned.extend(islice(self.sequences, 1))
        return self.returned[0] if self.returned else None

    def put_back(self, sequences: Iterable[TokenSequence]) -> None:
        """Return taken sequences to the front, shortest prompts first."""
        ordered = sorted(sequences, key=lambda sequence: len(sequence.input_ids))
        self.returned.extendleft(ordered[::-1])

    def up_to(self, cache_tokens: float = math.inf) -> Iterator[TokenSequence]:
        """Take sequences while each fits, alone, into a KV cache of `cache_tokens`."""
        while (sequence := self.first()) is not None and cache_tokens_of(sequence) <= cache_tokens:
            yield self.returned.popleft()


class EngineGenerator:
    """
    Answers sequences by an `Engine`.

    Args:
        model: prepared by `prepare_for_decoding`.
        is_sharded: whether other processes hold the rest of the model.
        runner_type: see `Engine`.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        stop: StopRule,
        sampling: Sampling,
        is_sharded: bool = False,
        runner_type: type[ModelRunner] = ModelRunner,
    ):
        self.model, self.stop, self.sampling = model, stop, sampling
        self.is_sharded, self.runner_type = is_sharded, runner_type
        self.stats = EngineStats()

    def run(self, sequences: Iterable[TokenSequence], plan: BatchPlan) -> Iterator[TokenSequence]:
        """
        Yield each sequence when it is answered; one that has no memory even alone comes without an answer.

        Out of memory halves the batch size and the KV cache from there on; a sequence that then needs a larger cache
        gets it for itself.

        Raises:
            RankError: out of memory on a sharded model, whose other processes do not know of it.
        """
        queue = SequenceQueue(sequences)
        batch_size, cache_tokens = plan.batch_size, plan.cache_tokens
        while (sequence := queue.first()) is not None:
            if cache_tokens_of(sequence) > cache_tokens:
                batch_size, cache_tokens = 1, cache_tokens_of(sequence)
            self.stats.batch_sizes.append(batch_size)
            engine, out_of_memory = None, False
            try:
                config = EngineConfig(
                    batch_size, plan.max_seq_len, self.stop, self.sampling, cache_tokens=cache_tokens
                )
                engine = Engine(self.model, config, self.runner_type)
                yield from engine.answer(queue.up_to(cache_tokens))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                out_of_memory = True
            finally:
                if engine:
                    self.stats.compile_seconds += engine.runner.compile_seconds
                    self.stats.prefill_seconds += engine.runner.prefill_seconds
            if not out_of_memory:
                continue
            tried = f"out of memory with {batch_size} rows and {cache_tokens} cached tokens at once"
            if self.is_sharded:
                raise RankError(f"{tried}: run the same command with a smaller --batch_size, it resumes here")
            queue.put_back(engine.scheduler.unfinished() if engine else [])
            del engine
            torch.cuda.empty_cache()
            needed = cache_tokens_of(queue.first())
            if batch_size == 1 and cache_tokens == needed:
                yield queue.returned.popleft()
                continue
            batch_size = max(1, batch_size // 2)
            cache_tokens = needed if batch_size == 1 else max(needed, cache_tokens // 2)
            print(f"{tried}: continuing with {batch_size} and {cache_tokens}", file=sys.stderr, flush=True)
