"""The engine with all of its kernels: greedy answers in 16 bits, beside those in float32 without kernels."""

from pathlib import Path

import pytest
import torch
from eager_graphs import EagerGraphs
from kernel_checks import DEVICE, ON_GPU

from tools.random_checkpoint import random_model
from utils.checkpoint.model import load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.inference.adapters import AttachAdapters
from utils.inference.engine import Engine
from utils.inference.engine.model_runner import EngineConfig, ModelRunner
from utils.inference.engine.scheduler import StopRule, TokenSequence
from utils.inference.placement import prepare_for_decoding
from utils.lora.multi_lora import adapter_choice_of

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NEVER = StopRule(frozenset({-1}))
NEW_TOKENS = 8 if ON_GPU else 2  # the interpreter is slow


class InterpretedRunner(ModelRunner):
    """Takes the path of a GPU where Triton's interpreter computes."""

    def __init__(self, *args):
        super().__init__(*args)
        if not ON_GPU:
            self.has_kernels, self.graphs = True, EagerGraphs()
            self.fused = self.served.fused_blocks(self.max_seq_len)


def of_file(name: str, dtype: torch.dtype):
    path = str(GOLDEN / name)
    tokenizer = load_tokenizer(path)
    return load_model(path, dtype), [tokenizer.encode(text) for text in ("老王昨天在家里喝茶", "你好")]


def random_of(shape: str, dtype: torch.dtype):
    """With weights so large that answers differ and 16 bits choose the same tokens."""
    model = random_model(shape, "cpu", torch.float32, seed=3)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval(), [torch.randint(10, 900, (length,)).tolist() for length in (5, 70)]


@pytest.mark.parametrize(
    "build, source, adapters",
    [
        (of_file, "chatglm-6b-tiny", ()),
        (of_file, "chatglm-6b-tiny", ("v1/all",)),
        (of_file, "chatglm3-6b-tiny", ("v3/all",)),
        (random_of, "tiny-glm", ()),
        (random_of, "tiny-glm4", ()),
    ],
)
def test_answers_are_those_without_kernels(build, source, adapters):
    """An adapter is merged in float32, and beside the weights in 16 bits."""
    answers = []
    without, with_kernels = (torch.float32, "cpu", ModelRunner), (torch.float16, DEVICE, InterpretedRunner)
    for dtype, device, runner_type in (without, with_kernels):
        model, prompts = build(source, dtype)
        model = AttachAdapters(tuple(str(GOLDEN / "adapters" / name) for name in adapters))(model.to(device))
        number_of_adapter = int(adapter_choice_of(model) is not None)
        assert number_of_adapter == (bool(adapters) and dtype == torch.float16)
        prepare_for_decoding(model)
        engine = Engine(model, EngineConfig(2, 128, NEVER, compile_layers=False), runner_type)
        assert (engine.runner.fused is not None) is (runner_type is InterpretedRunner)
        done = engine.answer(
            [TokenSequence(number, prompt, NEW_TOKENS, number_of_adapter) for number, prompt in enumerate(prompts)]
        )
        answers.append([sequence.answer_ids for sequence in sorted(done, key=lambda each: each.sequence_id)])
    assert answers[1] == answers[0] and answers[0][0] != answers[0][1]
