"""
A model whose weights DeepSpeed ZeRO-3 partitions, built empty and filled weight by weight.

In: a model class, its configuration and dtype; weights one at a time. Out: a model of which each rank holds its
partitions, on the card or offloaded to the CPU. Called by utils/checkpoint/model.py. transformers loads such a model
from a state dict of all weights, gathers each and broadcasts it; here every rank copies its part from the file.
"""

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ContextManagers


def build_partitioned(
    model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """Return the model partitioned by ZeRO-3, its weights not set. Every process must call it."""
    # The contexts of `from_pretrained`: deepspeed.zero.Init, and buffers that keep their dtype.
    with ContextManagers(model_class.get_init_context(dtype, False, False, None)):  # no flag of it is set
        model = model_class(config)
    model.tie_weights()
    return model


def set_partition(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """
    Copy this rank's part of a whole weight into a partitioned parameter. Every process must call it.

    Args:
        value: the whole weight, on the CPU, in any floating-point dtype.
    """
    import deepspeed

    partition = parameter.ds_tensor
    # ZeRO++ keeps a second copy, or quantises: only DeepSpeed's own gathering and partitioning sets those.
    if parameter.ds_secondary_tensor is not None or hasattr(partition, "ds_quant_scale"):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
        return
    # DeepSpeed has no public function that sets a part. Its layout: the flattened weight, cut into parts of equal
    # length, the last one padded.
    start = parameter.ds_zero_partition_rank * partition.ds_numel
    part = value.reshape(-1)[start : start + partition.ds_numel]
    partition.narrow(0, 0, part.numel()).copy_(part)
