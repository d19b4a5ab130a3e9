"""
deepspeed --num_gpus 2 chatglm_deepspeed_inference.py

Batch inference with the model sharded over all processes by DeepSpeed tensor parallelism. Reads --input_path (by
default the sample prompts in data/), writes one JSON line a row to --output_path in input order.
"""

import argparse

from utils.checkpoint import load_tokenizer
from utils.distributed import shut_down
from utils.errors import run
from utils.generation import (
    adapter_of,
    add_inference_arguments,
    answer_file,
    check_inference_arguments,
    export_or_answer,
    resolve_dtype,
)
from utils.placement import input_device, load_on_processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_inference_arguments(parser)
    args = parser.parse_args()
    check_inference_arguments(args)
    tokenizer = load_tokenizer(args.model_name_or_path)
    dtype = resolve_dtype(args)
    if not export_or_answer(args, dtype):
        return
    model, replicas = load_on_processes(args.model_name_or_path, dtype, args.quantize, adapter_of(args, merge=True))
    answer_file(model, tokenizer, args, input_device(model), replicas)


if __name__ == "__main__":
    run(main)
    shut_down()
