"""Models, prompts and a stand-in for the kernels, with which the engine is tested."""

from types import SimpleNamespace

import torch
from conftest import TEXTS, TINY
from eager_graphs import EagerGraphs

from tools.random_checkpoint import random_model
from utils.checkpoint.model import load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.inference.engine import attention
from utils.inference.engine.model_runner import ModelRunner
from utils.inference.engine.scheduler import StopRule, TokenSequence

NEVER = StopRule(frozenset({-1}))


def trained_chatglm() -> tuple:
    model, tokenizer = load_model(str(TINY)), load_tokenizer(str(TINY))
    # The last continues after `<sop>`, from where on tokens attend only to those before them.
    return model, [
        *(tokenizer.encode(text) for text in TEXTS),
        tokenizer.encode("谢谢") + tokenizer.encode("你好")[:-2],
    ]


def random_glm(shape: str = "tiny-glm") -> tuple:
    """With weights so large that answers differ."""
    model = random_model(shape, "cpu", torch.float32, seed=3).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model, [torch.randint(10, 900, (length,)).tolist() for length in (5, 9, 14, 30, 1, 22, 2)]


def random_glm4() -> tuple:
    """GLM-4-0414."""
    return random_glm("tiny-glm4")


def sequences_of(prompts: list[list[int]], max_new_tokens: int) -> list[TokenSequence]:
    return [TokenSequence(number, prompt, max_new_tokens) for number, prompt in enumerate(prompts)]


class KernelRunner(ModelRunner):
    """Takes the path of a GPU with kernels: padded prefills from static inputs, attention by lengths, no masks."""

    def __init__(self, *args):
        super().__init__(*args)
        self.has_kernels, self.graphs = True, EagerGraphs()


def attend_by_lengths(query, keys, values, page_table, lengths, scaling):
    """What the Triton kernel computes, from a cache whose unfilled tokens are never read."""
    output = torch.empty_like(query).transpose(1, 2)
    for row, last in enumerate(lengths.tolist()):
        pages = page_table[row, : last // 64 + 1]
        filled = [cache[pages].transpose(0, 1).flatten(1, 2)[None, :, : last + 1] for cache in (keys, values)]
        attended = torch.nn.functional.scaled_dot_product_attention(
            query[row : row + 1], *filled, scale=scaling, enable_gqa=True
        )
        output[row] = attended[0].transpose(0, 1)
    return output


def attend_by_tiles(query, keys, values, tiles, pages, scaling):
    """What the Triton kernel computes; tokens of no tile are NaN."""
    output = torch.full_like(query.contiguous(), torch.nan)
    for first, count, position, first_page, prefix in tiles.tolist():
        end = max(position + count, prefix) if count else 0
        own_pages = pages[first_page : first_page + -(-end // 64)]
        visible = torch.arange(end) < torch.arange(position + 1, position + count + 1).clamp(min=prefix)[:, None]
        attended = [cache[own_pages].transpose(0, 1).flatten(1, 2)[None, :, :end] for cache in (keys, values)]
        output[first : first + count] = torch.nn.functional.scaled_dot_product_attention(
            query[first : first + count].transpose(0, 1)[None],
            *attended,
            attn_mask=visible,
            scale=scaling,
            enable_gqa=True,
        )[0].transpose(0, 1)
    return output


def put_torch_for_kernels(monkeypatch) -> None:
    """Let torch compute what the kernels of a GPU do."""
    for name, function in (("decode_attention", attend_by_lengths), ("prefill_attention", attend_by_tiles)):
        module = SimpleNamespace(**{name: function})
        monkeypatch.setattr(attention, f"load_{name}", lambda module=module: module)
