"""Decode steps of GLM by kernels alone, beside a plain forward pass in float32."""

import copy

import pytest
import torch
from kernel_checks import DEVICE, DTYPE, ON_GPU, fp8_on_a_gpu
from transformers import Glm4Config, Glm4ForCausalLM, GlmConfig, GlmForCausalLM

from utils.inference.engine.kv_cache import LayerKVCache
from utils.inference.engine.models.glm import ServedGlm
from utils.inference.engine.pages import PAGE_TOKENS
from utils.inference.placement import prepare_for_decoding
from utils.kernels.decode_attention import decode_attention
from utils.layers.fp8 import convert_to_fp8
from utils.layers.fused_qkv import QKV_PROJ, fuse_qkv
from utils.layers.quantization import BITS, quantize_linear
from utils.models.family import QKV

LINEAR = {QKV_PROJ, "o_proj", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize("weights", ["16 bits", "int8", "int4", pytest.param("fp8", marks=fp8_on_a_gpu)])
@pytest.mark.parametrize("classes", [(GlmConfig, GlmForCausalLM), (Glm4Config, Glm4ForCausalLM)], ids=["glm", "glm4"])
def test_decode_steps(classes, weights):
    """Three sequences, token by token across a page's end, so that all attention is over cached keys."""
    config_class, model_class = classes
    config = config_class(
        hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_hidden_layers=2,
        intermediate_size=384, vocab_size=64, attention_bias=True, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    model = model_class(config).to(DEVICE, DTYPE).eval()
    for name, parameter in model.named_parameters():  # of the scale of a trained model; norms and biases too
        torch.nn.init.normal_(parameter, std=0.1, mean=1.0 if "norm" in name else 0.0)
    if weights in BITS:
        quantize_linear(model, BITS[weights], {*QKV, *LINEAR})
    exact = copy.deepcopy(model).float()
    if weights == "fp8":
        fuse_qkv(model)
        convert_to_fp8(model, LINEAR, trains=False)
    prepare_for_decoding(model)
    steps = PAGE_TOKENS + 2 if ON_GPU else 3  # the interpreter is slow
    tokens = torch.randint(1, 64, (3, steps), device=DEVICE)
    first_position = 0 if ON_GPU else 100
    position_ids = first_position + torch.arange(steps, device=DEVICE)[None]
    table = torch.tensor([[4, 1], [2, 6], [5, 3]], dtype=torch.int32, device=DEVICE)

    def zeros():
        return torch.zeros(7, 2, PAGE_TOKENS, 64, device=DEVICE, dtype=DTYPE)

    with torch.no_grad():
        fused = ServedGlm(model).fused_blocks(2 * PAGE_TOKENS)
        caches = [LayerKVCache(zeros(), zeros(), table, table[:, 0]) for _ in model.model.layers]
        outputs = []
        for step, column in enumerate(tokens.t()):
            number = torch.full((3,), step, device=DEVICE)

            def attend(module, cache, query, number=number):
                return decode_attention(query[:, :, None], cache.keys, cache.values, table, number, module.scaling)

            hidden_states = model.get_input_embeddings()(column[:, None])
            hidden_states = fused.run(hidden_states, number + first_position, caches, (table, number), attend)
            outputs.append(model.lm_head(hidden_states)[:, 0])
        expected = exact(input_ids=tokens, position_ids=position_ids).logits
        plain = model(input_ids=tokens, position_ids=position_ids, use_cache=False).logits
    error, plain_error = ((logits.float() - expected).norm() for logits in (torch.stack(outputs, dim=1), plain))
    assert plain_error > 0
    assert error < 1.3 * plain_error  # as near to float32 as the layers' own forward pass in the same dtype
