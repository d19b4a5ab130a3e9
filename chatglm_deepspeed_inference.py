"""
deepspeed --num_gpus 2 chatglm_deepspeed_inference.py

Batch inference on several GPUs. If each holds the whole model they are replicas that take rows from one queue;
otherwise, or with --tp_size, the model is sharded over some of them by tensor parallelism. Reads --input_path
(by default the sample prompts in data/), writes one JSON line a row to --output_path in input order.
"""

from utils.common.script import run

import torch

from utils.checkpoint.model import Checkpoint
from utils.distributed.process_group import shut_down
from utils.inference.arguments import InferenceArguments
from utils.inference.job import AttachAdapters, run_inference
from utils.inference.placement import load_on_processes


def load(args: InferenceArguments, checkpoint: Checkpoint, dtype: torch.dtype, attach: AttachAdapters):
    """Return the model, whole or sharded, and this process's replica of it."""
    return load_on_processes(checkpoint, dtype, args.quantize, attach, args.tp_size)


if __name__ == "__main__":
    run(lambda: run_inference(InferenceArguments, load, __doc__))
    shut_down()
