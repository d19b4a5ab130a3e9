"""ChatGLM-6B: positions of two coordinates, and a prompt whose tokens attend to each other in both directions."""

import torch
from torch import nn

from utils.inference.engine.models.base import ServedModel
from utils.inference.engine.models.fused_blocks import has_kernels_for
from utils.inference.engine.models.fused_chatglm import FusedChatGLMBlocks
from utils.inference.engine.scheduler import TokenSequence
from utils.models.modeling_chatglm import ChatGLMForConditionalGeneration, derive_position_ids


class ServedChatGLM(ServedModel):
    """Whole prompts: the first token's keys depend on the last one, so no two prompts have a beginning in common."""

    coordinates = 2
    splits_prompts = False

    def __init__(self, model: ChatGLMForConditionalGeneration):
        super().__init__(model)
        self.config, self.dtype = model.config, model.dtype

    @property
    def norm(self) -> nn.Module:
        """The norm before the head."""
        return self.body.final_layernorm

    @torch.no_grad()
    def fused_blocks(self, max_positions: int) -> FusedChatGLMBlocks | None:
        """Return the blocks by kernels alone, or None where those do not run."""
        if not has_kernels_for(self.blocks[0].attention.head_dim, self.config.inner_hidden_size):
            return None
        weight = self.embed.weight
        positions = torch.arange(max_positions, device=weight.device)
        angles = positions[:, None].float() * self.rotary_emb.inv_freq(weight.device)  # (positions, D / 4)
        factors = tuple(factor.to(self.dtype) for factor in (angles.cos(), angles.sin()))
        return FusedChatGLMBlocks(self.blocks, self.norm, factors)

    def position_ids(self, sequence: TokenSequence, start: int, stop: int) -> list[list[int]]:
        """Those of the prompt by its special tokens; in the answer the second coordinate counts."""
        places, counts = derive_position_ids(torch.tensor([sequence.input_ids]), None, self.config)[0].tolist()
        answered = len(sequence.answer_ids)
        places += places[-1:] * answered
        counts += range(counts[-1] + 1, counts[-1] + 1 + answered)
        return [places[start:stop], counts[start:stop]]

    def shape_position_ids(self, position_ids: torch.Tensor) -> torch.Tensor:
        """(B, 2, T), as the rotary embedding takes them."""
        return position_ids
