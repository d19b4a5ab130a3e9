"""
torchrun --nproc_per_node=2 tests/helpers/load_peak.py CHECKPOINT [none | cpu]

Loads a checkpoint in float32; with a second word under ZeRO-3, its parameters offloaded to that device. Each process
prints one JSON array: its rank, the bytes of host memory that it took at its peak above those before, and a hash of
the weights.
"""

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.checkpoint.model import load_model
from utils.common.processes import process_rank
from utils.distributed.deepspeed_setup import init_deepspeed


def memory(kind: str) -> int:
    """VmRSS, the memory in bytes now, or VmHWM, its peak; pages of mapped files are part of both."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{kind}:"))


checkpoint, *offload = sys.argv[1:]
if offload:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    zero = {"stage": 3, "offload_param": {"device": offload[0]}}
    settings = HfDeepSpeedConfig(
        {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    )  # kept while it lives
    init_deepspeed()
Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM to VmRSS
before = memory("VmRSS")
model = load_model(checkpoint)
taken = memory("VmHWM") - before
weights = hashlib.sha256()
for name, parameter in model.named_parameters():
    if offload:
        with deepspeed.zero.GatheredParameters([parameter]):
            values = parameter.detach().clone()
    else:
        values = parameter.detach()
    weights.update(name.encode() + values.numpy().tobytes())
print(json.dumps([process_rank(), taken, weights.hexdigest()]), flush=True)
if offload:
    from utils.distributed.process_group import shut_down

    shut_down()
