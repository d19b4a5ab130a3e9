"""
deepspeed --num_gpus 2 chatglm_deepspeed_inference.py

Batch inference with the model sharded over all processes by DeepSpeed tensor parallelism. Reads --input_path (by
default the sample prompts in data/), writes one JSON line a row to --output_path in input order.
"""

import argparse

from utils.checkpoint import Checkpoint, load_model, load_tokenizer
from utils.distributed import init_process_group, shut_down
from utils.errors import run
from utils.generation import (
    add_inference_arguments,
    answer_file,
    check_inference_arguments,
    resolve_dtype,
)
from utils.lora import merge_adapter
from utils.placement import input_device, shard_with_deepspeed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_inference_arguments(parser)
    args = parser.parse_args()
    check_inference_arguments(args)
    tokenizer = load_tokenizer(args.model_name_or_path)
    dtype = resolve_dtype(args)
    model = load_model(args.model_name_or_path, dtype=dtype)
    if args.adapter_path:
        model = merge_adapter(model, args.adapter_path)
    init_process_group(use_deepspeed=True)
    model = shard_with_deepspeed(model, Checkpoint.open(args.model_name_or_path).generation, dtype)
    answer_file(model, tokenizer, args, input_device(model))


if __name__ == "__main__":
    run(main)
    shut_down()
