"""Decode steps by kernels alone, beside a plain forward pass in float32."""

import copy

import pytest
import torch
from kernel_checks import DEVICE, DTYPE, ON_GPU, fp8_on_a_gpu
from transformers import Glm4Config, Glm4ForCausalLM, GlmConfig, GlmForCausalLM

from utils.inference.engine.kv_cache import LayerKVCache
from utils.inference.engine.models import serve
from utils.inference.engine.pages import PAGE_TOKENS
from utils.inference.placement import prepare_for_decoding
from utils.kernels.decode_attention import decode_attention
from utils.layers.fp8 import convert_to_fp8
from utils.layers.fused_qkv import QKV_PROJ, fuse_qkv
from utils.layers.quantization import BITS, quantize_linear
from utils.models import ChatGLMConfig, ChatGLMForConditionalGeneration
from utils.models.family import QKV

LINEAR = {
    *(QKV_PROJ, "o_proj", "gate_up_proj", "down_proj"),
    *("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
}
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}


def glm(config_class, model_class):
    config = config_class(
        num_key_value_heads=2, head_dim=64, num_hidden_layers=2, intermediate_size=384, attention_bias=True, **SIZES,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    return model_class(config)


def chatglm():
    special = {"bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 3, "gmask_token_id": 4}
    return ChatGLMForConditionalGeneration(ChatGLMConfig(num_layers=2, inner_hidden_size=384, **SIZES, **special))


BUILDERS = {
    "ChatGLM-6B": chatglm,
    "GLM": lambda: glm(GlmConfig, GlmForCausalLM),
    "GLM-4-0414": lambda: glm(Glm4Config, Glm4ForCausalLM),
}


@pytest.mark.parametrize("weights", ["16 bits", "int8", "int4", pytest.param("fp8", marks=fp8_on_a_gpu)])
@pytest.mark.parametrize("family", BUILDERS)
def test_decode_steps(family, weights):
    """Three sequences, token by token across a page's end, so that all attention is over cached keys."""
    model = BUILDERS[family]().to(DEVICE, DTYPE).eval()
    for name, parameter in model.named_parameters():  # of the scale of a trained model; norms and biases too
        is_norm = "norm" in name and name.endswith("weight")
        torch.nn.init.normal_(parameter, std=0.1, mean=1.0 if is_norm else 0.0)
    if weights in BITS:
        quantize_linear(model, BITS[weights], {*QKV, *LINEAR})
    exact = copy.deepcopy(model).float()
    if weights == "fp8":
        fuse_qkv(model)
        convert_to_fp8(model, LINEAR, trains=False)
    prepare_for_decoding(model)
    served = serve(model)
    steps = PAGE_TOKENS + 2 if ON_GPU else 2  # the interpreter is slow
    tokens = torch.randint(5, 64, (3, steps), device=DEVICE)
    first_position = 0 if ON_GPU else 100
    # (steps, coordinates): a second one counts from 1, and differs from the first.
    positions = torch.arange(steps, device=DEVICE)[:, None] + torch.tensor([first_position, 1], device=DEVICE)
    positions = positions[:, : served.coordinates]
    table = torch.tensor([[4, 1], [2, 6], [5, 3]], dtype=torch.int32, device=DEVICE)

    def zeros():
        key_heads = getattr(model.config, "num_key_value_heads", 4)
        return torch.zeros(7, key_heads, PAGE_TOKENS, 64, device=DEVICE, dtype=DTYPE)

    with torch.no_grad():
        fused = served.fused_blocks(2 * PAGE_TOKENS)
        caches = [LayerKVCache(zeros(), zeros(), table, table[:, 0]) for _ in served.blocks]
        outputs = []
        for step, column in enumerate(tokens.t()):
            number = torch.full((3,), step, device=DEVICE)

            def attend(module, cache, query, number=number):
                return decode_attention(query[:, :, None], cache.keys, cache.values, table, number, module.scaling)

            hidden_states = served.embed(column[:, None])
            position_ids = positions[step].expand(3, -1)
            hidden_states = fused.run(hidden_states, position_ids, caches, (table, number), attend)
            outputs.append(served.head(hidden_states)[:, 0])
        position_ids = served.shape_position_ids(positions.t().expand(3, -1, -1))
        expected = exact(input_ids=tokens, position_ids=position_ids).logits
        plain = model(input_ids=tokens, position_ids=position_ids, use_cache=False).logits
    error, plain_error = ((logits.float() - expected).norm() for logits in (torch.stack(outputs, dim=1), plain))
    assert plain_error > 0
    assert error < 1.3 * plain_error  # as near to float32 as the layers' own forward pass in the same dtype
