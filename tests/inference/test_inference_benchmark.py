"""benchmarks/inference_throughput.py with adapters, and beside vLLM, which a stand-in module replaces."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from utils.inference.engine import Engine

BENCHMARK = "benchmarks/inference_throughput.py --shape tiny-glm --prompt_tokens 9 --new_tokens 6"
KEYS_OF_OURS = {"floor_ms_a_step", "reading_seconds"}  # vLLM's have no counterpart


class VLLM:
    """Stands for the module `vllm`: keeps what `LLM` and `generate` got, and answers with the number of tokens."""

    def __init__(self):
        self.__version__ = "0.0"
        self.engines, self.batches = [], []

    @staticmethod
    def SamplingParams(**settings) -> SimpleNamespace:
        return SimpleNamespace(**settings)

    def LLM(self, model: str, **settings) -> "VLLM":
        self.engines.append(settings | {"config": json.loads(Path(model, "config.json").read_text())})
        return self

    def generate(self, prompts, settings, use_tqdm):
        assert not use_tqdm
        assert all(each.temperature == 0 and each.ignore_eos and not each.detokenize for each in settings)
        lengths = [each.max_tokens for each in settings]
        self.batches.append(list(zip((prompt["prompt_token_ids"] for prompt in prompts), lengths, strict=True)))
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1] * length)]) for length in lengths]


@pytest.fixture
def batches(monkeypatch):
    """The sequences of each batch that our engine gets."""
    kept, answer = [], Engine.answer

    def keep_and_answer(engine, sequences):
        kept.append(list(sequences))
        return answer(engine, sequences)

    monkeypatch.setattr(Engine, "answer", keep_and_answer)
    return kept


@pytest.mark.parametrize("shape", ["tiny", "tiny-glm", "tiny-glm4"])
def test_adapters_are_measured_beside_the_base(run_script, batches, shape):
    command = f"{BENCHMARK} --shape {shape} --batch_size 5 --adapters 2 --agreement"
    result = json.loads(run_script(command).check().out.splitlines()[-1])
    taken = [[sequence.adapter for sequence in batch] for batch in batches]
    assert taken == [[0] * 5, [0] * 5, [1, 2, 1, 2, 1], [1, 2, 1, 2, 1]]
    assert result["adapters"] == 2 and result["engine_agreement"] == 1.0
    base = result["without_adapters"]["tokens_per_second"]
    assert result["speed_kept"] == pytest.approx(result["tokens_per_second"] / base, abs=1e-3)


def test_integers_are_measured(run_script):
    """Their weights are in the floor; the answers are those of a forward pass with the same integers."""
    floors = []
    for flags in ("", "--quantize int8", "--quantize int4"):
        command = f"{BENCHMARK} --batch_size 3 --agreement --bandwidth 1e6 {flags}"
        result = json.loads(run_script(command).check().out.splitlines()[-1])
        assert result["engine_agreement"] == 1.0 and result["quantize"] == (flags.split() or [None])[-1]
        floors.append(result["floor_ms_a_step"])
    assert floors[0] > floors[1] > floors[2]


def test_vllm_gets_the_work_of_our_engine(run_script, batches, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", vllm := VLLM())
    command = f"{BENCHMARK} --batch_size 3 --job 4"
    our_result = json.loads(run_script(command).check().out.splitlines()[-1])
    first, second, job = ([(each.input_ids, each.max_new_tokens) for each in batch] for batch in batches)
    batches.clear()
    result = json.loads(run_script(f"{command} --peer vllm").check().out.splitlines()[-1])
    prefill = [(prompt, 1) for prompt, _ in second]
    assert first != second and {(len(prompt), length) for prompt, length in first + second} == {(9, 6)}
    assert vllm.batches == [first, second, prefill, prefill, job] and not batches
    (engine,) = vllm.engines
    assert engine["max_num_seqs"] == 4 and engine["enable_prefix_caching"] is False
    assert engine["load_format"] == "dummy" and engine["quantization"] is None and engine["skip_tokenizer_init"]
    longest = max(len(prompt) + length for prompt, length in job)
    assert longest <= engine["max_model_len"] < longest + 128
    config = engine["config"]
    assert config["architectures"] == ["GlmForCausalLM"] and config["model_type"] == "glm"
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (64, 2, 1024)
    assert our_result.keys() - result.keys() == KEYS_OF_OURS and result.keys() - our_result.keys() == {"peer"}
    assert result["job"].keys() <= our_result["job"].keys()
    assert result["peer"] == "vllm 0.0" and result["torch"] == torch.__version__


@pytest.mark.parametrize(
    "flags, words",
    [
        ("", "--peer vllm cannot import vLLM (import of vllm halted; None in sys.modules): pip install vllm"),
        ("--agreement --adapters 2", "--peer vllm runs vLLM alone: leave out --agreement, --adapters"),
        ("--quantize int4", "--peer vllm has no such weights as --quantize int4: leave it out, or take fp8"),
        ("--shape tiny", "--peer vllm has no ChatGLM-6B, which is --shape tiny: choose another shape"),
    ],
)
def test_a_peer_that_cannot_run_is_one_line(run_script, monkeypatch, flags, words):
    monkeypatch.setitem(sys.modules, "vllm", None)
    result = run_script(f"{BENCHMARK} --batch_size 3 --peer vllm {flags}")
    assert result.code == 2 and result.out == ""
    (line,) = result.err.splitlines()
    assert words in line
