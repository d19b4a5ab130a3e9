"""
Tensor parallelism: a checkpoint in, this process's shard of its heads and MLPs out. `load_on_processes` calls it.

Each weight is cut as it is read, and an adapter is merged into what is left of it: no process ever holds the model.
DeepSpeed's own ways take a whole model, and ChatGLM-6B's `query_key_value` as [Q; K; V] where it goes head by head,
and its MLP as gated; both compute something else without an error. So each generation names its layers split by
output rows and by input columns, and DeepSpeed only sums over the processes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from utils.checkpoint.model import Checkpoint, set_tensor
from utils.common.errors import UsageError
from utils.common.processes import process_rank, world_size
from utils.inference.adapters import AttachAdapters
from utils.layers.replace import replace_layers
from utils.lora.formats import Adapter
from utils.models.architectures import TensorParallelPlan
from utils.models.family import QKV

# Values of B A: larger ones, freed between weights that stay, would leave holes in the host's memory.
MERGED_AT_ONCE = 1 << 20


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


@dataclass(frozen=True)
class Place:
    """A process's place among those that share a model."""

    number: int
    processes: int
    all_reduce: Callable[[torch.Tensor], Any]  # sums a tensor over them, in place

    @classmethod
    def in_group(cls, group: torch.distributed.ProcessGroup) -> "Place":
        """Return this process's place in a group, which sums by DeepSpeed."""
        from deepspeed.comm import comm

        processes = torch.distributed.get_world_size(group)
        if processes < world_size():  # on the CPU its sum over shared memory ignores groups
            comm.cdb.shm_vector_kernel_level = 0
        return cls(torch.distributed.get_rank(group), processes, partial(comm.inference_all_reduce, group=group))

    def share(self, size: int) -> range:
        """Return this process's numbers of 0 to `size` - 1; shares differ by one where they are not even."""
        return range(size * self.number // self.processes, size * (self.number + 1) // self.processes)


@dataclass(frozen=True)
class Shard:
    """What one process holds of a linear layer: ranges of its outputs or of its inputs; None is all of them."""

    outputs: tuple[range, ...] | None = None
    inputs: tuple[range, ...] | None = None

    def of_outputs(self, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Return a copy of this process's rows of (out, ...)."""
        return _copy_ranges(tensor, 0, self.outputs, device, dtype)

    def of_inputs(self, matrix: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Return a copy of this process's columns of (..., in)."""
        return _copy_ranges(matrix, 1, self.inputs, device, dtype)

    def of(self, kind: str, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Return a copy of what this process holds of a "weight" (out, in) or "bias" (out,)."""
        by_inputs = self.inputs is not None and kind == "weight"
        return (self.of_inputs if by_inputs else self.of_outputs)(tensor, device, dtype)


def _copy_ranges(
    tensor: torch.Tensor,
    dimension: int,
    ranges: tuple[range, ...] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    ranges = ranges or (range(tensor.shape[dimension]),)
    sizes = list(tensor.shape)
    sizes[dimension] = sum(map(len, ranges))
    copy = torch.empty(sizes, device=device, dtype=dtype)
    start = 0
    for taken in ranges:  # converted on `device`, so the host needs no copy in another dtype
        piece = tensor.narrow(dimension, taken.start, len(taken)).to(device)
        copy.narrow(dimension, start, len(taken)).copy_(piece)
        start += len(taken)
    return copy


WHOLE = Shard()


class RowParallelLinear(nn.Linear):
    """`nn.Linear` with some of the inputs: `all_reduce` sums the outputs over the processes, in place."""

    def __init__(self, stock: nn.Linear, in_features: int, all_reduce: Callable[[torch.Tensor], Any]):
        super().__init__(in_features, stock.out_features, stock.bias is not None, "meta", stock.weight.dtype)
        self.all_reduce = all_reduce

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, in) of this process -> (B, T, out), the same on all processes."""
        output = nn.functional.linear(hidden_states, self.weight)
        self.all_reduce(output)
        return output if self.bias is None else output + self.bias  # which every process holds


def load_shards(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    place: Place,
    adapters: AttachAdapters,
) -> PreTrainedModel:
    """
    Load this process's shard of the attention heads and MLPs, and the other layers whole, weight by weight.

    All processes that share the model must then give the same inputs; they get the same logits. Needs `check_heads`.

    Args:
        device: of the shards.
        adapters: at most one, which is merged into the weights.

    Raises:
        UsageError: see `Checkpoint.checked_weights` and `AttachAdapters.read`; or the adapter is on a tied head.
    """
    model = checkpoint.empty_model(dtype)
    weights = checkpoint.checked_weights(model)
    adapter = adapters.read(model, checkpoint.weight)
    tied = adapter.layers.keys() & {key.removesuffix(".weight") for key in model.all_tied_weights_keys}
    if tied:
        raise UsageError(f"the adapter is on {min(tied)}, whose weight is the embedding's too: use --tp_size 1")
    shards = cut_layers(model, checkpoint.architecture.tensor_parallel, place)
    for key, tensor in weights:
        layer, _, kind = key.rpartition(".")
        shard = shards.get(layer, WHOLE)
        set_tensor(model, key, shard.of(kind, tensor, device, dtype), device)
        if kind == "weight" and layer in adapter.layers:
            _merge(model.get_parameter(key), adapter, layer, shard)
    model.tie_weights()
    return model.to(device)  # the rotary frequencies


@torch.no_grad()
def _merge(weight: nn.Parameter, adapter: Adapter, layer: str, shard: Shard) -> None:
    """Add the shard of an adapter's scaled B A to the shard of a weight, in float32, rounded once as PEFT does."""
    A, B = adapter.factors(layer)
    B, A = shard.of_outputs(B, weight.device, torch.float32), shard.of_inputs(A, weight.device, torch.float32)
    rows = max(1, MERGED_AT_ONCE // weight.shape[1])
    for weight_rows, B_rows in zip(weight.split(rows), B.split(rows), strict=True):
        weight_rows += B_rows @ A * adapter.layers[layer].scaling


def cut_layers(model: PreTrainedModel, plan: TensorParallelPlan, place: Place) -> dict[str, Shard]:
    """
    Replace the linear layers of an empty model that `plan` splits by ones of this process's sizes, in place.

    Key/value heads are repeated until every process has as many: 2 become 4 for 4 processes, and 6 for 3. The repeated
    heads serve fewer query heads each, so attention computes the same. The number of query heads, which both divide,
    is a multiple of theirs.

    Returns:
        What this process holds of each of these layers, by name.
    """
    groups = getattr(model.config, "num_key_value_heads", place.processes)
    heads = math.lcm(groups, place.processes)
    times = heads // groups
    shards: dict[str, Shard] = {}

    def find_shard(path: str, layer: nn.Linear) -> Shard | None:
        def is_one_of(names: tuple[str, ...]) -> bool:
            return any(path.endswith(f".{name}") for name in names)

        if is_one_of(plan.row_parallel):
            return Shard(inputs=(place.share(layer.in_features),))
        if is_one_of(plan.packed_column_parallel):
            half = layer.out_features // 2
            first = place.share(half)
            return Shard(outputs=(first, range(half + first.start, half + first.stop)))
        if not is_one_of(plan.column_parallel):
            return None
        if is_one_of(QKV[1:]):
            size = layer.out_features // groups
            return Shard(outputs=tuple(range(h // times * size, (h // times + 1) * size) for h in place.share(heads)))
        return Shard(outputs=(place.share(layer.out_features),))

    def build(path: str, layer: nn.Module) -> nn.Module | None:
        shard = find_shard(path, layer) if isinstance(layer, nn.Linear) else None
        if shard is None:
            return None
        shards[path] = shard
        if shard.inputs is not None:
            return RowParallelLinear(layer, sum(map(len, shard.inputs)), place.all_reduce)
        rows = sum(map(len, shard.outputs))
        return nn.Linear(layer.in_features, rows, layer.bias is not None, "meta", layer.weight.dtype)

    replace_layers(model, build)
    if times > 1:
        model.config.num_key_value_heads = heads
        for module in model.modules():
            if hasattr(module, "num_key_value_groups"):
                module.num_key_value_groups //= times
    return shards
