"""ChatGLM-6B: positions of two coordinates, and a prompt whose tokens attend to each other in both directions."""

import torch
from torch import nn

from utils.inference.engine.models.base import ServedModel
from utils.inference.engine.scheduler import TokenSequence
from utils.models.modeling_chatglm import ChatGLMForConditionalGeneration, derive_position_ids


class ServedChatGLM(ServedModel):
    """Whole prompts: the first token's keys depend on the last one, so no two prompts have a beginning in common."""

    coordinates = 2
    splits_prompts = False

    def __init__(self, model: ChatGLMForConditionalGeneration):
        super().__init__(model)
        self.config = model.config

    @property
    def norm(self) -> nn.Module:
        """The norm before the head."""
        return self.body.final_layernorm

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
