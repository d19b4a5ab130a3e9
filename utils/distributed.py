"""Which launcher, which rank, which backend; on GPUs and without."""

import os
import signal
import socket
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from utils.errors import UsageError
from utils.extension_builds import remove_stale_build_locks
from utils.peers import Peers
from utils.processes import end_with_parent
from utils.terminal_text import visible

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed asks once, at its first import


LONG = timedelta(days=7)
_peers: list[Peers] = []  # of this process, where there are others

T = TypeVar("T")


def process_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_by_accelerate_with_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def is_main_process() -> bool:
    return process_rank() == 0


def print_once(message: str) -> None:
    """Prints on rank 0 alone."""
    if is_main_process():
        print(visible(message), flush=True)


def check_port() -> None:
    """
    Raises:
        UsageError: this process is to listen where another one listens already.
    """
    hosts_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun listens, and fails there
    if world_size() == 1 or process_rank() != 0 or not hosts_store or "MASTER_PORT" not in os.environ:
        return
    port = int(os.environ["MASTER_PORT"])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            raise UsageError(
                f"port {port} is in use, by another run perhaps: give the launcher --master_port"
            ) from None


def init_process_group(use_deepspeed: bool, mend: str = "the same command goes on where this one was") -> None:
    """
    Joins the processes the launcher started: NCCL with GPUs, gloo without. A lone process joins nothing, unless
    DeepSpeed asks for a group of one. `mend` is what to do when a process is lost.

    On the CPU this must come before `TrainingArguments`, which leaves the group to be made later than `zero.Init`
    needs it.
    """
    if "LOCAL_RANK" in os.environ:
        end_with_parent(signal.SIGTERM)  # the launcher
    if world_size() == 1:
        if not use_deepspeed:
            return
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
            os.environ.setdefault(name, value)
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = str(free_port())
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    if use_deepspeed:
        init_deepspeed()
    elif not torch.distributed.is_initialized():
        torch.distributed.init_process_group(_backend(), **_timeout())
    if world_size() > 1:
        _peers.append(Peers(process_rank(), world_size(), mend))


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def _timeout() -> dict[str, timedelta]:
    """
    Of a collective. gloo's outlasts any difference in work and any suspension: `Peers` sees who is gone. NCCL's is its
    own, which ends what hangs on a device.
    """
    return {"timeout": LONG} if _backend() == "gloo" else {}


def init_deepspeed() -> None:
    """Makes the process group known to DeepSpeed, or lets it make one of the launcher's processes."""
    import deepspeed

    # DeepSpeed's shared-memory reduction reads the name that its own launcher gives this, and crashes without it.
    processes_here = os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local_rank() == 0:
        for lock in remove_stale_build_locks(several_machines=int(processes_here) < world_size()):
            print(f"removed {lock}, left behind by a build that was killed", flush=True)
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # What its checkpoints hold beside tensors; utils/__init__.py lets nothing else be loaded.
    torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])
    deepspeed.init_distributed(dist_backend=_backend(), **_timeout())
    if _backend() == "gloo":
        _forget_shared_memory()


def mean_over_processes(value: float) -> float:
    """The mean of every process's value; all must call it."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    torch.distributed.all_reduce(total)
    return total.item() / world_size()


def _forget_shared_memory() -> None:
    """
    Removes the name of the shared memory that DeepSpeed sums over on the CPU, once every process has it open: 66 MiB a
    process, which would stay in memory for good when the process ends.
    """
    torch.distributed.barrier()
    owner = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{process_rank()}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{owner}").unlink(missing_ok=True)


@cache
def _cpu_group() -> torch.distributed.ProcessGroup:
    """Over gloo, which needs no device."""
    return torch.distributed.new_group(backend="gloo", timeout=LONG)


def barrier() -> None:
    if world_size() > 1:
        torch.distributed.barrier(group=_cpu_group())


def gather_from_all(value: Any) -> list:
    """Every process's value, in the order of ranks, on every process; all must call it."""
    if world_size() == 1:
        return [value]
    gathered = [None] * world_size()
    torch.distributed.all_gather_object(gathered, value, group=_cpu_group())
    return gathered


def on_all_processes(call: Callable[[], T]) -> list[T]:
    """
    What `call` returns on every process, in the order of ranks, on every process; all must call it.

    Raises:
        UsageError: that of the first process where `call` raised one, on every process, and all leave the group.
    """
    try:
        outcome = call(), ()
    except UsageError as error:
        outcome = None, error.args
    outcomes = gather_from_all(outcome)
    faults = [lines for _, lines in outcomes if lines]
    if faults:
        shut_down()
        raise UsageError(*faults[0])
    return [value for value, _ in outcomes]


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process; all must call it. Does not wait for a GPU."""
    return bool(largest_of_processes(int(flag)))


def largest_of_processes(number: int) -> int:
    """The largest of every process's number; all must call it. Does not wait for a GPU."""
    if world_size() == 1:
        return number
    numbers = torch.tensor(number)
    torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX, group=_cpu_group())
    return int(numbers)


def gather_lists(values: list) -> list:
    """Every process's list, one after the other, on the main process; all must call it, at any distance in time."""
    if world_size() == 1:
        return values
    gathered = [None] * world_size() if is_main_process() else None
    torch.distributed.gather_object(values, gathered, group=_cpu_group())
    return [value for part in gathered for value in part] if is_main_process() else []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def shut_down() -> None:
    """
    Leaves the process group, so that no rank ends while another still talks to it. CUDA graphs with NCCL's sums in
    them must be gone by then: with an engine still there, it did not return.
    """
    if _peers:
        barrier()
        _peers.pop().close()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
