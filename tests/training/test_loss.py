"""The head that returns the loss of targets: what it computes, and what stays as it was around it."""

import gc
import weakref

import pytest
import torch
from conftest import GOLDEN
from transformers.utils.generic import find_labels

from utils.checkpoint.model import load_model
from utils.layers.quantization import QuantizedLinear
from utils.lora.adapter import LoraSettings, attach_adapter
from utils.training.loss import (
    FrozenHeadCrossEntropy,
    QuantizedHeadCrossEntropy,
    WithTargetLoss,
    cross_entropy,
    use_target_loss,
)

MODELS = {
    "chatglm-6b-tiny": ["query_key_value"],
    "chatglm-6b-int4-qe-tiny": ["query_key_value"],
    "chatglm2-6b-tiny": ["q_proj", "k_proj", "v_proj"],
    "glm4-9b-0414-tiny": ["q_proj", "k_proj", "v_proj"],
}


def adapted(name):
    return attach_adapter(load_model(str(GOLDEN / name)), LoraSettings(4, 8, 0.0, MODELS[name]), seed=0)


def input_ids(config):
    ids = torch.randint(100, 160, (2, 9), generator=torch.Generator().manual_seed(0))
    if hasattr(config, "gmask_token_id"):
        ids[:, 2], ids[:, 3] = config.gmask_token_id, config.bos_token_id
    return ids


def test_cross_entropy_and_its_gradient():
    logits = torch.randn(5, 11, requires_grad=True)
    targets = torch.randint(0, 11, (5,))
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    expected.backward()
    total, gradient = cross_entropy(logits.detach(), targets)
    assert (total - expected).abs() <= 1e-5 and (gradient - logits.grad).abs().max() <= 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_the_model_stays_what_others_look_for(name):
    model = adapted(name)
    stock = model.get_base_model()
    stock_class, stock_reference = type(stock), weakref.ref(stock)
    names, parameters = list(model.state_dict()), dict(model.named_parameters())
    for _ in range(2):
        use_target_loss(model)
        base = model.get_base_model()
        assert isinstance(base, WithTargetLoss) and isinstance(base, stock_class)
        assert list(model.state_dict()) == names
        assert all(value is parameters[key] for key, value in model.named_parameters())
        assert find_labels(type(base)) == ["labels"]  # as Trainer asks
        head = base.get_output_embeddings()
        is_quantized = isinstance(stock.get_output_embeddings(), QuantizedLinear)
        assert type(head) is (QuantizedHeadCrossEntropy if is_quantized else FrozenHeadCrossEntropy)
        assert not [path for path, module in model.named_modules() if "forward" in vars(module)]
    del stock, parameters
    gc.collect()
    assert stock_reference() is None  # with what FSDP2 will shard


@pytest.mark.parametrize("name", MODELS)
def test_other_calls_compute_what_they_did(name):
    model = adapted(name).eval()
    ids = input_ids(model.config)
    prompt = ids[:1, :4]
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids, use_cache=False)
        answer = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
        use_target_loss(model)
        actual = model(input_ids=ids, labels=ids, use_cache=False)
        assert torch.equal(actual.logits, expected.logits) and torch.equal(actual.loss, expected.loss)
        assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False), answer)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_that_of_the_logits(name, compiled):
    model = adapted(name).eval()
    use_target_loss(model, compiled)
    ids = input_ids(model.config)
    positions = torch.tensor([4, 6, 13])
    targets = ids.flatten()[positions + 1]
    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[positions]
    expected = torch.nn.functional.cross_entropy(logits.float(), targets)
    mean = model(input_ids=ids, target_positions=positions, target_ids=targets).loss
    total = model(input_ids=ids, target_positions=positions, target_ids=targets, num_items_in_batch=1).loss
    assert (mean - expected).abs() <= 1e-5 and (total - 3 * expected).abs() <= 3e-5
