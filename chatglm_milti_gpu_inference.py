"""
python chatglm_milti_gpu_inference.py

Batch inference with a model that is too big for one card: its layers are spread over the visible cards, then CPU
memory, then disk, by accelerate. Under `deepspeed --num_gpus 2 chatglm_milti_gpu_inference.py` DeepSpeed shards every
layer over the processes instead. Reads --input_path (by default the sample prompts in data/), writes one JSON line a
row to --output_path in input order.
"""

import argparse

from utils.checkpoint import load_tokenizer
from utils.distributed import shut_down, world_size
from utils.errors import UsageError, run
from utils.generation import (
    adapter_of,
    add_inference_arguments,
    answer_file,
    check_inference_arguments,
    export_or_answer,
    resolve_dtype,
)
from utils.placement import dispatch, input_device, load_on_processes


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
    if not export_or_answer(args, dtype):
        return
    replicas = 1
    if world_size() > 1:
        adapt = adapter_of(args, merge=True)
        model, replicas = load_on_processes(args.model_name_or_path, dtype, args.quantize, adapt)
    else:
        adapt = adapter_of(args, merge=False)
        model = adapt(dispatch(args.model_name_or_path, dtype, max_memory, args.offload_folder, args.quantize))
    answer_file(model, tokenizer, args, input_device(model), replicas)


if __name__ == "__main__":
    run(main)
    shut_down()
