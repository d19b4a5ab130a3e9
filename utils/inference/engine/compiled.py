"""torch.compile wrappers for prefill and decode. `ModelRunner` calls them, on a GPU while it captures CUDA graphs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from utils.inference.engine.kv_cache import DecodeState, LayerKVCache, PromptRecorder
from utils.inference.sampling import Sampling
from utils.models.modeling_chatglm import CACHE_KEY, ChatGLMBlock

EARLY_LAUNCH = "triton.enable_pdl"  # kernels launch while those before them end, if torch's compiler can do it


class CompiledFunctions:
    """Prefill and decode functions, compiled once per batch size."""

    def __init__(self, sampling: Sampling, state: DecodeState, compiles: bool):
        options = {EARLY_LAUNCH: True} if compiles and EARLY_LAUNCH in torch._inductor.list_options() else {}

        def compile_if(wanted: bool, call: Callable, dynamic: bool = False, **others: bool) -> Callable:
            return torch.compile(call, dynamic=dynamic, options=options | others) if wanted else call

        self.begin_step = compile_if(compiles, begin_step)
        # A row's maximum and what is computed with it become one kernel.
        self.run_blocks = compile_if(compiles, run_blocks, split_reductions=False)
        self.end_step = compile_if(compiles, end_step)
        # A sampled token must not depend on how a compiler rounds for one batch size.
        self.choose = compile_if(compiles and sampling.temperature == 0, sampling.choose)
        self.advance = compile_if(compiles, state.advance)
        self.prefill_block = compile_if(compiles, prefill_block, dynamic=True)


def begin_step(
    embed: nn.Module, rotary_emb: nn.Module, tokens: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """(B,) tokens and their positions -> hidden states (B, 1, E) and the rotary factors."""
    hidden_states = embed(tokens[:, None])
    return hidden_states, rotary_emb(hidden_states, position_ids)


def run_blocks(
    blocks: Sequence[nn.Module],
    caches: Sequence[LayerKVCache],
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention: dict[str, Any],
) -> torch.Tensor:
    """Hidden states (B, 1, E) through consecutive blocks, each with its cache."""
    for block, cache in zip(blocks, caches, strict=True):
        hidden_states = run_block(block, cache, hidden_states, position_embeddings, attention)
    return hidden_states


def end_step(norm: nn.Module, head: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """(B, 1, E) -> logits (B, V)."""
    return head(norm(hidden_states))[:, 0]


def run_block(
    block: nn.Module,
    cache: LayerKVCache | PromptRecorder,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention: dict[str, Any],
) -> torch.Tensor:
    """
    Hidden states (B, T, E) through one block.

    Args:
        attention: keyword arguments for `paged_attention_forward`.
    """
    key = "cache" if isinstance(block, ChatGLMBlock) else CACHE_KEY  # our own block has one name in every version
    return block(hidden_states, position_embeddings=position_embeddings, **{key: cache}, **attention)


def prefill_block(
    block: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention: dict[str, Any],
) -> torch.Tensor:
    """Packed prompts, hidden states (1, N, E), through one block, whose attention writes into the cache."""
    return run_block(block, PromptRecorder(), hidden_states, position_embeddings, attention)
