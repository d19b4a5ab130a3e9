"""
python chatglm_milti_gpu_inference.py

Batch inference with a model that is too big for one card: its layers are spread over the visible cards, then CPU
memory, then disk, by accelerate. Under `deepspeed --num_gpus 2 chatglm_milti_gpu_inference.py` DeepSpeed shards every
layer over the processes instead. Reads --input_path (by default the sample prompts in data/), writes one JSON line a
row to --output_path in input order.
"""

import argparse

from utils.checkpoint import Checkpoint, load_model, load_tokenizer
from utils.distributed import init_process_group, shut_down, world_size
from utils.errors import UsageError, run
from utils.generation import (
    add_inference_arguments,
    answer_file,
    check_inference_arguments,
    resolve_dtype,
)
from utils.lora import load_adapter, merge_adapter
from utils.placement import dispatch, input_device, shard_with_deepspeed


def parse_max_memory(values: list[str] | None) -> dict[int | str, str] | None:
    """["0=10GiB", "cpu=30GiB"] -> {0: "10GiB", "cpu": "30GiB"}."""
    if not values:
        return None
    memory: dict[int | str, str] = {}
    for value in values:
        device, _, size = value.partition("=")
        if not size or not (device.isdigit() or device == "cpu"):
            raise UsageError(f"--max_memory {value}: write DEVICE=SIZE, like 0=10GiB or cpu=30GiB")
        memory[int(device) if device.isdigit() else device] = size
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_inference_arguments(parser)
    parser.add_argument("--max_memory", nargs="+", metavar="DEVICE=SIZE", help="like 0=10GiB cpu=30GiB (what is free)")
    parser.add_argument("--offload_folder", help="for weights that fit nowhere else (a temporary directory)")
    args = parser.parse_args()
    check_inference_arguments(args)
    max_memory = parse_max_memory(args.max_memory)
    tokenizer = load_tokenizer(args.model_name_or_path)
    dtype = resolve_dtype(args)
    if world_size() > 1:
        model = load_model(args.model_name_or_path, dtype=dtype)
        if args.adapter_path:
            model = merge_adapter(model, args.adapter_path)
        init_process_group(use_deepspeed=True)
        model = shard_with_deepspeed(model, Checkpoint.open(args.model_name_or_path).generation, dtype)
    else:
        model = dispatch(args.model_name_or_path, dtype, max_memory, args.offload_folder)
        if args.adapter_path:
            model = load_adapter(model, args.adapter_path)
    answer_file(model, tokenizer, args, input_device(model))


if __name__ == "__main__":
    run(main)
    shut_down()
