"""
Makes the model that trains: the base loaded, its adapter attached, loss and layers replaced by faster ones.

In: a `RunConfig`. Out: a PeftModel whose only trained weights are the adapter's. trainer.py calls it.
"""

import torch
from peft import PeftModel

from utils.checkpoint.model import load_model
from utils.common.processes import launched_by_accelerate_with_fsdp
from utils.layers.fp8 import FP8
from utils.layers.quantization import stored_bits
from utils.lora.adapter import LoraSettings, attach_adapter, scale_losses_under_zero3
from utils.training.fsdp_weights import move_base_to_meta, placeholder_model
from utils.training.loss import use_target_loss
from utils.training.optimize import Optimizations, configure_zero3, optimize_for_training, partitions_weights
from utils.training.run_config import RunConfig


def prepare_model(config: RunConfig) -> PeftModel:
    """
    Return the frozen base with the adapter to train.

    Its loss is that of the target tokens only. The order is fixed, as each step finds the layers that the one before
    leaves.
    """
    flags, args = config.flags, config.training_args
    configure_zero3(args, flags.compile_layers)  # before loading, which reads DeepSpeed's configuration
    sharded_later = launched_by_accelerate_with_fsdp()
    if sharded_later:  # trainer.py fills the shards
        model = placeholder_model(config.inputs.checkpoint, config.dtype)
    else:  # on a GPU weight by weight to the card, so the host holds no copy
        device = "cpu" if args.device.type == "cpu" else args.device
        model = load_model(flags.model_name_or_path, config.dtype, stored_bits(flags.quantize), device)
    model.config.use_cache = False
    lora = LoraSettings(flags.lora_rank, flags.lora_alpha, flags.lora_dropout, flags.lora_target_modules)
    model = attach_adapter(model, lora, seed=args.seed)  # before layers are replaced: PEFT looks for the stock ones
    if sharded_later:
        move_base_to_meta(model)
    if partitions_weights(args) and config.dtype == torch.float16:
        scale_losses_under_zero3(model)
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    use_target_loss(model, compiled=flags.compile_layers)  # the head is not among the layers below
    wanted = Optimizations(flags.quantize == FP8, flags.packing, flags.compile_layers)
    # Last: it replaces layers together with their adapters, and compiles the blocks.
    optimize_for_training(model, config.inputs.checkpoint.generation, args, wanted)
    return model
