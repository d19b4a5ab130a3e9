"""
python chatglm_milti_gpu_inference.py

Batch inference with a model that may be too big for one card: it lies whole on a card that holds it, and otherwise
its layers are spread over the visible cards, then CPU memory, then disk, by accelerate. Under a launcher of several
processes it does what chatglm_deepspeed_inference.py does. Reads --input_path (by default the sample prompts in
data/), writes one JSON line a row to --output_path in input order.
"""

import argparse
from functools import partial

from utils.common.script import run

from utils.checkpoint.model import Checkpoint
from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.errors import UsageError
from utils.common.processes import world_size
from utils.distributed.process_group import shut_down
from utils.inference.arguments import add_inference_arguments, check_inference_arguments, resolve_dtype
from utils.inference.job import answer, check_adapters, export_or_answer, open_job, put_adapters
from utils.inference.placement import dispatch, load_on_processes, prepare_for_decoding, quantize_to_fp8
from utils.inference.work_queue import SINGLE_REPLICA
from utils.layers.quantization import stored_bits


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
    placement = parser.add_argument_group("placement")
    placement.add_argument(
        "--max_memory", nargs="+", metavar="DEVICE=SIZE", help="like 0=10GiB cpu=30GiB (what is free)"
    )
    placement.add_argument("--offload_folder", help="for weights that fit nowhere else (a temporary directory)")
    args = parser.parse_args()
    check_inference_arguments(args)
    max_memory = parse_max_memory(args.max_memory)
    tokenizer = load_tokenizer(args.model_name_or_path)
    dtype = resolve_dtype(args)
    check_adapters(args)
    if not export_or_answer(args, dtype):
        return
    job = open_job(args, tokenizer, dtype)
    checkpoint, replica = Checkpoint.open(args.model_name_or_path, quantize=stored_bits(args.quantize)), SINGLE_REPLICA
    if world_size() > 1:
        adapt = partial(put_adapters, args=args)
        model, replica = load_on_processes(checkpoint, dtype, args.quantize, adapt, args.tp_size)
    else:
        model = dispatch(checkpoint, dtype, max_memory, args.offload_folder, args.quantize)
        model = put_adapters(model, args)
        model = quantize_to_fp8(model, checkpoint, args.quantize)
        prepare_for_decoding(model)
    answer(job, model, tokenizer, replica)


if __name__ == "__main__":
    run(main)
    shut_down()
