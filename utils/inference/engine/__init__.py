"""
Batch generation with continuous batching: token sequences in, the same sequences with their answers out.

Pages. The KV cache is pages of 64 tokens, allocated once; a sequence has as many as its tokens need, and those that
    begin alike share the first ones. `pages.py` has the rules.
Slots. A sequence has one of `max_batch_size` rows of the decode batch from the end of its prefill to its last token;
    then a waiting sequence takes it.
Prefill. Waiting prompts are packed without padding and computed together, all but the last token of each, which the
    first decode step computes. A long prompt is computed in chunks, between decode steps of the others.
Decode steps. A step chooses one token for each slot. It runs the same kernels on the same memory whatever the
    sequences are, so on a GPU each batch size is captured once as a CUDA graph of compiled layers, and a prefill for
    each of 11 lengths. The decode kernel reads a sequence's filled tokens where the page table says, so one graph
    serves all lengths, and the host writes the table between two replays.
Looking behind. The host starts the next 4 steps before it reads the tokens of the last 4, so the GPU never waits for
    it. A sequence that ended meanwhile computes a few tokens that are dropped.
Early launch. Kernels of a step launch while those before them end (programmatic dependent launch, Hopper and newer).
    That pays only if a whole chain does it: torch's compiler generates such kernels, cuBLAS does not, hence our skinny
    GEMM in 16 bits.

`scheduler.py` decides in plain Python, `model_runner.py` computes, and `Engine` connects them for
`utils/inference/engine_generate.py`.

Why no library: vLLM has no ChatGLM-6B and pins a torch of its own. transformers' `generate_batch` reached 708 tokens/s
where this reached 9,973. For flashinfer's decode attention see `attention.py`.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from utils.inference.engine.model_runner import DecodeResult, EngineConfig, ModelRunner
from utils.inference.engine.scheduler import Scheduler, TokenSequence


def can_serve(model: torch.nn.Module) -> bool:
    """Whether the engine can run the model: it is whole (or a shard) on one device, without hooks of accelerate."""
    return isinstance(model, (PreTrainedModel, PeftModel)) and not any(
        hasattr(module, "_hf_hook") for module in model.modules()
    )


class Engine:
    """
    Answers token sequences with a model that `prepare_for_decoding` has prepared.

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

    @torch.inference_mode()
    def answer(self, sequences: Iterable[TokenSequence]) -> Iterator[TokenSequence]:
        """
        Yield each sequence when its answer is complete.

        Sequences are taken in their order as slots and pages become free.
        """
        source = iter(sequences)
        results: deque[DecodeResult] = deque()
        while True:
            for prefill in self.scheduler.plan_prefills(source):
                self.runner.prefill(prefill)
            if not self.scheduler.has_running:
                self.scheduler.in_flight.clear()  # steps started for sequences that had ended
                return
            decodes = self.scheduler.needs_decoding()
            if decodes:
                results.append(self.runner.decode(self.scheduler.plan_decode()))
            if results and (self.scheduler.must_finish_oldest() or not decodes):
                yield from self.scheduler.finish(self.runner.wait(results.popleft()))
