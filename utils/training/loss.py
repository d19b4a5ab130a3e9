"""
The language-model head and its loss on target positions alone, a chunk of tokens at a time.

In: a model with its adapter attached, its head frozen. Out: the same model, whose head (`FrozenHeadCrossEntropy`)
returns the loss of given targets. Called by the training script. The head is frozen, so the gradient of the hidden
states is all that the backward pass needs: it is computed with the loss, chunk by chunk, and no (tokens, V) tensor of
a batch ever exists.

Not Liger's fused linear cross-entropy: it takes no quantised head, and it is a function of the weight, where ZeRO-3
gathers a weight only in its module's own forward.
"""

import torch
from peft import PeftModel
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from utils.layers.quantization import QuantizedLinear, dequantize
from utils.layers.replace import share_state, subclass_with

CHUNK_TOKENS = 2048  # targets whose logits exist at once: 0.6 GiB of a 150,000-token vocabulary in 16 bits


def cross_entropy(logits: torch.Tensor, target_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the summed cross-entropy and its gradient.

    Compiled, the gradient is the only tensor of the logits' size that is written.

    Args:
        logits: (N, V).
        target_ids: (N,) int64.

    Returns:
        A float32 scalar, and (N, V) in the logits' dtype.
    """
    log_probabilities = logits.log_softmax(-1, dtype=torch.float32)
    total = -log_probabilities.gather(1, target_ids[:, None]).sum()
    is_target = torch.arange(logits.shape[1], device=logits.device) == target_ids[:, None]  # (N, V)
    return total, log_probabilities.exp_().add_(is_target, alpha=-1).to(logits.dtype)


class _HeadLoss(torch.autograd.Function):
    """
    Hidden states (N, E), a frozen weight (V, E) and target ids (N,) -> the summed cross-entropy, float32.

    The gradient of the hidden states is computed with the loss, so that neither the logits nor the weight are kept
    for the backward pass.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, target_ids, loss_of_logits):
        total = hidden_states.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden_states, dtype=torch.float32)
        for start in range(0, len(target_ids), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            loss, logits_gradient = loss_of_logits(hidden_states[chunk] @ weight.T, target_ids[chunk])
            total += loss
            gradient[chunk] = (logits_gradient @ weight).float()
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden_states.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(ctx.dtype), None, None, None


class FrozenHeadCrossEntropy(nn.Linear):
    """
    A language-model head, frozen and without a bias, that returns logits, or the loss of given targets.

    The loss is part of the head's forward, because that is where ZeRO-3 gathers the head's weight.
    """

    @classmethod
    def from_stock(cls, stock: nn.Linear, compiled: bool) -> "FrozenHeadCrossEntropy":
        """
        Build the layer that stands in for `stock`, whose weight it shares.

        Args:
            compiled: whether torch.compile fuses what is done with the logits.
        """
        head = share_state(stock, cls)
        head.loss_of_logits = torch.compile(cross_entropy) if compiled else cross_entropy
        return head

    def full_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight (V, E) in `dtype`."""
        return self.weight.to(dtype)

    def forward(self, hidden_states: torch.Tensor, target_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states (..., E) -> logits (..., V); with `target_ids` (N,), (N, E) -> their summed loss, float32."""
        if target_ids is None:
            return super().forward(hidden_states)
        weight = self.full_weight(hidden_states.dtype)
        return _HeadLoss.apply(hidden_states, weight, target_ids, self.loss_of_logits)


class QuantizedHeadCrossEntropy(FrozenHeadCrossEntropy, QuantizedLinear):
    """`FrozenHeadCrossEntropy` of a head in integers."""

    def full_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight (V, E) in `dtype`."""
        return dequantize(self.weight, self.weight_scale, self.bits, dtype)


class WithTargetLoss:
    """What is added to a stock model class: a forward that returns the loss of targets."""

    def forward(self, *args, target_positions=None, target_ids=None, labels=None, num_items_in_batch=None, **kwargs):
        """
        Return the loss of the targets, and no logits; without `target_positions` what the stock model returns.

        Args:
            target_positions: (N,) int64, positions in the flattened batch whose hidden states predict.
            target_ids: (N,) int64, what they predict.
            num_items_in_batch: what the summed loss is divided by (default: N).
        """
        if target_positions is None:
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            return super().forward(*args, labels=labels, **kwargs)
        kwargs["use_cache"] = False
        # The weights have the dtype to compute in already; autocast would make LayerNorm answer in float32.
        with torch.autocast(self.device.type, enabled=False):
            hidden_states = getattr(self, self.base_model_prefix)(*args, **kwargs).last_hidden_state  # (B, T, E)
            predicting = hidden_states.flatten(0, 1).index_select(0, target_positions)  # (N, E)
            total = self.get_output_embeddings()(predicting, target_ids=target_ids)
        return CausalLMOutput(loss=total / (len(target_ids) if num_items_in_batch is None else num_items_in_batch))


def use_target_loss(model: PeftModel, compiled: bool = False) -> None:
    """
    Let `model(..., target_positions=..., target_ids=...)` return the loss of those targets, in place.

    Replaces the base model inside PEFT's wrapper and its head; they share every weight with the stock ones, and calls
    without targets return what they did. The head must be frozen and without a bias.

    Args:
        model: of any generation, with its adapter attached.
        compiled: whether torch.compile fuses what is done with the logits.
    """
    stock = model.get_base_model()
    if isinstance(stock, WithTargetLoss):  # done already
        return
    stock_head = stock.get_output_embeddings()
    head_class = QuantizedHeadCrossEntropy if isinstance(stock_head, QuantizedLinear) else FrozenHeadCrossEntropy
    base_model = share_state(stock, subclass_with(WithTargetLoss, type(stock)))
    base_model.set_output_embeddings(head_class.from_stock(stock_head, compiled))
    model.base_model.model = base_model
    # PEFT holds a method of the stock model, which would keep weights alive that FSDP2 shards in the new one.
    model.base_model_prepare_inputs_for_generation = base_model.prepare_inputs_for_generation
