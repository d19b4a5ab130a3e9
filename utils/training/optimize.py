"""
What makes a training step fast besides packing: which layers a run gets, and in which order.

In: a model with its adapter attached, and the run's settings. Out: the same model, its stock layers replaced by those
of utils/layers and its blocks compiled. Called by the training script (`configure_zero3` before the model is loaded,
`optimize_for_training` after). What the model computes stays the same up to rounding.
"""

from dataclasses import dataclass
from functools import cache

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from utils.layers.fp8 import convert_to_fp8
from utils.layers.fused_mlp import fuse_mlps
from utils.layers.fused_qkv import QKV_PROJ, fuse_lora_qkv, use_qkv_kernel
from utils.layers.replace import replace_layers, share_state
from utils.layers.varlen_attention import VARLEN
from utils.models.family import Generation


@dataclass(frozen=True)
class Optimizations:
    """What a run asks for by its flags or their defaults."""

    fp8: bool  # --quantize fp8
    packing: bool  # --packing
    compile_layers: bool  # --compile_layers, resolved


def decoder_blocks(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the transformer blocks of `model`, first to last."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def partitions_weights(args: TrainingArguments) -> bool:
    """Whether the run shards weights by ZeRO-3."""
    return args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3


def configure_zero3(args: TrainingArguments, compile_layers: bool) -> None:
    """
    Switch off DeepSpeed's own linear GEMM where layers are compiled; call it before the model is loaded.

    It is compiled anew for each block, and on a GPU its gradients are then wrong. Its purpose, that no gathered weight
    is kept for the backward pass, compiled layers serve by themselves.
    """
    if compile_layers and partitions_weights(args):
        args.deepspeed_plugin.hf_ds_config.config["zero_optimization"]["memory_efficient_linear"] = False


def optimize_for_training(
    model: PeftModel, generation: Generation, args: TrainingArguments, wanted: Optimizations
) -> None:
    """
    Replace the stock layers of `model`, adapter attached, by faster ones, in place.

    Args:
        generation: names the linear layers of a block.
        args: tells whether the run is on a CPU, and whether ZeRO-3 shards the weights.
        wanted: what the run's flags ask for.
    """
    on_gpu_in_16_bits = model.dtype in (torch.float16, torch.bfloat16) and not args.use_cpu
    sharded = partitions_weights(args)

    # 1. Attention without a mask. In any order: the layers below look the function up when they are called.
    if wanted.packing and on_gpu_in_16_bits:
        model.get_base_model().set_attn_implementation(VARLEN)
    # 2. Marks the stock blocks, which step 6 replaces together with the mark.
    if sharded:
        gather_by_block(model)
    # 3. One layer for q, k and v, before FP8 quantises it. A sharded one runs twice where it is not compiled.
    if wanted.compile_layers or not sharded:
        fuse_lora_qkv(model, sharded)
    # 4. FP8 of all that is a plain linear layer by now.
    if wanted.fp8:
        convert_to_fp8(model, {*generation.linear_layers, QKV_PROJ}, trains=True)
    # 5. Kernels for what is left between the GEMMs, around linear layers of any kind.
    if on_gpu_in_16_bits:
        fuse_mlps(model)
        use_qkv_kernel(model)
    # 6. Last, since a block is compiled with the layers that it has.
    if wanted.compile_layers:
        compile_blocks(model)


def gather_by_block(model: PeftModel) -> None:
    """
    Let DeepSpeed gather a block's weights together when the block is called.

    Inside a block there are then no hooks, otherwise four for each linear layer, and compiled code finds every weight.
    """
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, list({type(block) for block in decoder_blocks(model)}))
    # DeepSpeed takes the backward pass of a block whose input has no gradient as done before it begins.
    model.enable_input_require_grads()


def compile_blocks(model: nn.Module) -> None:
    """
    Compile the forward of every transformer block, in place.

    Not by `nn.Module.compile`, which compiles the hooks of DeepSpeed and FSDP2 too, nor by a wrapper, which changes
    PEFT's parameter names: each block is replaced by one of a subclass with a compiled forward.
    """

    def build(_: str, block: nn.Module) -> nn.Module | None:
        if not isinstance(block, GradientCheckpointingLayer) or hasattr(block, "stock_class"):
            return None
        return share_state(block, compiled_block_class(type(block)))

    replace_layers(model, build)


@cache
def compiled_block_class(stock: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of `stock` with a compiled forward, and with its name, by which accelerate finds blocks."""
    return type(stock.__name__, (stock,), {"forward": torch.compile(stock.forward), "stock_class": stock})
