"""The engine's greedy answers are those of plain `generate`, whatever shares the batch."""

from tools.random_checkpoint import random_model
from utils.checkpoint import load_model, load_tokenizer
from utils.engine import MOST_READ, Engine, Task, read_size

import pytest
import torch
from conftest import TEXTS, TINY


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
    for slots in (1, 3, 7):
        engine = Engine(model, slots, columns=64, stop_ids=sorted(stops))
        done = list(engine.answer(Task(number, prompt, 20) for number, prompt in enumerate(prompts)))
        assert [task.answer_ids for task in sorted(done, key=lambda task: task.number)] == expected


def test_reads_are_of_few_sizes():
    sizes = {read_size(tokens) for tokens in range(1, MOST_READ + 1)}
    assert len(sizes) == 11 and max(sizes) == MOST_READ
    assert all(tokens <= read_size(tokens) < max(1.5 * tokens + 1, 129) for tokens in range(1, 10000))
