"""Loading takes little more host memory than the process's share of the weights: pages of files count too."""

import json

import pytest
from safetensors import safe_open

from benchmarks import load_memory
from tools import random_checkpoint
from utils.checkpoint.model import Checkpoint

SHAPE = {"hidden_size": 1024, "ffn_hidden_size": 2816, "num_layers": 6, "padded_vocab_size": 32000}
RUNS = {"": 1, "none": 2, "cpu": 2}  # ZeRO-3's offload, if it is ZeRO-3 -> processes
ALLOWANCE = 128 << 20  # allocator, buffers of collectives, and the 64 MiB that weight_files.py maps at once


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


@pytest.mark.parametrize("adapts", (False, True))
def test_a_process_takes_its_shard(checkpoint, run_ranks, tmp_path, adapts):
    """By tensor parallelism it has half of the blocks, and the embedding and the head."""
    if adapts:
        load_memory.write_adapter(Checkpoint.open(str(checkpoint)), tmp_path / "adapter")
    adapter = tmp_path / "adapter" if adapts else ""
    run = run_ranks(2, f"tests/helpers/load_peak.py {checkpoint} tp {adapter}").check()
    lines = [json.loads(line) for line in run.out.splitlines() if line.startswith("[")]
    assert sorted(rank for rank, *_ in lines) == [0, 1]
    sizes = weight_sizes(checkpoint)
    bound = (sum(sizes) + 2 * max(sizes)) // 2 + max(sizes) + ALLOWANCE
    for rank, taken, _ in lines:
        assert taken < bound, f"rank {rank}: {taken:,} bytes, bound {bound:,}"


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
