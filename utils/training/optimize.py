"""What makes a step fast beside packing: fused projections, attention without a mask, compiled layers, FP8."""

import torch
from peft import PeftModel
from transformers import TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from utils.layers.fp8 import convert_to_fp8
from utils.layers.fused_mlp import fuse_mlps
from utils.layers.fused_qkv import QKV_PROJ, fuse_heads, fuse_projections
from utils.layers.varlen_attention import VARLEN
from utils.models.family import Generation


def decoder_blocks(model: PeftModel) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def partitions_weights(args: TrainingArguments) -> bool:
    """Whether it is ZeRO-3."""
    return args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3


def settle_zero3(args: TrainingArguments, compile_layers: bool) -> None:
    """
    Before the model is loaded: no linear product of DeepSpeed's own where layers are compiled. It is compiled anew for
    each block, and on a GPU its gradients are then wrong; what it is for, that no gathered weight is kept for the
    backward pass, compiled layers do by themselves.
    """
    if compile_layers and partitions_weights(args):
        args.deepspeed_plugin.hf_ds_config.config["zero_optimization"]["memory_efficient_linear"] = False


def gather_by_block(model: PeftModel) -> None:
    """
    Has DeepSpeed gather a block's weights at once when it is called: inside it there are then no hooks, of which each
    linear layer would have four, and what is compiled finds every weight.
    """
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, list({type(block) for block in decoder_blocks(model)}))
    # A block whose input has no gradient would be taken as done before its backward pass.
    model.enable_input_require_grads()


def speed_up(
    model: PeftModel,
    generation: Generation,
    args: TrainingArguments,
    *,
    fp8: bool,
    packing: bool,
    compile_layers: bool,
) -> None:
    """Changes `model`, its adapter attached, in place; what it computes stays the same up to rounding."""
    half = model.dtype in (torch.float16, torch.bfloat16)
    if packing and half and not args.use_cpu:
        model.get_base_model().set_attn_implementation(VARLEN)
    partitioned = partitions_weights(args)
    if partitioned:
        gather_by_block(model)
    if compile_layers or not partitioned:  # else the joined product would be made twice
        fuse_projections(model, partitioned)
    if fp8:
        convert_to_fp8(model, {*generation.linear_layers, QKV_PROJ}, trains=True)
    if half and not args.use_cpu:
        fuse_mlps(model)
        fuse_heads(model)
    if compile_layers:
        for block in decoder_blocks(model):  # without their hooks, DeepSpeed's
            block.forward = torch.compile(block.forward)
