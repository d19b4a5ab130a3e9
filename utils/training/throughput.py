"""How fast a training run is: real tokens a second, padding, model FLOPs utilisation, memory."""

import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from utils.distributed.collectives import gather_from_all

# Dense bfloat16 TFLOP/s by the makers' data sheets, by a part of the card's name; the first that matches holds.
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "H20": 148,
    "B200": 2250,
    "A100": 312,
    "A800": 312,
    "H800": 989,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "4090": 165,
    "3090": 71,
}


def peak_tflops() -> int | None:
    """Of this machine's GPU; None where it is not in the table or there is none."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def gpu_peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


@dataclass
class Throughput:
    """
    Counts what passes through a process and the time that it takes. The first step, in which layers are compiled and
    memory is found, is timed apart.

    Args:
        token_flops: floating-point operations of a real token outside the head, forward and backward.
        target_flops: those of the head for a token that is trained on.
    """

    token_flops: float
    target_flops: float
    steps: int = -1  # on the clock, which the end of the first one starts
    first_step_seconds: float = 0.0
    batch_flops: float = 0.0  # of the micro-batch counted last

    def __post_init__(self):
        self.counts = Counter()
        self.begin = self.mark = (time.perf_counter(), Counter())

    @classmethod
    def of(cls, model: nn.Module, blocks: list[nn.Module]) -> "Throughput":
        """
        For a model whose base is frozen: two operations a weight and token in the forward pass and two in the backward
        pass, which makes the gradients of the activations alone. Attention and adapter are left out.
        """
        linear = [layer for block in blocks for layer in block.modules() if hasattr(layer, "out_features")]
        weights = sum(layer.in_features * layer.out_features for layer in linear if not hasattr(layer, "base_layer"))
        head = model.get_output_embeddings()
        return cls(4.0 * weights, 4.0 * head.in_features * head.out_features)

    def count(self, real: int, total: int, targets: int) -> None:
        """The tokens of one micro-batch: without padding, with it, and trained on."""
        self.counts.update(real=real, total=total, targets=targets)
        self.batch_flops = self.flops(real, targets)

    def flops(self, real: int, targets: int) -> float:
        return real * self.token_flops + targets * self.target_flops

    def end_step(self) -> None:
        """After each optimizer step."""
        self.steps += 1
        if self.steps == 0:
            self._wait()
            self.first_step_seconds = time.perf_counter() - self.begin[0]
            self.begin = self.mark = (time.perf_counter(), self.counts.copy())

    def leave_out(self, seconds: float) -> None:
        """Of what was counted last, seconds in which nothing was trained."""
        self.begin, self.mark = ((moment + seconds, counts) for moment, counts in (self.begin, self.mark))

    def seconds_left(self, steps: int) -> float | None:
        """Until so many more steps are done; None in the first."""
        return round(steps * self.seconds_a_step()) if self.steps > 0 else None

    def seconds_a_step(self) -> float:
        """Of those after the first, of which there must be one."""
        return (time.perf_counter() - self.begin[0]) / self.steps

    def read(self, whole_run: bool = False) -> dict[str, float]:
        """
        Speed since the last reading, or since the end of the first step, over all processes, all of which must call
        it: real tokens a second, share of padding, utilisation of a GPU's peak, and the most memory one had in use.
        """
        self._wait()
        now = (time.perf_counter(), self.counts.copy())
        then, self.mark = (self.begin if whole_run else self.mark), now
        everyone = gather_from_all((now[1] - then[1], gpu_peak_gib()))
        counts = sum((counts for counts, _ in everyone), Counter())
        if not counts["real"]:
            return {}
        seconds = now[0] - then[0]
        found = {
            "tokens_per_second": round(counts["real"] / seconds, 1),
            "padding": round(1 - counts["real"] / counts["total"], 4),
        }
        if peak := peak_tflops():
            flops = self.flops(counts["real"], counts["targets"])
            found |= {"mfu": round(flops / seconds / len(everyone) / peak / 1e12, 4), "of_peak_tflops": peak}
        if torch.cuda.is_available():
            found["peak_gib"] = round(max(peak for _, peak in everyone), 2)
        return found

    @staticmethod
    def _wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
