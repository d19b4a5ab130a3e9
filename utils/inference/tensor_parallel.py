"""
Tensor parallelism: a whole model in, this process's shard of its heads and MLPs out. `load_on_processes` calls it.

DeepSpeed's inference engine does the splitting, but `deepspeed.init_inference` would take ChatGLM-6B's
`query_key_value` as [Q; K; V] where it goes head by head, and its MLP as gated; both compute something else without
an error. So each generation names its layers split by output rows and by input columns, and that goes to DeepSpeed
through the hook that its layer replacement reads.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from utils.common.errors import UsageError
from utils.common.processes import process_rank, world_size
from utils.models.architectures import architecture_of
from utils.models.family import Generation


def tensor_parallel_groups(tp_size: int) -> tuple[Any, Any, int]:
    """
    Return the group of the `tp_size` processes of this replica, the same over gloo, and its first process's rank.

    Every process must call it.
    """
    own = None
    for start in range(0, world_size(), tp_size):
        ranks = list(range(start, start + tp_size))
        groups = torch.distributed.new_group(ranks), torch.distributed.new_group(ranks, backend="gloo")
        if process_rank() in ranks:
            own = (*groups, start)
    return own


def check_heads(config: PretrainedConfig, processes: int) -> None:
    """
    Check that the attention heads split evenly over the processes.

    Raises:
        UsageError: they do not.
    """
    heads = config.num_attention_heads
    if heads % processes:
        fitting = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise UsageError(
            f"{heads} attention heads cannot be split over {processes} processes: use {', '.join(fitting)}"
        )


def shard_with_deepspeed(
    model: PreTrainedModel, generation: Generation, dtype: torch.dtype, group: torch.distributed.ProcessGroup
) -> PreTrainedModel:
    """
    Split attention heads and MLPs over the processes of `group`, and move this process's shard to its device.

    All processes of the group must then give the same inputs; they get the same logits. Needs `check_heads`.
    """
    from deepspeed.comm import comm
    from deepspeed.inference.config import DeepSpeedInferenceConfig
    from deepspeed.inference.engine import InferenceEngine
    from deepspeed.module_inject.autotp_config import AutoTPConfig, PartitionType, TPLayerSpec

    tp_size = torch.distributed.get_world_size(group)
    if tp_size < world_size():  # on the CPU its all-reduce over shared memory ignores groups
        comm.cdb.shm_vector_kernel_level = 0
    repeat_key_value_heads(model, tp_size)
    plan = architecture_of(generation).tensor_parallel
    partition = AutoTPConfig(
        tp_size=tp_size,
        layer_specs=[
            TPLayerSpec(patterns=[rf".*\b{name}\.weight$" for name in names], partition_type=kind, shape=shape)
            for names, kind, shape in (
                (plan.column_parallel, PartitionType.COLUMN, None),
                (plan.packed_column_parallel, PartitionType.COLUMN, (2, -1)),
                (plan.row_parallel, PartitionType.ROW, None),
            )
        ],
        use_default_specs=False,
    )

    class PartitionedInferenceConfig(DeepSpeedInferenceConfig):
        """Has the method by which DeepSpeed's layer replacement asks for a partition; the stock class lacks it."""

        def get_partition_config_object(self) -> AutoTPConfig:
            return partition

    # DeepSpeed splits the MLP in grains of 64 and gives the last rank the rest, so a rank might get none.
    grain = 64 if model.config.intermediate_size % (64 * tp_size) == 0 else 1
    # `deepspeed.init_inference` does the same two calls, with the stock configuration.
    config = PartitionedInferenceConfig(
        dtype=dtype,
        tensor_parallel={
            "tp_size": tp_size,
            "tp_grain_size": grain,
            # The engine reads its group from "mpu", its layers from "tp_group": without that they stay whole.
            "mpu": SimpleNamespace(get_model_parallel_group=lambda: group),
            "tp_group": group,
        },
        injection_policy={plan.block: plan.row_parallel},
    )
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sharded = InferenceEngine(model, config=config).module
    for name, buffer in buffers.items():  # DeepSpeed rounds the rotary frequencies to `dtype`: they stay float32
        module, _, kind = name.rpartition(".")
        setattr(sharded.get_submodule(module), kind, buffer.to(sharded.get_buffer(name).device))
    return sharded


def repeat_key_value_heads(model: PreTrainedModel, processes: int) -> None:
    """
    Repeat key/value heads, in place, until every process has as many: 2 become 4 for 4 processes, and 6 for 3.

    The repeated heads serve fewer query heads each, so attention computes the same. The number of query heads, which
    both divide, is a multiple of theirs.
    """
    groups = getattr(model.config, "num_key_value_heads", processes)
    times = math.lcm(groups, processes) // groups
    if times == 1:
        return
    for module in model.modules():
        if not hasattr(module, "num_key_value_groups"):
            continue
        for projection in (module.k_proj, module.v_proj):
            for name, parameter in list(projection.named_parameters()):
                by_head = parameter.data.view(groups, module.head_dim, *parameter.shape[1:])
                repeated = by_head.repeat_interleave(times, dim=0).flatten(0, 1)
                setattr(projection, name, torch.nn.Parameter(repeated, requires_grad=False))
            projection.out_features *= times
        module.num_key_value_groups //= times
    model.config.num_key_value_heads *= times
