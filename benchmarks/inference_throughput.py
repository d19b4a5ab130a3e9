"""
python benchmarks/inference_throughput.py --shape chatglm3-6b --batch_size 64

Measures new tokens per second of the engine behind the inference scripts, on random weights, after a first round that
compiles layers and captures CUDA graphs. The last line is one JSON object.

The batch: --batch_size prompts of --prompt_tokens, with --new_tokens each. Each round has prompts of its own, which
    share no pages with those before.
--job ROWS: rows of unequal lengths. Prompts have exp(N(0, 0.75) + log 60) tokens within 8..512, answers
    exp(N(0, 0.9) + log 120) within 5..512, and each ends by itself. --job_batch_size of them are served at once; by
    default as many as the inference scripts serve where memory suffices. Our engine begins with the longest answers; a
    peer takes the rows as they come.
--shared_prefix TOKENS: before each prompt of the job, the same for all, as a system prompt or examples would be.
--baselines: also transformers' `generate` and `generate_batch`.
--agreement: share of the engine's greedy tokens that are also the likeliest in a plain forward pass over its answers;
    the same for `generate`.
--profile: the kernels of a round.
--adapters N: first measures without adapters, then with N random ones of rank 8 on query, key and value, the sequences
    spread over them evenly.
--peer vllm: the same work on vLLM alone, where it is installed.

The floor of a decode step is the time to read weights and filled KV cache once at --bandwidth. The floor of a job adds
its prompts at --flops, and has no empty slot.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.common.script import run

import torch

from benchmarks.peer_vllm import measure_vllm
from tools.random_checkpoint import CHATGLM, SHAPES, generation_of_shape, make_config, random_model
from utils.common.errors import UsageError
from utils.inference.batch_sizing import MAX_GPU_BATCH_SIZE
from utils.inference.engine import Engine
from utils.inference.engine.kv_cache import kv_bytes_per_token
from utils.inference.engine.model_runner import EngineConfig
from utils.inference.engine.pages import PAGE_TOKENS, pages_for
from utils.inference.engine.scheduler import StopRule, TokenSequence
from utils.inference.placement import prepare_for_decoding
from utils.layers.fp8 import FP8, convert_to_fp8
from utils.layers.fused_qkv import QKV_PROJ, FusedQKVAttention, fuse_qkv
from utils.layers.mixed_lora import AdapterChoice, LoraFactors, MixedLoraLinear
from utils.layers.quantization import BITS, quantize_linear
from utils.lora.multi_lora import adapter_choice_of
from utils.models.architectures import architecture_of

ADAPTER_RANK = 8
ROUNDS = 4  # the first compiles, the second is measured, and the profile takes two
OF_OUR_ENGINE = ("baselines", "agreement", "profile", "adapters")  # flags that no peer has


def timed(call) -> float:
    """Returns the seconds of a call, until the device is done."""
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def job_lengths(rows: int) -> list[tuple[int, int]]:
    """Returns the (prompt, answer) tokens of each row, sorted."""
    generator = torch.Generator().manual_seed(0)
    prompts = (torch.randn(rows, generator=generator) * 0.75 + math.log(60)).exp().clamp(8, 512).int().tolist()
    answers = (torch.randn(rows, generator=generator) * 0.9 + math.log(120)).exp().clamp(5, 512).int().tolist()
    return sorted(zip(prompts, answers, strict=True))


Requests = list[tuple[list[int], int]]  # prompts, each with its number of new tokens


class Work(NamedTuple):
    """Requests: of each round of the fixed batch, and of the job, if there is one."""

    rounds: list[Requests]
    job: Requests


def draw_work(args: argparse.Namespace, prompt_end: list[int]) -> Work:
    """Returns random prompts, which end with `prompt_end`; those of the job begin with the shared prefix."""
    generator = torch.Generator().manual_seed(1)

    def prompt_of(tokens: int) -> list[int]:
        ids = torch.randint(10, 900, (tokens,), generator=generator).tolist()
        return [*ids[: tokens - len(prompt_end)], *prompt_end]

    rounds = [
        [(prompt_of(args.prompt_tokens), args.new_tokens) for _ in range(args.batch_size)] for _ in range(ROUNDS)
    ]
    shared = prompt_of(args.shared_prefix) if args.shared_prefix else []
    return Work(rounds, [(shared + prompt_of(prompt), answer) for prompt, answer in job_lengths(args.job)])


def add_random_adapters(model, count: int) -> None:
    """Puts adapters on query, key and value of a model that `prepare_for_decoding` has prepared."""
    model.adapter_choice = AdapterChoice()
    for attention in list(model.modules()):
        name = QKV_PROJ if isinstance(attention, FusedQKVAttention) else "query_key_value"
        if (layer := getattr(attention, name, None)) is None:
            continue
        heads = attention.head_counts if name == QKV_PROJ else [layer.out_features // attention.head_dim]
        widths = [head_count * attention.head_dim for head_count in heads]
        shapes = (count, len(widths) * ADAPTER_RANK, layer.in_features), (count, sum(widths), ADAPTER_RANK)
        A, B = (torch.randn(shape, device=model.device, dtype=model.dtype) for shape in shapes)
        factors = LoraFactors(A / layer.in_features**0.5, B / 10, widths)
        setattr(attention, name, MixedLoraLinear(layer, factors, model.adapter_choice))


@torch.inference_mode()
def agreement(model, prompts: torch.Tensor, answers: torch.Tensor, adapters: list[int]) -> float:
    """
    Returns the share of the tokens in `answers` (B, T) that are the likeliest in a forward pass over them.

    Args:
        adapters: of each answer its adapter's number.
    """
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    equal = 0
    choice = adapter_choice_of(model) or AdapterChoice()
    for prompt, answer, adapter in zip(prompts.to(model.device), answers.to(model.device), adapters, strict=True):
        choice.rows = torch.tensor([[adapter]], device=model.device)
        logits = model(input_ids=torch.cat((prompt, answer))[None]).logits[0, len(prompt) - 1 : -1]
        equal += int((logits.argmax(-1) == answer).sum())
    model.set_attn_implementation(implementation)
    return round(equal / answers.numel(), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="chatglm3-6b")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--quantize", choices=[FP8, *BITS])
    parser.add_argument("--job", type=int, default=0, metavar="ROWS")
    parser.add_argument(
        "--job_batch_size",
        type=int,
        default=MAX_GPU_BATCH_SIZE,
        help="rows at once in the job (default: %(default)s, or all rows)",
    )
    parser.add_argument("--shared_prefix", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--baselines", action="store_true")
    parser.add_argument("--agreement", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--adapters", type=int, default=0, metavar="N")
    parser.add_argument("--peer", choices=["vllm"])
    parser.add_argument("--bandwidth", type=float, default=3.02e12, help="bytes per second (default: an H100's)")
    parser.add_argument("--flops", type=float, default=750e12, help="per second (default: an H100's in bf16)")
    args = parser.parse_args()
    if args.shared_prefix and args.shape in CHATGLM:
        parser.error("--shared_prefix: the prompts of ChatGLM-6B share nothing, their first token depends on the last")
    if args.peer:
        print(json.dumps(measure_peer(args)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = random_model(args.shape, device, dtype).eval()
    is_chatglm, parameters = args.shape in CHATGLM, model.num_parameters()
    work = draw_work(args, [model.config.gmask_token_id, model.config.bos_token_id] if is_chatglm else [])
    prompts = torch.tensor([prompt for prompt, _ in work.rounds[1]])
    new_tokens = args.batch_size * args.new_tokens
    result = {
        **settings_of(args),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }

    if args.baselines:
        inputs = {"input_ids": prompts.to(device), "attention_mask": torch.ones_like(prompts).to(device)}
        length = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens, "do_sample": False}
        timed(lambda: model.generate(**inputs, max_new_tokens=2, do_sample=False))
        output = []
        seconds = timed(lambda: output.append(model.generate(**inputs, **length)))
        result["generate_tokens_per_second"] = round(new_tokens / seconds)
        if args.agreement:
            result["generate_agreement"] = agreement(
                model, prompts, output[0][:, args.prompt_tokens :], [0] * args.batch_size
            )
        result["generate_batch_tokens_per_second"] = generate_batch_rate(model, prompts, args.new_tokens)

    linear_layers = generation_of_shape(args.shape).linear_layers
    if args.quantize in BITS:
        quantize_linear(model, BITS[args.quantize], linear_layers)
    elif args.quantize:
        fuse_qkv(model)
        convert_to_fp8(model, {*linear_layers, QKV_PROJ}, trains=False)
    prepare_for_decoding(model)

    def engine_of(max_batch_size: int, max_seq_len: int, cache_tokens: int | None = None) -> Engine:
        stop = StopRule(frozenset({-1}))
        return Engine(model, EngineConfig(max_batch_size, max_seq_len, stop, cache_tokens=cache_tokens))

    def one_round(engine: Engine, requests: Requests) -> tuple[float, list[TokenSequence]]:
        """Answers prompts with that number of tokens each; returns the seconds and the sequences in their order."""
        adapters = args.adapters if adapter_choice_of(model) else 0
        sequences = [
            TokenSequence(number, prompt, answer, adapter=1 + number % adapters if adapters else 0)
            for number, (prompt, answer) in enumerate(requests)
        ]
        done: list[TokenSequence] = []
        seconds = timed(lambda: done.extend(engine.answer(sequences)))
        assert sum(len(sequence.answer_ids) for sequence in done) == sum(answer for _, answer in requests)
        return seconds, sequences

    def measure_fixed(engine: Engine) -> tuple[dict[str, float], list[TokenSequence]]:
        """Answers the fixed batch twice; returns the rates of the second round and its sequences."""
        first_seconds = one_round(engine, work.rounds[0])[0]
        engine.runner.compile_seconds = engine.runner.prefill_seconds = 0.0
        seconds, sequences = one_round(engine, work.rounds[1])
        prefill_seconds = engine.runner.prefill_seconds
        decoding = seconds - prefill_seconds
        return {
            "first_round_seconds": round(first_seconds, 2),
            "tokens_per_second": round(new_tokens / seconds),
            "decode_tokens_per_second": round(new_tokens / decoding),
            "ms_a_step": round(1e3 * decoding / args.new_tokens, 3),
            "prefill_seconds": round(prefill_seconds, 3),
            "reading_seconds": round(prefill_seconds, 3),  # its name before
        }, sequences

    max_seq_len = args.prompt_tokens + args.new_tokens
    if args.adapters:
        without = measure_fixed(engine_of(args.batch_size, max_seq_len))[0]
        add_random_adapters(model, args.adapters)
        result |= {"adapters": args.adapters, "without_adapters": without}
    stored = [tensor for module in model.modules() for tensor in module._buffers.values() if tensor is not None]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in {*model.parameters(), *stored})
    if not is_chatglm:  # ChatGLM-6B's head is its embedding and reads all of it; the others' reads a row per token
        weights -= model.get_input_embeddings().weight.numel() * dtype.itemsize
    engine = engine_of(args.batch_size, max_seq_len)
    rates, sequences = measure_fixed(engine)
    filled = args.prompt_tokens + args.new_tokens / 2
    floor = (weights + args.batch_size * filled * kv_bytes_per_token(model)) / args.bandwidth
    result |= rates | {"floor_ms_a_step": round(1e3 * floor, 3)}
    if args.adapters:
        result["speed_kept"] = round(rates["tokens_per_second"] / without["tokens_per_second"], 3)
    if args.agreement:
        answers = torch.tensor([sequence.answer_ids for sequence in sequences])
        adapters = [sequence.adapter for sequence in sequences]
        result["engine_agreement"] = agreement(model, prompts, answers, adapters)
    if args.profile:
        one_round(engine, work.rounds[2])
        with torch.profiler.profile() as profiler:
            one_round(engine, work.rounds[3])
        order = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=80))
    if args.job:
        slots = min(args.job, args.job_batch_size)
        tokens = sorted(len(prompt) + answer for prompt, answer in work.job)
        engine = engine_of(slots, tokens[-1], sum(pages_for(count) * PAGE_TOKENS for count in tokens[-slots:]))
        seconds = one_round(engine, work.job)[0] - engine.runner.compile_seconds
        prompt_tokens = sum(len(prompt) for prompt, _ in work.job)
        distinct_tokens = prompt_tokens - (args.job - 1) * args.shared_prefix
        answered = sum(answer for _, answer in work.job)
        cache = sum(answer * (len(prompt) + answer / 2) for prompt, answer in work.job) * kv_bytes_per_token(model)
        prefill = 2 * parameters * distinct_tokens / args.flops
        floor = (max(answered / slots, 512) * weights + cache) / args.bandwidth + prefill
        result["job"] = {
            "rows": args.job,
            "batch_size": slots,
            "new_tokens": answered,
            "seconds": round(seconds, 2),
            "compile_seconds": round(engine.runner.compile_seconds, 2),
            "preparation_seconds": round(engine.runner.compile_seconds, 2),  # its name before
            "shared_prefix": args.shared_prefix,
            "prompt_tokens": prompt_tokens,
            "prefilled_tokens": engine.scheduler.prefilled_tokens,
            "prefill_seconds": round(engine.runner.prefill_seconds, 2),
            "reading_seconds": round(engine.runner.prefill_seconds, 2),  # its name before
            "tokens_per_second": round(answered / seconds),
            "share_of_floor": round(floor / seconds, 3),
        }
    print(json.dumps(result))


def settings_of(args: argparse.Namespace) -> dict[str, str | int | None]:
    """Returns the settings that a result repeats."""
    return {name: getattr(args, name) for name in ("shape", "batch_size", "prompt_tokens", "new_tokens", "quantize")}


def measure_peer(args: argparse.Namespace) -> dict:
    """
    Returns what vLLM makes of the same work.

    Raises:
        UsageError: vLLM is not installed, has no such model, or a flag is our engine's.
    """
    if args.shape in CHATGLM:
        raise UsageError(f"--peer vllm has no ChatGLM-6B, which is --shape {args.shape}: choose another shape")
    if given := [f"--{name}" for name in OF_OUR_ENGINE if getattr(args, name)]:
        raise UsageError(f"--peer vllm runs vLLM alone: leave out {', '.join(given)}")
    if args.quantize in BITS:
        raise UsageError(f"--peer vllm has no such weights as --quantize {args.quantize}: leave it out, or take fp8")
    config = make_config(args.shape)
    config.architectures = [architecture_of(generation_of_shape(args.shape)).model_class.__name__]
    return settings_of(args) | measure_vllm(args, config, *draw_work(args, []))


def generate_batch_rate(model, prompts: torch.Tensor, new_tokens: int) -> int | str:
    """Returns new tokens per second of transformers' continuous batching, or its error."""
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=0, do_sample=False)
    inputs = prompts.tolist()
    try:
        model.generate_batch(inputs=inputs[:2], generation_config=config)
        output = {}
        seconds = timed(lambda: output.update(model.generate_batch(inputs=inputs, generation_config=config)))
        return round(sum(len(answer.generated_tokens) for answer in output.values()) / seconds)
    except Exception as error:  # its demands on a model differ between versions
        return f"{type(error).__name__}: {error}"[:200]


if __name__ == "__main__":
    run(main)
