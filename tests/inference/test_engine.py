"""The engine's greedy answers are those of plain `generate`, whatever shares the batch."""

import gc
import weakref

import pytest
import torch
from conftest import TEXTS, TINY, varlen_attn_reference

from tools.random_checkpoint import random_model
from utils.checkpoint.model import load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.inference.engine import Engine
from utils.inference.engine.prefill import MOST_READ, TokenSequence, pack_prompts, read_size
from utils.layers import varlen_attention


def trained_chatglm() -> tuple:
    model, tokenizer = load_model(str(TINY)), load_tokenizer(str(TINY))
    # The last goes on behind `<sop>`, where tokens see what is before them alone.
    return model, [
        *(tokenizer.encode(text) for text in TEXTS),
        tokenizer.encode("谢谢") + tokenizer.encode("你好")[:-2],
    ]


def random_glm() -> tuple:
    """With weights so large that answers differ."""
    model = random_model("tiny-glm", "cpu", torch.float32, seed=3).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model, [torch.randint(10, 900, (length,)).tolist() for length in (5, 9, 14, 30, 1, 22, 2)]


@pytest.mark.parametrize("made", [trained_chatglm, random_glm])
def test_answers_are_those_of_generate(made):
    model, prompts = made()
    expected = []
    for prompt in prompts:
        input_ids = torch.tensor([prompt])
        settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
        output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **settings)
        expected.append(output[0, len(prompt) :].tolist())
    stops = {expected[0][4], expected[3][9]}
    expected = [next((ids[: i + 1] for i, token in enumerate(ids) if token in stops), ids) for ids in expected]
    assert len({len(ids) for ids in expected}) > 1  # some stop early, and other rows take their slots
    # `min_new_tokens` forbade the model's own end to `generate`.
    with torch.no_grad():
        eos = model.config.eos_token_id
        model.lm_head.register_forward_hook(lambda *args: args[2].index_fill(-1, torch.tensor(eos), -torch.inf))
    for slots, steps, compiled in (
        *((1, 1, False), (3, 1, False), (7, 1, False), (1, 3, False), (7, 2, False)),
        (3, 4, made is random_glm),
    ):
        engine = Engine(model, slots, columns=64, stop_ids=sorted(stops), steps=steps, compile_layers=compiled)
        done = list(engine.answer(TokenSequence(number, prompt, 20) for number, prompt in enumerate(prompts)))
        assert [task.answer_ids for task in sorted(done, key=lambda task: task.number)] == expected


def test_an_engine_goes_with_its_last_reference():
    """And its graphs with it, without a cycle: see `shut_down`."""
    model, prompts = random_glm()
    gc.disable()
    try:
        engine = Engine(model, 2, columns=64, stop_ids=[-1], compile_layers=False)
        assert len(list(engine.answer(TokenSequence(number, prompt, 3) for number, prompt in enumerate(prompts)))) == 7
        left = [weakref.ref(part) for part in (engine, engine.graphs, engine.state)]
        del engine
        assert [part() for part in left] == [None, None, None]
    finally:
        gc.enable()


def test_reads_are_of_few_sizes():
    sizes = {read_size(tokens) for tokens in range(1, MOST_READ + 1)}
    assert len(sizes) == 11 and max(sizes) == MOST_READ
    assert all(tokens <= read_size(tokens) < max(1.5 * tokens + 1, 129) for tokens in range(1, 10000))


@pytest.mark.parametrize("made", [trained_chatglm, random_glm])
@torch.inference_mode()
def test_reading_without_a_mask(made, monkeypatch):
    """What prompts leave in their slots when they are filled up, as on a GPU, is what they leave with a mask."""
    monkeypatch.setattr(varlen_attention, "varlen_attn", varlen_attn_reference)
    model, prompts = made()
    tasks = [TokenSequence(number, prompt, 20) for number, prompt in enumerate(prompts[:5])]
    slots = [4, 0, 5, 2, 1]
    masked, filled = (Engine(model, slots=6, columns=64, stop_ids=[1]) for _ in range(2))
    masked._read(tasks, slots)
    packed = pack_prompts(tasks, slots, filled._positions)
    assert packed.alike
    packed = packed.filled_up(rows=6, column=filled.columns - 1)
    assert packed.tokens.shape[1] == 128 and packed.rows.shape[1] == 6
    filled._compute_read(packed.rows, packed.tokens, packed.starts)
    for name in ("tokens", "lengths", "left", "numbers", "counts", "adapters", "positions"):
        assert getattr(masked.state, name).equal(getattr(filled.state, name))
    for slot, task in zip(slots, tasks, strict=True):
        for ours, theirs in zip(filled.layers, masked.layers, strict=True):
            for kind in ("keys", "values"):
                read, expected = (getattr(layer, kind)[slot, :, : len(task.input_ids) - 1] for layer in (ours, theirs))
                torch.testing.assert_close(read, expected, atol=1e-5, rtol=1e-5)
