"""What of a step, and of reading prompts, is compiled, and how; and work captured once as CUDA graphs."""

import time
from collections.abc import Callable, Hashable

import torch

from utils.inference.engine.kv_cache import PromptRecorder, SlotState
from utils.inference.sampling import Sampling
from utils.models.modeling_chatglm import CACHE_KEY, ChatGLMBlock

RECOMPILES = 64
EARLY = "triton.enable_pdl"  # has kernels start while those before them end, where torch's compiler knows how


class StepParts:
    """The functions below, how a token is chosen, how slots advance; compiled, once for each size of the batch."""

    def __init__(self, sampling: Sampling, state: SlotState, compiled: bool):
        if compiled:  # also for engines before this one
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILES)
        early = {EARLY: True} if compiled and EARLY in torch._inductor.list_options() else {}

        def compile_if(wanted: bool, call: Callable, dynamic: bool = False, **options: bool) -> Callable:
            return torch.compile(call, dynamic=dynamic, options=early | options) if wanted else call

        self.begin_step = compile_if(compiled, begin_step)
        # A row's maximum and what is computed with it are one kernel.
        self.run_blocks = compile_if(compiled, run_blocks, split_reductions=False)
        self.end_step = compile_if(compiled, end_step)
        # What is drawn is not to depend on how a compiler computes for a size of the batch.
        self.choose = compile_if(compiled and sampling.temperature == 0, sampling.choose)
        self.advance = compile_if(compiled, state.advance)
        self.read_block = compile_if(compiled, read_block, dynamic=True)


def begin_step(embed, rotary_emb, tokens, positions) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    hidden_states = embed(tokens[:, None])
    return hidden_states, rotary_emb(hidden_states, positions)


def run_blocks(blocks, hidden_states, position_embeddings, mask, caches) -> torch.Tensor:
    for block, cache in zip(blocks, caches, strict=True):
        hidden_states = run_block(block, hidden_states, position_embeddings, mask, cache)
    return hidden_states


def end_step(norm, head, hidden_states) -> torch.Tensor:
    return head(norm(hidden_states))[:, 0]


def run_block(block, hidden_states, position_embeddings, mask, cache, **attention) -> torch.Tensor:
    key = "cache" if isinstance(block, ChatGLMBlock) else CACHE_KEY  # our own block has one name in every version
    attention[key] = cache
    return block(hidden_states, attention_mask=mask, position_embeddings=position_embeddings, **attention)


def read_block(
    block, hidden_states, position_embeddings, mask, starts, longest: int, causal: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states of prompts behind the block, and what it made of their keys and values, (1, K, N, D)."""
    recorder = PromptRecorder()
    attention = {} if starts is None else {"cu_seq_lens_q": starts, "max_length_q": longest, "causal": causal}
    hidden_states = run_block(block, hidden_states, position_embeddings, mask, recorder, **attention)
    return hidden_states, recorder.keys, recorder.values


class StepGraphs:
    """Graphs by any key; they share one pool of memory, so no two run at once."""

    def __init__(self):
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self.graphs

    def capture(self, key: Hashable, call: Callable[[], None]) -> float:
        """Runs `call`, which compiles, and records it; how many seconds that took."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # NCCL has threads of its own
            call()
        self.graphs[key] = graph
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def replay(self, key: Hashable) -> None:
        self.graphs[key].replay()
