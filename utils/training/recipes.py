"""
Recipes of LoRA training, the fastest first, and the fastest one that fits in a card's memory.

In: a `MemoryModel`, the number of cards, and the GiB that may be used on each. Out: a `Recipe`, with its flags, its
memory, and its speed where its MFU was measured. dry_run.py advises with it, tools/doctor.py for whole machines.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from utils.training.memory import MemoryModel

# Tokens a pack. Packs smaller than the last cost more speed than gradient checkpointing.
PACK_TOKENS = (16384, 8192, 4096)
INT4_PACK_TOKENS = (*PACK_TOKENS, 2048)  # GLM-4-32B fits on a card of 24 GB with the last
ZERO2_FILE, ZERO3_FILE = "configs/deepspeed_zero2.json", "ds_config_zero3.json"
OFFLOAD_FILE = "accelerate_ds_zero3_cpu_offload_config.yaml"
DDP, ZERO2, ZERO3, INT4 = "DDP", "ZeRO-2", "ZeRO-3", "DDP over 4 bits"
OFFLOAD = "ZeRO-3 with the weights in CPU memory"
# (recipe, with gradient checkpointing) -> MFU of ChatGLM3-6B on H100s of 80 GB, of two for ZeRO-2 and ZeRO-3
# (docs/benchmarks.md). That of ChatGLM-6B is 4 % lower, that of GLM-4-9B, measured with older kernels, 11 %.
MEASURED_MFU = {
    (DDP, False): 0.555,
    (DDP, True): 0.359,
    (ZERO2, False): 0.499,
    (ZERO3, False): 0.408,
    (INT4, True): 0.351,
}


@dataclass(frozen=True)
class Recipe:
    """
    A way to train, with packed rows.

    `flags` are those of the training script that packing and gradient checkpointing do not need.
    """

    name: str
    memory: MemoryModel
    flags: str = ""

    def all_flags(self) -> str:
        """Return the flags that make a training command this recipe."""
        packing = f"--packing --per_device_train_batch_size 1 --pack_tokens {self.memory.tokens}"
        checkpointing = "--gradient_checkpointing" if self.memory.checkpointing else ""
        return " ".join(filter(None, [packing, self.flags, checkpointing]))

    def command(self, script: str, processes: int) -> str:
        """Return the command that trains by this recipe; `script` is the script with its other flags."""
        if self.name == OFFLOAD:
            launcher = f"accelerate launch --config_file {OFFLOAD_FILE} --num_processes {processes}"
        else:
            launcher = f"torchrun --nproc_per_node={processes}" if processes > 1 else "python"
        return f"{launcher} {script} {self.all_flags()}"

    def tokens_per_second(self, processes: int, peak_tflops: float) -> float | None:
        """
        Return the speed on cards of `peak_tflops`, as the MFU measured on H100s gives it.

        None if this recipe was not measured. Floating-point operations are counted as throughput.py counts them, with
        every token trained on.
        """
        mfu, sizes = MEASURED_MFU.get((self.name, self.memory.checkpointing)), self.memory.sizes
        weights = sizes.blocks * sum(features_in * features_out for features_in, features_out in sizes.linear.values())
        token_flops = 4 * (weights + sizes.hidden * sizes.vocabulary)
        return mfu and mfu * peak_tflops * 1e12 * processes / token_flops


def fastest_recipe(memory: MemoryModel, processes: int, usable: float) -> Recipe | None:
    """Return the fastest recipe that fits in `usable` GiB; None if none does."""
    for recipe in _recipes(memory, processes):
        for tokens in INT4_PACK_TOKENS if recipe.name == INT4 else PACK_TOKENS:
            fitting = replace(recipe.memory, tokens=max(tokens, memory.longest))
            if fitting.gib() <= usable:
                return replace(recipe, memory=fitting)
    return None


def advise(memory: MemoryModel, processes: int, usable: float) -> dict[str, str]:
    """Return the fastest recipe that fits in `usable` GiB: its name, flags or launcher, and memory."""
    recipe = fastest_recipe(memory, processes, usable)
    if recipe is None or recipe.name == OFFLOAD:
        return {"recipe": OFFLOAD, "launcher": f"accelerate launch --config_file {OFFLOAD_FILE}"}
    return {
        "recipe": recipe.name,
        "flags": recipe.all_flags(),
        "memory": f"{recipe.memory.gib():.1f} GiB estimated",
    }


def _recipes(memory: MemoryModel, processes: int) -> Iterator[Recipe]:
    """Yield recipes, the fastest first; how many tokens a pack has is still open."""
    ddp = replace(
        memory, packing=True, compiled=True, weight_shards=None, offloaded=False, fsdp=False, optimizer_shards=1
    )
    zero2 = replace(ddp, optimizer_shards=processes)
    zero3 = replace(zero2, weight_shards=processes)
    for checkpointing in (False, True):
        yield Recipe(DDP, replace(ddp, checkpointing=checkpointing))
        if processes > 1:
            yield Recipe(ZERO2, replace(zero2, checkpointing=checkpointing), f"--deepspeed {ZERO2_FILE}")
    if memory.sizes.checkpoint.quantization is not None:  # a quantised base cannot be sharded
        return
    if processes > 1:
        for checkpointing in (False, True):
            yield Recipe(ZERO3, replace(zero3, checkpointing=checkpointing), f"--deepspeed {ZERO3_FILE}")
    yield Recipe(INT4, replace(ddp, sizes=memory.sizes.quantized(4), checkpointing=True), "--quantize int4")
    yield Recipe(OFFLOAD, replace(zero3, offloaded=True, checkpointing=True))
