"""ChatGLM2-6B to GLM-4-0414, transformers' `GlmForCausalLM` and `Glm4ForCausalLM`."""

import torch

from utils.inference.engine.models.base import ServedModel
from utils.inference.engine.models.fused_glm import FusedGlmBlocks, can_fuse


class ServedGlm(ServedModel):
    """Causal prompts, positions that count tokens, keys and values in the cache."""

    @torch.no_grad()
    def fused_blocks(self, max_positions: int) -> FusedGlmBlocks | None:
        """Return the blocks by kernels alone, or None where they are not all of that kind."""
        if not all(map(can_fuse, self.blocks)):
            return None
        weight = self.embed.weight
        position_ids = torch.arange(max_positions, device=weight.device)[None]
        factors = self.rotary_emb(weight[None, :1], position_ids)  # (1, positions, F)
        return FusedGlmBlocks(self.blocks, self.norm, tuple(factor[0].contiguous() for factor in factors))
