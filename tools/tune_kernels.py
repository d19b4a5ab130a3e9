"""
python tools/tune_kernels.py --shape chatglm3-6b

Measures on this machine's GPU how the kernels of inference are fastest, for the sizes of a model, and writes it under
the name of the card into utils/kernels/tuned.json, which the kernels read: the tiles of attention and of INT8 and INT4
GEMMs, and up to how many rows our GEMMs beat torch's. What is not in the file goes by the kernels' own rules. Other
shapes and cards in it stay.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.common.script import run

import torch
from transformers import PretrainedConfig

from tools.random_checkpoint import CHATGLM, SHAPES, make_config
from utils.common.console import print_line
from utils.common.errors import UsageError
from utils.common.files import atomic_writer
from utils.common.flags import FlagParser
from utils.inference.engine.pages import PAGE_TOKENS
from utils.kernels import load_decode_attention, load_int_weight_gemm, load_skinny_gemm
from utils.kernels.tuning import TABLE_FILE, card_name, read_table
from utils.layers.fp8 import MIN_CAPABILITY, fp8_matmul, quantize_rows

KERNELS = ("decode_attention", "int_weight_gemm", "skinny_gemm")
CALLS, REPLAYS = 256, 5  # of one CUDA graph, and of how many the fastest counts
COLD_BYTES = 256 << 20  # of inputs that take turns, more than the L2 cache of any card
MIN_GAIN = 0.02  # of the time; less is noise
SEQUENCE_TOKENS = 512  # in the KV cache
BATCH_SIZES = (1, 16, 64, 256, 1024)  # of attention
GEMM_ROWS = (16, 64)  # that tiles of integers are measured with
REACH_ROWS = (8, 16, 32, 64, 128, 256)


class Case(NamedTuple):
    """A kernel at work: `call(settings, turn)` computes, with other inputs each turn."""

    kernel: str
    work: str
    settings: Any  # the kernel's own choice
    choices: dict[str, tuple[int, ...]]  # values of its fields to try
    call: Callable[[Any, int], object]


def microseconds(call: Callable[[int], object], device: torch.device) -> float:
    """Return the time of one call, of which each turn has its number, in a CUDA graph that runs many."""
    call(0)  # compiles
    if device.type != "cuda":  # Triton's interpreter
        started = time.perf_counter()
        call(1)
        return 1e6 * (time.perf_counter() - started)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(CALLS):
            call(turn)
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / CALLS)
    return min(times)


def fastest(case: Case, measure: Callable[[Callable[[int], object]], float]) -> tuple[Any, float, float]:
    """Change one field after another, each time keeping the fastest; return settings, their time, the first time."""
    from triton import CompilationError, OutOfResources

    best = case.settings
    first_time = best_time = measure(partial(case.call, best))
    for field, values in case.choices.items():
        for candidate in [replace(best, **{field: value}) for value in values if value != getattr(best, field)]:
            try:
                candidate_time = measure(partial(case.call, candidate))
            except (CompilationError, OutOfResources):
                continue
            if candidate_time < best_time:
                best, best_time = candidate, candidate_time
    return best, best_time, first_time


def turns(nbytes: int) -> int:
    """Return how many inputs of `nbytes` take turns, so that none is in the cache."""
    return min(CALLS, 1 + COLD_BYTES // nbytes) if torch.cuda.is_available() else 1


def attention_cases(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Decode attention of several batch sizes."""
    kernel = load_decode_attention()
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    pages = SEQUENCE_TOKENS // PAGE_TOKENS
    for B in BATCH_SIZES:
        count = turns(2 * B * K * SEQUENCE_TOKENS * D * dtype.itemsize)
        keys, values = torch.randn(2, count * B * pages, K, PAGE_TOKENS, D, dtype=dtype, device=device)
        tables = torch.randperm(count * B * pages, device=device).int().view(count, B, pages)
        query = torch.randn(B, H, 1, D, dtype=dtype, device=device)
        last = torch.full((B,), SEQUENCE_TOKENS - 1, device=device)

        def call(launch, turn, query=query, keys=keys, values=values, tables=tables, last=last):
            table = tables[turn % len(tables)]
            return kernel.decode_attention(query, keys, values, table, last, query.shape[-1] ** -0.5, launch)

        launch = kernel.launch_for(B * K, pages, device)
        splits = (1, 2, 4, 8) if B * K <= kernel.MAX_COUNTERS else (1,)
        choices = {"warps": (2, 4, 8), "stages": (2, 3, 4, 5), "splits": splits}
        yield Case("decode_attention", kernel.work_name(B * K), launch, choices, call)


def linear_sizes(config: PretrainedConfig) -> list[tuple[int, int, bool]]:
    """Return N, K and whether the first half gates the second, of the linear layers of a block."""
    E, inner, D = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.num_attention_heads * D, config.num_key_value_heads * D
    return [(query + 2 * key, E, False), (E, query, False), (2 * inner, E, True), (E, inner, False)]


