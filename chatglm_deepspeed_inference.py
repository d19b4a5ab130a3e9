"""
deepspeed --num_gpus 2 chatglm_deepspeed_inference.py

Batch inference on several GPUs. Where each has memory for the whole model they are replicas that take rows from one
queue; otherwise, or with --tp_size, DeepSpeed shards the model over some of them by tensor parallelism. Reads
--input_path (by default the sample prompts in data/), writes one JSON line a row to --output_path in input order.
"""

import argparse
from functools import partial

from utils.common.script import run

from utils.checkpoint.model import Checkpoint
from utils.checkpoint.tokenizer import load_tokenizer
from utils.distributed.process_group import shut_down
from utils.inference.arguments import add_inference_arguments, check_inference_arguments, resolve_dtype
from utils.inference.job import answer, check_adapters, export_or_answer, open_job, put_adapters
from utils.inference.placement import load_on_processes
from utils.layers.quantization import stored_bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_inference_arguments(parser)
    args = parser.parse_args()
    check_inference_arguments(args)
    tokenizer = load_tokenizer(args.model_name_or_path)
    dtype = resolve_dtype(args)
    check_adapters(args)
    if not export_or_answer(args, dtype):
        return
    job = open_job(args, tokenizer, dtype)
    adapt = partial(put_adapters, args=args)
    checkpoint = Checkpoint.open(args.model_name_or_path, quantize=stored_bits(args.quantize))
    model, replica = load_on_processes(checkpoint, dtype, args.quantize, adapt, args.tp_size)
    answer(job, model, tokenizer, replica)


if __name__ == "__main__":
    run(main)
    shut_down()
