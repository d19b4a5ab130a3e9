"""
python benchmarks/inference_throughput.py --shape chatglm3-6b --batch_size 64

New tokens a second of the engine on random weights: --batch_size prompts of --prompt_tokens, --new_tokens each, after
a first round, timed apart, in which layers are compiled and graphs captured. With --generate also transformers'
`generate`, with --profile the kernels of a round. Rates include reading the prompts. The last line is one JSON object.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.random_checkpoint import SHAPES, random_model
from utils.engine import Engine, Task


def timed(call) -> float:
    """Seconds until the device is done."""
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="chatglm3-6b")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--generate", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = random_model(args.shape, device, dtype).eval()
    prompts = torch.randint(10, 900, (args.batch_size, args.prompt_tokens))
    if args.shape in ("chatglm-6b", "tiny"):
        prompts[:, -2:] = torch.tensor([model.config.gmask_token_id, model.config.bos_token_id])
    new_tokens = args.batch_size * args.new_tokens
    result = {"shape": args.shape, "batch_size": args.batch_size, "device": device, "new_tokens": args.new_tokens}

    if args.generate:
        inputs = {"input_ids": prompts.to(device), "attention_mask": torch.ones_like(prompts).to(device)}
        length = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens, "do_sample": False}
        timed(lambda: model.generate(**inputs, max_new_tokens=2, do_sample=False))
        result["generate_tokens_per_second"] = round(new_tokens / timed(lambda: model.generate(**inputs, **length)))

    columns = args.prompt_tokens + args.new_tokens
    engine = Engine(model, args.batch_size, columns, stop_ids=[-1], pad_token_id=model.config.pad_token_id or 0)

    def answer_all() -> None:
        tasks = [Task(number, prompt) for number, prompt in enumerate(prompts.tolist())]
        assert sum(len(task.answer_ids) for task in engine.answer(tasks, args.new_tokens)) == new_tokens

    result["first_round_seconds"] = round(timed(answer_all), 2)
    seconds = timed(answer_all)
    result["round_seconds"] = round(seconds, 3)
    result["tokens_per_second"] = round(new_tokens / seconds)
    if args.profile:
        with torch.profiler.profile() as profiler:
            timed(answer_all)
        order = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=80))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
