"""One adapter beside the weights, where merging is not exact: every row takes it, on the engine's own layers."""

import pytest
import torch
from conftest import GOLDEN

from utils.checkpoint.model import load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.inference.adapters import AttachAdapters
from utils.inference.batch_generator import AnswerSettings, BatchGenerator, PromptCodec
from utils.inference.placement import prepare_for_decoding
from utils.inference.prompt_reader import PromptRow
from utils.layers.fused_qkv import FusedQKVAttention
from utils.layers.mixed_lora import MixedLoraLinear
from utils.lora.adapter import load_adapter
from utils.lora.multi_lora import adapter_choice_of
from utils.models.templates import template_for

BASES = {"v1": "chatglm-6b-tiny", "v2": "chatglm2-6b-tiny", "v3": "chatglm3-6b-tiny"}
SETTINGS = AnswerSettings(max_new_tokens=8)


def adapter_of(version: str) -> str:
    return str(GOLDEN / "adapters" / version / "all")


@pytest.mark.parametrize("version", BASES)
def test_answers_are_those_of_peft_and_generate(version):
    """Over integers, which take no adapter; the base model answers otherwise."""
    path = str(GOLDEN / BASES[version])
    tokenizer = load_tokenizer(path)
    template = template_for(tokenizer, "native")
    prompts = [tokenizer.encode(text) for text in ("你好", "写一首诗", "把下面的句子写成日记")]

    def answers_of(model) -> list[str]:
        prepare_for_decoding(model)
        generator = BatchGenerator(model, PromptCodec(tokenizer, template), SETTINGS, torch.device("cpu"))
        rows = [PromptRow(number, "", prompt) for number, prompt in enumerate(prompts)]
        return [row["answer"] for row in sorted(generator.run(rows), key=lambda row: row["index"])]

    model = AttachAdapters((adapter_of(version),))(load_model(path, quantize="int8"))
    answers = answers_of(model)
    if version != "v1":
        attention = model.model.layers[0].self_attn
        assert isinstance(attention, FusedQKVAttention) and isinstance(attention.qkv_proj, MixedLoraLinear)
    by_peft = load_adapter(load_model(path, quantize="int8"), adapter_of(version))
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        eos = sorted(template.stop_ids(tokenizer))
        output = by_peft.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=eos
        )[0, len(prompt) :].tolist()
        ended = output[-1] in eos
        expected.append(PromptCodec(tokenizer, template).split_answer(output[:-1] if ended else output)[0])
    assert [text.strip() for text in answers] == [text.strip() for text in expected]
    assert answers != answers_of(load_model(path, quantize="int8"))


@pytest.mark.parametrize("dtype, is_merged", [(torch.float32, True), (torch.bfloat16, False)])
def test_in_float32_it_is_merged(dtype, is_merged):
    model = AttachAdapters((adapter_of("v3"),))(load_model(str(GOLDEN / BASES["v3"]), dtype))
    assert (adapter_choice_of(model) is None) is is_merged
