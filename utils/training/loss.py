"""The language-model head and its loss on target positions alone, a chunk at a time."""

from types import MethodType

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from utils.layers.quantization import QuantizedLinear, dequantize

CHUNK = 2048  # target tokens whose logits exist at once


def cross_entropy(logits: torch.Tensor, target_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Logits (n, V) and (n,) int64 -> the summed cross-entropy in float32 and its gradient (n, V) in the logits' dtype.
    Compiled, nothing of the logits' size is written but the gradient.
    """
    log_shares = logits.log_softmax(-1, dtype=torch.float32)
    total = -log_shares.gather(1, target_ids[:, None]).sum()
    is_target = torch.arange(logits.shape[1], device=logits.device) == target_ids[:, None]
    return total, log_shares.exp_().add_(is_target, alpha=-1).to(logits.dtype)


class _HeadLoss(torch.autograd.Function):
    """
    Summed cross-entropy of a frozen head. The gradient of the hidden states is made with the loss, chunk by chunk, so
    that neither the logits nor the head's weight wait for the backward pass.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, target_ids, loss_of_logits):
        total = hidden_states.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden_states, dtype=torch.float32)
        for start in range(0, len(target_ids), CHUNK):
            chunk = slice(start, start + CHUNK)
            loss, of_logits = loss_of_logits(hidden_states[chunk] @ weight.T, target_ids[chunk])
            total += loss
            gradient[chunk] = (of_logits @ weight).float()
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden_states.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(ctx.dtype), None, None, None


def use_target_loss(model: PreTrainedModel, compiled: bool = False) -> None:
    """
    Makes `model(..., target_positions, target_ids)` return the loss of those targets and no logits: the hidden state
    at each of `target_positions` (N,), counted over the flattened batch, predicts one of `target_ids` (N,). With
    `num_items_in_batch` the loss is their sum over that many, else their mean. Other calls stay as they were.

    The head must be frozen and without a bias. Its part runs as the head's own forward, which is where ZeRO-3 gathers
    its weight. With `compiled` what is done with the logits is compiled.
    """
    loss_of_logits = torch.compile(cross_entropy) if compiled else cross_entropy
    head = model.get_output_embeddings()
    plain_head, plain_forward = head.forward, model.forward

    def head_forward(self: nn.Linear, hidden_states, target_ids=None):
        if target_ids is None:
            return plain_head(hidden_states)
        weight = self.weight
        if isinstance(self, QuantizedLinear):
            weight = dequantize(weight, self.weight_scale, self.bits, hidden_states.dtype)
        return _HeadLoss.apply(hidden_states, weight.to(hidden_states.dtype), target_ids, loss_of_logits)

    def forward(self, *args, target_positions=None, target_ids=None, labels=None, num_items_in_batch=None, **kwargs):
        if target_positions is None:
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            return plain_forward(*args, labels=labels, **kwargs)
        kwargs["use_cache"] = False
        # The weights have the dtype to compute in already; autocast would make LayerNorm answer in float32.
        with torch.autocast(self.device.type, enabled=False):
            hidden_states = getattr(self, self.base_model_prefix)(*args, **kwargs).last_hidden_state  # (B, T, E)
            predicting = hidden_states.flatten(0, 1).index_select(0, target_positions)  # (N, E)
            total = self.get_output_embeddings()(predicting, target_ids=target_ids)
        return CausalLMOutput(loss=total / (len(target_ids) if num_items_in_batch is None else num_items_in_batch))

    head.forward, model.forward = MethodType(head_forward, head), MethodType(forward, model)