def integer_cases(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """GEMMs over INT8 and INT4 weights."""
    kernel = load_int_weight_gemm()
    for bits in (8, 4):
        for N, K, gated in linear_sizes(config):
            shape = turns(N * K * bits // 8), N, K * bits // 8
            weights = torch.randint(-128, 128, shape, dtype=torch.int8, device=device)
            scale = torch.rand(N, device=device).half()
            for rows in GEMM_ROWS:
                x = torch.randn(rows, K, dtype=dtype, device=device)

                def call(tiling, turn, x=x, weights=weights, scale=scale, bits=bits, gated=gated):
                    return kernel.multiply(x, weights[turn % len(weights)], scale, None, bits, gated, tiling)

                tiling = kernel.tiling_for(rows, weights[0], bits, gated)
                block_c = kernel.TILE_ELEMENTS * bits // 8
                choices = {
                    "block_n": (32, 64, 128),
                    "block_c": (block_c // 2, block_c, 2 * block_c),
                    "warps": (4, 8),
                    "splits": (1,) if gated else (1, 2, 3, 4, 6, 8),
                    "stages": (2, 3, 4, 6, 8),
                }
                yield Case("int_weight_gemm", kernel.work_name(rows, weights[0], bits, gated), tiling, choices, call)


def measure_reach(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device, measure: Callable
) -> Iterator[tuple[str, dict[str, int], str]]:
    """Yield each GEMM's name in the table, up to how many rows ours is as fast as torch's, and both times by rows."""
    kernel = load_skinny_gemm()
    has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY

    def gemm(x: torch.Tensor, weights: list, is_fp8: bool, is_ours: bool) -> Callable[[int], torch.Tensor]:
        if is_fp8:
            x, multiply = quantize_rows(x), kernel.fp8_skinny_gemm if is_ours else fp8_matmul
            return lambda turn: multiply(*x, *weights[turn % len(weights)], None)
        multiply = kernel.skinny_gemm if is_ours else torch.nn.functional.linear
        return lambda turn: multiply(x, weights[turn % len(weights)], None)

    for is_fp8 in (False, True) if has_fp8 else (False,):
        for N, K, _ in linear_sizes(config):
            weights = [torch.randn(N, K, dtype=dtype, device=device) for _ in range(turns(N * K * (2 - is_fp8)))]
            if not kernel.supports_weight(weights[0]):
                continue
            if is_fp8:
                weights = [(weight, scale.t().contiguous()) for weight, scale in map(quantize_rows, weights)]
            reach, shown = 0, []
            for rows in REACH_ROWS:
                x = torch.randn(rows, K, dtype=dtype, device=device)
                ours, theirs = (measure(gemm(x, weights, is_fp8, is_ours)) for is_ours in (True, False))
                shown.append(f"{rows}: {ours:.1f} ({theirs:.1f})")
                if ours > theirs:
                    break
                reach = rows
            work = kernel.work_name(weights[0][0] if is_fp8 else weights[0])
            yield work, {"max_rows": reach}, ", ".join(shown)


def write_table(table: dict, file: Path) -> None:
    """Write the table with a line for each work."""
    text = json.dumps(table, indent=1)
    with atomic_writer(file) as output:
        output.write(re.sub(r"\{\s+([^{}]+?)\s+\}", lambda match: f"{{{' '.join(match[1].split())}}}", text) + "\n")


def main() -> None:
    parser = FlagParser(description=__doc__)
    shapes = [shape for shape in SHAPES if shape not in CHATGLM]
    parser.add_argument("--shape", choices=shapes, default="chatglm3-6b", help="(default: %(default)s)")
    parser.add_argument("--kernels", choices=KERNELS, nargs="+", default=KERNELS, help="(default: all)")
    parser.add_argument("--output", type=Path, default=TABLE_FILE, help="the table (default: %(default)s)")
    args = parser.parse_args()
    if not (load_decode_attention() and load_int_weight_gemm() and load_skinny_gemm()):
        raise UsageError("the kernels do not run here: they need Triton and an NVIDIA GPU of compute capability 8.0")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    config, measure = make_config(args.shape), partial(microseconds, device=device)
    table = json.loads(json.dumps(read_table(args.output)))  # a copy: the kernels have theirs
    entry = table.setdefault(card_name(device), {})

    for name, make_cases in (("decode_attention", attention_cases), ("int_weight_gemm", integer_cases)):
        for case in make_cases(config, dtype, device) if name in args.kernels else ():
            settings, after, before = fastest(case, measure)
            print_line(f"{case.kernel}, {case.work}: {before:.1f} -> {after:.1f} us, {settings}")
            if after < (1 - MIN_GAIN) * before:
                entry.setdefault(case.kernel, {})[case.work] = asdict(settings)
    if "skinny_gemm" in args.kernels:
        for work, settings, times in measure_reach(config, dtype, device, measure):
            print_line(f"skinny_gemm, {work}: us (torch's) by rows: {times}")
            entry.setdefault("skinny_gemm", {})[work] = settings
    write_table(table, args.output)
    print(json.dumps({"card": card_name(device), "output": str(args.output)}))


if __name__ == "__main__":
    run(main)
