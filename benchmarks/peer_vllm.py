"""
The work of `inference_throughput.py` on vLLM's offline engine: `--peer vllm` calls `measure_vllm`.

In: the same prompts and numbers of new tokens. Out: the same JSON keys, so one table holds both. vLLM keeps its
defaults but for `max_num_seqs`, a memory share of 0.8 and no prefix cache, and makes its own random weights. Start-up
and compiling are in no rate, the prefill is.
"""

import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from utils.common.errors import UsageError
from utils.common.numbers import ceil_div

LENGTH_MULTIPLE = 128  # tokens; `max_model_len` is the longest sequence, rounded up as a slot of our engine
INSTALL = "pip install vllm, in an environment of its own that also has requirements.txt: it pins its own torch"
Requests = Sequence[tuple[list[int], int]]  # prompts, each with its number of new tokens


def measure_vllm(
    args: Namespace, config: PretrainedConfig, rounds: Sequence[Requests], job: Requests
) -> dict[str, Any]:
    """
    Measure the second of `rounds`, then the job if it has requests.

    Args:
        args: of the benchmark; the larger of its batch sizes is `max_num_seqs`.
        config: of the model, with its architecture.

    Raises:
        UsageError: vLLM is not installed.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        import vllm
    except ImportError as error:
        raise UsageError(f"--peer vllm cannot import vLLM ({error}): {INSTALL}") from error
    first, second = rounds[:2]
    longest = max(len(prompt) + answer for prompt, answer in (*second, *job))
    job_batch_size = min(len(job), args.job_batch_size)
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        llm = vllm.LLM(
            model=directory,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            quantization=args.quantize,
            max_num_seqs=max(args.batch_size, job_batch_size),
            max_model_len=ceil_div(longest, LENGTH_MULTIPLE) * LENGTH_MULTIPLE,
            gpu_memory_utilization=0.8,
            enable_prefix_caching=False,
            seed=0,
        )

    def seconds_of(requests: Requests) -> float:
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        settings = [
            vllm.SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True, detokenize=False)
            for _, answer in requests
        ]
        started = time.perf_counter()
        outputs = llm.generate(prompts, settings, use_tqdm=False)
        seconds = time.perf_counter() - started
        assert [len(output.outputs[0].token_ids) for output in outputs] == [answer for _, answer in requests]
        return seconds

    first_seconds, seconds = seconds_of(first), seconds_of(second)
    prompts = [(prompt, 1) for prompt, _ in second]
    prefill_seconds = min(seconds_of(prompts), seconds_of(prompts))  # with the first token, which ours leaves out
    decoding, steps = max(seconds - prefill_seconds, 1e-9), max(args.new_tokens - 1, 1)
    result = {
        "peer": f"vllm {vllm.__version__}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "first_round_seconds": round(first_seconds, 2),
        "tokens_per_second": round(len(second) * args.new_tokens / seconds),
        "decode_tokens_per_second": round(len(second) * steps / decoding),
        "ms_a_step": round(1e3 * decoding / steps, 3),
        "prefill_seconds": round(prefill_seconds, 3),
    }
    if job:
        seconds, answered = seconds_of(job), sum(answer for _, answer in job)
        result["job"] = {
            "rows": len(job),
            "batch_size": job_batch_size,
            "new_tokens": answered,
            "seconds": round(seconds, 2),
            "tokens_per_second": round(answered / seconds),
        }
    return result
