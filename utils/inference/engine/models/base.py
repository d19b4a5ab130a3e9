"""
What the engine asks of an architecture: where its layers are, how positions count, what a token leaves in the cache.

`ModelRunner` computes through it. A new architecture is a class beside `glm.py` and its line in `__init__.py`. Where
tokens leave something else than keys and values, it also has a cache class with the methods of `LayerKVCache`.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from utils.inference.engine.compiled import run_block
from utils.inference.engine.kv_cache import DecodeState, LayerKVCache, PromptRecorder, kv_bytes_per_token
from utils.inference.engine.models.fused_blocks import FusedBlocks
from utils.inference.engine.pages import PAGE_TOKENS
from utils.inference.engine.scheduler import TokenSequence


class ServedModel:
    """
    A model of one architecture, as the engine computes with it.

    `coordinates` is how many numbers a position has. `splits_prompts` says whether a token of a prompt attends only to
    those before it, so that a prompt may be prefilled in chunks and share its beginning with others.
    """

    coordinates = 1
    splits_prompts = True

    def __init__(self, model: PreTrainedModel):
        self.cache_bytes_per_token = kv_bytes_per_token(model)  # over all layers; of all shards together
        self.body = model.base_model
        self.blocks = list(self.body.layers)
        self.embed, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.rotary_emb = self.body.rotary_emb

    @property
    def norm(self) -> nn.Module:
        """The norm before the head."""
        return self.body.norm

    def fused_blocks(self, max_positions: int) -> FusedBlocks | None:
        """Return the blocks by kernels alone, for positions below `max_positions`; None: torch compiles them."""
        return None

    def position_ids(self, sequence: TokenSequence, start: int, stop: int) -> list[list[int]]:
        """Return the positions of the tokens from `start` up to `stop`, one list per coordinate."""
        return [list(range(start, stop))]

    def shape_position_ids(self, position_ids: torch.Tensor) -> torch.Tensor:
        """(B, coordinates, T) -> what the rotary embedding takes."""
        return position_ids[:, 0]

    @torch.no_grad()
    def new_caches(self, pages: int, state: DecodeState) -> list[LayerKVCache]:
        """
        Return the empty cache of each layer.

        A token that goes through a block shows the shape of keys and values: of a shard it is that of its own heads.
        """
        device = state.next_token.device
        hidden_states = self.embed(torch.zeros(1, 1, dtype=torch.int64, device=device))
        positions = torch.zeros(1, self.coordinates, 1, dtype=torch.int64, device=device)
        recorder = PromptRecorder()
        factors = self.rotary_emb(hidden_states, self.shape_position_ids(positions))
        run_block(self.blocks[0], recorder, hidden_states, factors, {"attention_mask": None})
        _, K, _, D = recorder.keys.shape

        def zeros() -> torch.Tensor:
            return torch.zeros(pages, K, PAGE_TOKENS, D, dtype=recorder.keys.dtype, device=device)

        return [LayerKVCache(zeros(), zeros(), state.page_table, state.cache_length) for _ in self.blocks]
