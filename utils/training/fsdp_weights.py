"""
Base weights under FSDP2: placeholders until the model is sharded, then each process's rows from the files.

In: a checkpoint, and a model that accelerate has sharded by `fully_shard`. Out: the model, each process's shards
filled. prepare_model.py makes the placeholders, trainer.py fills. accelerate would have a whole model in every process
or in the first one, and torch loads sharded checkpoints only from its own format.
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from peft import PeftModel
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from utils.checkpoint.model import Checkpoint
from utils.common.processes import launched_by_accelerate_with_fsdp
from utils.layers.fused_qkv import QKV_PROJ
from utils.models.family import QKV


def configure_fsdp(accelerator: Accelerator) -> None:
    """
    Make accelerate shard by `fully_shard` where its config says FSDP.

    On CPUs it would silently use DDP. Every parameter is gathered in its own dtype: the base already has the one to
    compute in, the adapter and the sums of its gradients are float32. accelerate's policy would cast all of them, and
    the loss, to the run's dtype.
    """
    if not launched_by_accelerate_with_fsdp():
        return
    state = accelerator.state
    if state.distributed_type is not DistributedType.FSDP:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin.mixed_precision_policy = None
    state.fsdp_plugin.cpu_ram_efficient_loading = False  # no process has the weights: `fill_shards` reads them


def placeholder_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model on the CPU with weights of one stored element, so that PEFT puts adapters beside them."""
    model = checkpoint.empty_model(dtype)
    _replace_parameters(model, lambda weight: torch.zeros((), dtype=weight.dtype).expand(weight.shape))
    return model


def move_base_to_meta(model: PeftModel) -> None:
    """Move the frozen weights of `model` to the meta device, in place; the layers made of them are then there too."""

    def to_meta(weight: torch.nn.Parameter) -> torch.Tensor:
        return weight if weight.requires_grad else torch.empty(weight.shape, dtype=weight.dtype, device="meta")

    _replace_parameters(model, to_meta)


def _replace_parameters(model: torch.nn.Module, replacement: Callable[[torch.nn.Parameter], torch.Tensor]) -> None:
    """Set `replacement(parameter)` in place of every parameter; tied ones stay tied."""
    replaced: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) not in replaced:
                new = replacement(weight)
                replaced[id(weight)] = new if new is weight else torch.nn.Parameter(new, weight.requires_grad)
            setattr(module, name, replaced[id(weight)])


def fill_shards(model: torch.nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
    """
    Fill the shards of the base weights that are on the meta device, weight by weight from the files.

    Args:
        model: sharded by `fully_shard`, its base prepared with `placeholder_model`.
        device: of the shards.

    Raises:
        UsageError: see `Checkpoint.load_model`; every process reads every weight, so on all of them.
    """
    names: dict[int, list[str]] = {}  # by parameter; a tied one has several
    parameters: dict[str, DTensor] = {}  # by the name that the empty model has
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight.is_meta:
            names.setdefault(id(weight), []).append(name)
            parameters[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = weight
    filled = {
        id(weight): torch.nn.Parameter(
            DTensor.from_local(
                torch.empty(weight.to_local().shape, dtype=weight.dtype, device=device),
                *(weight.device_mesh, weight.placements),
                shape=weight.shape,
                stride=weight.stride(),
            ),
            weight.requires_grad,
        )
        for weight in parameters.values()
    }
    empty = checkpoint.empty_model(dtype)
    for key, tensor in checkpoint.checked_weights(empty):
        name, start = _place(key, parameters, empty)
        _copy_rows(filled[id(parameters[name])], tensor, start)
    state = {name: filled[number] for number, tied in names.items() for name in tied}
    model.load_state_dict(state, strict=False, assign=True)


def _place(key: str, parameters: dict[str, DTensor], empty: PreTrainedModel) -> tuple[str, int]:
    """Return the parameter that holds a weight of the empty model, and the weight's first row in it."""
    if key in parameters:
        return key, 0
    attention, projection, kind = key.rsplit(".", 2)  # q, k and v in one, see utils/layers/fused_qkv.py
    before = QKV[: QKV.index(projection)]
    rows = sum(empty.get_parameter(f"{attention}.{other}.{kind}").shape[0] for other in before)
    return f"{attention}.{QKV_PROJ}.{kind}", rows


@torch.no_grad()
def _copy_rows(weight: DTensor, rows: torch.Tensor, start: int) -> None:
    """Copy what this process holds of `rows`, which begin at row `start` of the whole weight."""
    local = weight.to_local()
    dimension = next(i for i, placement in enumerate(weight.placements) if isinstance(placement, Shard))
    # `fully_shard` cuts the rows as torch.chunk does.
    per_process = -(-weight.shape[0] // weight.device_mesh.size(dimension))
    first = per_process * weight.device_mesh.get_local_rank(dimension)
    begin, end = max(first, start), min(first + local.shape[0], start + rows.shape[0])
    if begin < end:
        local[begin - first : end - first].copy_(rows[begin - start : end - start])
