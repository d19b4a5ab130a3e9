"""FSDP2 as accelerate brings it, for a frozen base with an adapter in another dtype; also without a GPU."""

import os

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType


def launched_by_accelerate_with_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def settle_fsdp(accelerator: Accelerator) -> None:
    """
    Shards by `fully_shard` where accelerate's config says so: on CPUs, where accelerate would fall back to DDP in
    silence, too. Every parameter is gathered in its own dtype: the base has the one to compute in, the adapter is
    float32 and so are its gradients' sums. accelerate's policy would cast all to the run's dtype, the loss with them.
    """
    if not launched_by_accelerate_with_fsdp():
        return
    state = accelerator.state
    if state.distributed_type is not DistributedType.FSDP:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin.mixed_precision_policy = None
