"""Loading takes little more host memory than the process's share of the weights: pages of files count too."""

import json

import pytest
from safetensors import safe_open

from benchmarks import load_memory
from tools import random_checkpoint
from utils.checkpoint.model import Checkpoint

SHAPE = {"hidden_size": 1024, "ffn_hidden_size": 2816, "num_layers": 6, "padded_vocab_size": 32000}
RUNS = {"": 1, "none": 2, "cpu": 2}  # ZeRO-3's offload, if it is ZeRO-3 -> processes
ALLOWANCE = 160 << 20  # allocator, buffers of collectives, and the 64 MiB that weight_files.py maps at once


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of 342 MB in float16 in one file."""
    directory = tmp_path_factory.mktemp("checkpoint") / "chatglm3-small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(random_checkpoint.GLM, "chatglm3-small", random_checkpoint.CHATGLM3 | SHAPE)
        random_checkpoint.write_checkpoint("chatglm3-small", directory, "cpu")
    return directory


def weight_sizes(checkpoint) -> list[int]:
    """Bytes of each weight in float32."""
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        return [4 * file.get_tensor(key).numel() for key in file.keys()]  # noqa: SIM118


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """An adapter on every linear layer of the blocks."""
    directory = tmp_path_factory.mktemp("adapter") / "adapter"
    load_memory.write_adapter(Checkpoint.open(str(checkpoint)), directory)
    return directory


@pytest.mark.parametrize("way, processes, adapts", [("tp", 2, False), ("tp", 2, True), ("merge", 1, True)])
def test_inference_takes_its_share(checkpoint, adapter, run_ranks, tmp_path, way, processes, adapts):
    """In float32 from float16 files; by tensor parallelism a process has embedding and head whole."""
    flags = f"--way {way} --processes {processes} --dtype float32 --checkpoint {checkpoint} --output_dir {tmp_path}"
    flags += f" --adapter_path {adapter}" if adapts else ""
    run_ranks(processes, f"benchmarks/load_memory.py --worker {flags}").check()
    sizes = weight_sizes(checkpoint)
    whole = 2 * max(sizes)
    bound = (sum(sizes) - whole) // processes + whole + max(sizes) + ALLOWANCE
    files = sorted(tmp_path.glob("rank-*.json"))
    peaks = [json.loads(file.read_text())["above_baseline_gib"] * load_memory.GIB for file in files]
    assert len(peaks) == processes and max(peaks) < bound, f"{max(peaks):,.0f} bytes, bound {bound:,}"


def test_a_process_takes_its_share(checkpoint, run_ranks):
    sizes, hashes = weight_sizes(checkpoint), set()
    for offload, processes in RUNS.items():
        run = run_ranks(processes, f"tests/helpers/load_peak.py {checkpoint} {offload}").check()
        lines = [json.loads(line) for line in run.out.splitlines() if line.startswith("[")]
        assert sorted(rank for rank, *_ in lines) == list(range(processes))
        for rank, taken, weights in lines:
            hashes.add(weights)
            bound = sum(sizes) // processes + max(sizes) + ALLOWANCE
            assert taken < bound, f"offload {offload!r}, rank {rank}: {taken:,} bytes, bound {bound:,}"
    assert len(hashes) == 1  # ZeRO-3 holds the same weights, bit for bit
