"""CUDA graphs by key: work that the host captures once and then only replays. Used by `ModelRunner`."""

import time
from collections.abc import Callable, Hashable

import torch


class CudaGraphs:
    """Captured graphs. They share one memory pool, so no two may run at once."""

    def __init__(self):
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self.graphs

    def capture(self, key: Hashable, call: Callable[[], None]) -> float:
        """Run `call` once, which compiles it, then captures it; return the seconds that took."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # NCCL's threads call CUDA too
            call()
        self.graphs[key] = graph
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def replay(self, key: Hashable) -> None:
        """Launch the graph captured under `key`."""
        self.graphs[key].replay()
