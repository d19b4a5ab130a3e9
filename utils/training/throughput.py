"""
Measures how fast a training run is: real tokens a second, padding, model FLOPs utilisation (MFU), peak memory.

trainer.py counts each micro batch and reads the speed at every log; benchmarks/train_throughput.py uses the same
clock.
"""

import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from utils.distributed.collectives import gather_from_all

# Dense bfloat16 TFLOP/s from the makers' data sheets, by a substring of the GPU's name; the first match counts.
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


def peak_tflops(name: str | None = None) -> int | None:
    """
    Return the dense bfloat16 TFLOP/s of a GPU by its name, by default this machine's.

    None if PEAK_TFLOPS lacks it, or there is no GPU.
    """
    if name is None and not torch.cuda.is_available():
        return None
    name = (name or torch.cuda.get_device_name()).lower()
    return next((peak for substring, peak in PEAK_TFLOPS.items() if substring.lower() in name), None)


def gpu_peak_gib() -> float:
    """
    Return the peak of this process's GPU memory in GiB.

    Without a GPU it is 0.
    """
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


@dataclass
class Throughput:
    """
    Counts tokens and time of a process's optimizer steps.

    The first step, which compiles layers and grows the allocator's memory, is timed separately.

    Args:
        token_flops: floating-point operations of a real token outside the head, forward and backward.
        target_flops: those of the head for a token that is trained on.
    """

    token_flops: float
    target_flops: float
    steps: int = -1  # after the first, whose end starts the clock
    first_step_seconds: float = 0.0
    batch_flops: float = 0.0  # of the last micro batch

    def __post_init__(self):
        self.counts = Counter()
        # (seconds, token counts) at the end of the first step, and at the last measurement
        self.begin = self.mark = (time.perf_counter(), Counter())

    @classmethod
    def of(cls, model: nn.Module, blocks: list[nn.Module]) -> "Throughput":
        """
        Return the counter for a model whose base is frozen.

        A weight costs two operations per token in the forward pass and two in the backward pass, which computes the
        gradients of activations only. Attention and adapter are left out.
        """
        linear = [layer for block in blocks for layer in block.modules() if hasattr(layer, "out_features")]
        weights = sum(layer.in_features * layer.out_features for layer in linear if not hasattr(layer, "base_layer"))
        head = model.get_output_embeddings()
        return cls(4.0 * weights, 4.0 * head.in_features * head.out_features)

    def count(self, real: int, total: int, targets: int) -> None:
        """
        Add the tokens of one micro batch.

        `real` counts them without padding, `total` with it, `targets` those that are trained on.
        """
        self.counts.update(real=real, total=total, targets=targets)
        self.batch_flops = self.flops(real, targets)

    def flops(self, real: int, targets: int) -> float:
        """Return the floating-point operations of these numbers of real and target tokens."""
        return real * self.token_flops + targets * self.target_flops

    def end_step(self) -> None:
        """Count an optimizer step; call it after each."""
        self.steps += 1
        if self.steps == 0:
            self._wait()
            self.first_step_seconds = time.perf_counter() - self.begin[0]
            self.begin = self.mark = (time.perf_counter(), self.counts.copy())

    def exclude(self, seconds: float) -> None:
        """Exclude `seconds` (evaluation) from the throughput clock."""
        self.begin, self.mark = ((moment + seconds, counts) for moment, counts in (self.begin, self.mark))

    def seconds_left(self, steps: int) -> float | None:
        """
        Return the seconds that `steps` more steps will take.

        In the first step that is not known: None.
        """
        return round(steps * self.seconds_per_step()) if self.steps > 0 else None

    def seconds_per_step(self) -> float:
        """
        Return the mean time of the steps after the first.

        At least one must have been made.
        """
        return (time.perf_counter() - self.begin[0]) / self.steps

    def measure(self, whole_run: bool = False) -> dict[str, float]:
        """
        Return the speed of all processes since the last measurement.

        With `whole_run` it is the speed since the end of the first step. Every process must call it.

        Returns:
            `tokens_per_second` (real tokens), `padding` (share of all tokens) and, with a known GPU, `mfu` (share of
            `of_peak_tflops`), if tokens were counted; on a GPU `peak_gib`, the largest of all processes.
        """
        self._wait()
        now = (time.perf_counter(), self.counts.copy())
        then = self.begin if whole_run else self.mark
        self.mark = now
        everyone = gather_from_all((now[1] - then[1], gpu_peak_gib()))
        counts = sum((counts for counts, _ in everyone), Counter())
        metrics = {}
        if counts["real"]:
            seconds = now[0] - then[0]
            metrics["tokens_per_second"] = round(counts["real"] / seconds, 1)
            metrics["padding"] = round(1 - counts["real"] / counts["total"], 4)
            if peak := peak_tflops():
                flops = self.flops(counts["real"], counts["targets"])
                metrics |= {"mfu": round(flops / seconds / len(everyone) / peak / 1e12, 4), "of_peak_tflops": peak}
        if torch.cuda.is_available():
            metrics["peak_gib"] = round(max(peak for _, peak in everyone), 2)
        return metrics

    @staticmethod
    def _wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
