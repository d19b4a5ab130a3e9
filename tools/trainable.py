"""
What cards can train: for each model of the family the fastest recipe that fits, as a command, its memory and its time.

In: `Cards`, those of this machine or others that a user asks for. Out: a `Plan` for each model. tools/doctor.py prints
it. Nothing is loaded or downloaded: memory follows from the models' shapes, time from the MFU measured on H100s.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tools.random_checkpoint import RELEASED, released_checkpoint
from utils.layers.fp8 import MIN_CAPABILITY as FP8_CAPABILITY
from utils.training.memory import GIB, USABLE_GPU_SHARE, MemoryModel, ModelSizes
from utils.training.recipes import PACK_TOKENS, Recipe, fastest_recipe
from utils.training.throughput import PEAK_TFLOPS, peak_tflops

ROWS, ROW_TOKENS = 500_000, 200  # BELLE's 0.5M rows, with the tokens that a row of them has on average
LONGEST_ROW = 1024  # tokens
LORA_RANK = 8
HUB_IDS = {
    "chatglm-6b": "THUDM/chatglm-6b",
    "chatglm2-6b": "THUDM/chatglm2-6b",
    "chatglm3-6b": "THUDM/chatglm3-6b",
    "glm-4-9b": "THUDM/glm-4-9b-chat",
    "glm-4-9b-0414": "zai-org/GLM-4-9B-0414",
    "glm-4-32b-0414": "zai-org/GLM-4-32B-0414",
}
NAMES = {"glm-4-9b-0414": "GLM-4-9B-0414", "glm-4-32b-0414": "GLM-4-32B-0414"}  # of shapes of one generation
# Of a card's advertised memory, what torch can take: some is reserved, some is the CUDA context's.
AVAILABLE_SHARE, CONTEXT_GIB = 0.98, 0.5


@dataclass(frozen=True)
class Cards:
    """Equal GPUs of one machine; `free_gib` is what a run may take on each."""

    count: int
    name: str
    gib: float
    free_gib: float
    has_bf16: bool
    has_fp8: bool

    @classmethod
    def here(cls) -> "Cards | None":
        """Return this machine's cards as the one with the least free memory; None without a GPU."""
        memory = [torch.cuda.mem_get_info(card) for card in range(torch.cuda.device_count())]
        if not memory:
            return None
        free, total = min(memory)
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        has_fp8 = torch.cuda.get_device_capability() >= FP8_CAPABILITY
        return cls(len(memory), torch.cuda.get_device_name(), total / GIB, free / GIB, has_bf16, has_fp8)

    @classmethod
    def asked_for(cls, count: int, name: str, gib: float) -> "Cards":
        """Return cards that this machine need not have, Ampere's or newer ones."""
        has_fp8 = re.search("[HB][0-9]", name.upper()) is not None  # Hopper and Blackwell
        free_gib = AVAILABLE_SHARE * gib - CONTEXT_GIB
        return cls(count, name, gib, free_gib, has_bf16=True, has_fp8=has_fp8)

    def __str__(self) -> str:
        return f"{self.count} x {self.name} of {self.gib:.0f} GiB"

    def notes(self) -> Iterator[str]:
        """Yield what to know of the plans for these cards."""
        if peak_tflops(self.name) is None:
            yield f"times are known of {', '.join(PEAK_TFLOPS)}; on another card --plan measures them"
        else:
            yield "memory is estimated, time from the speed measured on H100s; --plan measures both on your rows"
        if self.has_fp8:
            yield "--quantize fp8 makes those without gradient checkpointing about 1.4 times as fast"
        if not self.has_bf16:
            yield "no card before Ampere was tried"


@dataclass(frozen=True)
class Plan:
    """How a model is trained on cards; `recipe` is None if none fits."""

    model: str
    recipe: Recipe | None
    command: str | None = None
    seconds: float | None = None  # for ROWS; None if the speed is not known

    def describe(self) -> str:
        """Return recipe, memory and time, in one line."""
        if self.recipe is None:
            return "does not fit, even with the weights in CPU memory"
        memory = self.recipe.memory
        checkpointing = ", checkpointing" if memory.checkpointing else ""
        time = f"about {_duration(self.seconds)}" if self.seconds else "time not known"
        way = f"{self.recipe.name}, packs of {memory.tokens:,} tokens{checkpointing}"
        return f"{way}: {memory.gib():.1f} GiB, {time}"


def plans(cards: Cards) -> Iterator[Plan]:
    """Yield the plan of each model of the family."""
    for shape, generation in RELEASED.items():
        sizes = ModelSizes.of(released_checkpoint(shape), torch.bfloat16)
        name = NAMES.get(shape, generation.name)
        memory = MemoryModel(sizes, PACK_TOKENS[0], LONGEST_ROW, True, LORA_RANK, sizes.layers.qkv, compiled=True)
        recipe = fastest_recipe(memory, cards.count, USABLE_GPU_SHARE * cards.free_gib)
        if recipe is None:
            yield Plan(name, None)
            continue
        precision = "--bf16" if cards.has_bf16 else "--fp16"
        script = (
            f"multi_gpu_fintune_belle.py --model_name_or_path {HUB_IDS[shape]} --dataset_path data/alpaca "
            f"--output_dir output {precision}"
        )
        peak = peak_tflops(cards.name)
        speed = recipe.tokens_per_second(cards.count, peak) if peak else None
        seconds = ROWS * ROW_TOKENS / speed if speed else None
        yield Plan(name, recipe, recipe.command(script, cards.count), seconds)


def _duration(seconds: float) -> str:
    """
    Return a time in the unit that fits.

    >>> _duration(2400), _duration(9000)
    ('40 minutes', '2.5 hours')
    """
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
