"""
python chatglm_milti_gpu_inference.py

Batch inference with a model that may be too big for one card: it goes whole onto a card that holds it; otherwise
accelerate spreads its layers over the visible cards, then CPU memory, then disk. Under a launcher of several processes
it does what chatglm_deepspeed_inference.py does. Reads --input_path (by default the sample prompts in data/), writes
one JSON line a row to --output_path in input order.
"""

from utils.common.script import run

import torch

from utils.checkpoint.model import Checkpoint
from utils.common.processes import world_size
from utils.distributed.process_group import shut_down
from utils.inference.arguments import DispatchArguments, parse_max_memory
from utils.inference.job import AttachAdapters, run_inference
from utils.inference.placement import dispatch, load_on_processes, prepare_for_decoding, quantize_to_fp8
from utils.inference.work_queue import SINGLE_REPLICA


def load(args: DispatchArguments, checkpoint: Checkpoint, dtype: torch.dtype, attach: AttachAdapters):
    """Return the model, on one or several devices or sharded, and this process's replica."""
    quantize = args.quantize
    if world_size() > 1:
        return load_on_processes(checkpoint, dtype, quantize, attach, args.tp_size)
    model = attach(dispatch(checkpoint, dtype, parse_max_memory(args.max_memory), args.offload_folder, quantize))
    model = quantize_to_fp8(model, checkpoint, quantize)
    prepare_for_decoding(model)
    return model, SINGLE_REPLICA


if __name__ == "__main__":
    run(lambda: run_inference(DispatchArguments, load, __doc__))
    shut_down()
