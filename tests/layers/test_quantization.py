"""INT8 and INT4: the released checkpoints against values of the released code, and full ones quantised on load."""

import json
import sys

import pytest
import torch
from conftest import GOLDEN, TINY, check_generation
from safetensors.torch import load_file
from torch import nn

from utils.checkpoint.model import Checkpoint, load_model
from utils.common.errors import UsageError
from utils.layers import quantization
from utils.layers.quantization import (
    BITS,
    QuantizedLinear,
    dequantize,
    load_nvrtc_kernel,
    load_triton_kernels,
    quantize,
)
from utils.lora.adapter import LoraSettings, attach_adapter

RELEASED = ("chatglm-6b-int4-tiny", "chatglm-6b-int8-tiny", "chatglm-6b-int4-qe-tiny", "chatglm2-6b-int4-tiny")
FULL = {"int4": "chatglm-6b-int4-tiny", "int8": "chatglm-6b-int8-tiny"}  # of chatglm-6b-tiny
TRAIN = f"multi_gpu_fintune_belle.py --model_name_or_path {TINY} --lora_rank 4 --learning_rate 2e-3 --max_steps 4"


def values_of(name):
    return json.loads((GOLDEN / name / "golden.json").read_text()), load_file(GOLDEN / name / "golden.safetensors")


@pytest.mark.parametrize("name", RELEASED)
def test_released_checkpoint(name):
    """In the rounding of the released GPU kernels; the other one differs by up to 0.02."""
    values, tensors = values_of(name)
    model = load_model(str(GOLDEN / name))
    with torch.no_grad():
        for i in range(3):
            logits = model(input_ids=tensors[f"prompt.{i}.input_ids"]).logits
            assert (logits - tensors[f"prompt.{i}.logits"]).abs().max() <= 1e-4
    assert values["generate"]
    for case in values["generate"]:
        check_generation(model, tensors, case)


@pytest.mark.parametrize("name", RELEASED[:2])
def test_every_byte(name):
    tensors = values_of(name)[1]
    bits = 4 if "int4" in name else 8
    packed, scale = tensors["synthetic.packed"], tensors["synthetic.scale"]
    assert torch.equal(dequantize(packed, scale, bits, torch.float16), tensors["synthetic.dequant"])
    integers = dequantize(packed, torch.ones_like(scale), bits, torch.float32)
    assert torch.equal(integers.to(torch.int8), tensors["synthetic.unpacked"])


@pytest.mark.parametrize("quantize_to", FULL)
def test_quantising_on_load_makes_the_released_integers(quantize_to):
    quantised = load_model(str(GOLDEN / "chatglm-6b-tiny"), quantize=quantize_to).state_dict()
    released = load_model(str(GOLDEN / FULL[quantize_to])).state_dict()
    assert quantised.keys() == released.keys()
    assert sum(value.dtype == torch.int8 for value in quantised.values()) == 4 * 3
    assert all(torch.equal(quantised[key], released[key]) for key in quantised)


@pytest.mark.parametrize("name", ("chatglm3-6b-tiny", "glm-4-9b-chat-tiny", "glm4-9b-0414-tiny"))
@pytest.mark.parametrize("quantize_to, tolerance", [("int8", 0.01), ("int4", 0.15)])
def test_quantised_weights_are_near_the_full_ones(name, quantize_to, tolerance):
    full = load_model(str(GOLDEN / name)).state_dict()
    quantised = load_model(str(GOLDEN / name), quantize=quantize_to)
    layers = {n: m for n, m in quantised.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == 6 * 3
    for key, layer in layers.items():
        weight = dequantize(layer.weight, layer.weight_scale, layer.bits, torch.float32)
        largest = full[f"{key}.weight"].abs().amax(dim=1, keepdim=True)
        assert ((weight - full[f"{key}.weight"]) / largest).abs().max() <= tolerance


def test_a_row_of_zeros_stays_zeros():
    integers, scale = quantize(torch.tensor([[0.0, 0.0], [1.0, -0.5]]), 8)
    assert integers.tolist() == [[0, 0], [127, -64]]
    assert dequantize(integers, scale, 8, torch.float32)[0].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_scales_stay_float16(dtype):
    model = load_model(str(GOLDEN / FULL["int4"]))
    before = {key: value.clone() for key, value in model.state_dict().items() if key.endswith("weight_scale")}
    model.to(dtype)
    after = model.state_dict()
    assert len(before) == 12 and all(torch.equal(after[key], value) for key, value in before.items())
    assert after["transformer.word_embeddings.weight"].dtype == dtype


def test_gradients_are_those_of_the_dequantised_weights():
    """A LoRA adapter on a quantised base learns as on a full base with the same values."""
    quantised, full = load_model(str(GOLDEN / FULL["int4"])), load_model(str(GOLDEN / "chatglm-6b-tiny"))
    for name, layer in quantised.named_modules():
        if isinstance(layer, QuantizedLinear):
            weight = dequantize(layer.weight, layer.weight_scale, layer.bits, torch.float32)
            full.get_submodule(name).weight.data = weight
    tensors = load_file(GOLDEN / "chatglm-6b-tiny" / "golden.safetensors")
    batch = {key: tensors[f"train.single.{key}"] for key in ("input_ids", "labels")}
    gradients = []
    for model in (quantised, full):
        adapted = attach_adapter(model, LoraSettings(4, 32, 0.0, ["query_key_value", "dense"]), seed=0)
        torch.manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        adapted(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 2 * 2 * 3
    for name, gradient in gradients[0].items():
        assert gradient.norm() > 0 and (gradient - gradients[1][name]).norm() <= 1e-4 * gradient.norm(), name


@pytest.fixture
def choose_kernels(monkeypatch):
    """choose_kernels(name): use only those of that name, as if CHATGLM_KERNELS had it at the start."""

    def forget():
        load_triton_kernels.cache_clear()
        load_nvrtc_kernel.cache_clear()

    def choose(name):
        monkeypatch.setattr(quantization, "REQUESTED", name)
        forget()

    yield choose
    forget()


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIXTEEN_BITS = [(name, dtype) for name in ("triton", "cpm_kernels") for dtype in quantization.SIXTEEN_BITS]


@on_gpu
@pytest.mark.parametrize("name, dtype", [*SIXTEEN_BITS, ("cpm_kernels", torch.float32)])
@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.parametrize("rows, columns", ((1, 1), (3, 17), (129, 1031), (4608, 4096)))
def test_gpu_kernels_compute_what_torch_does(choose_kernels, name, dtype, bits, rows, columns):
    """Bit for bit; `columns` are bytes."""
    choose_kernels(name)
    if name == "triton":
        dequantize_on_gpu = load_triton_kernels().dequantize_with_triton
    else:
        dequantize_on_gpu = load_nvrtc_kernel().dequantize_with_nvrtc
    torch.manual_seed(0)
    weight = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, device="cuda")
    scale = torch.rand(rows, device="cuda").half()
    assert torch.equal(dequantize_on_gpu(weight, scale, bits, dtype), dequantize(weight, scale, bits, dtype))


@on_gpu
@pytest.mark.parametrize("quantize_to, dtype", [("int8", torch.bfloat16), ("int4", torch.float16)])
def test_gpu_layers_agree_whatever_the_kernels(choose_kernels, quantize_to, dtype):
    """Forward, and backward in autograd's own thread, for few rows and for many."""
    values = {}
    for name in ("torch", "cpm_kernels", "triton"):
        choose_kernels(name)
        torch.manual_seed(0)
        layer = QuantizedLinear(nn.Linear(96, 130, bias=False), BITS[quantize_to])
        layer.to_empty(device="cuda")
        integers, scale = quantize(torch.randn(130, 96), layer.bits)
        layer.weight.copy_(integers)
        layer.weight_scale.copy_(scale)
        hidden_states = torch.randn(200, 96).to("cuda", dtype).requires_grad_()
        output = layer(hidden_states)
        output.sum().backward()
        with torch.no_grad():
            values[name] = output, hidden_states.grad, layer(hidden_states[:3])
    for name in ("cpm_kernels", "triton"):
        for actual, expected in zip(values[name], values["torch"], strict=True):
            assert (actual - expected).norm() <= 1e-2 * expected.norm()


def test_where_cpm_kernels_fails_torch_serves(choose_kernels, monkeypatch, capsys):
    choose_kernels("cpm_kernels")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "cpm_kernels" or "nvrtc" in name]:
        monkeypatch.delitem(sys.modules, name)
    assert load_nvrtc_kernel() is load_nvrtc_kernel() is None
    output = capsys.readouterr().out
    assert output.count("\n") == 1 and "dequantised by torch operations: cpm_kernels does not run here" in output


def test_kernels_that_nobody_knows(choose_kernels):
    choose_kernels("cuda")
    with pytest.raises(UsageError, match="CHATGLM_KERNELS=cuda: give triton, cpm_kernels or torch"):
        load_triton_kernels()


@pytest.fixture(scope="module")
def workspace(run_script, tokens, tmp_path_factory):
    """An adapter trained on the tiny model in int4 by one process."""
    path = tmp_path_factory.mktemp("quantised")
    train = f"{TRAIN} --dataset_path {tokens} --quantize int4"
    result = run_script(f"{train} --per_device_train_batch_size 4 --output_dir {path}/adapter").check()
    assert "weights int4, computing in float32" in result.words
    return path


def test_ddp_trains_the_adapter_of_one_process(run_ranks, tokens, workspace):
    command = f"{TRAIN} --dataset_path {tokens} --quantize int4"
    run_ranks(2, f"{command} --per_device_train_batch_size 2 --output_dir {workspace}/ddp").check()
    expected, actual = (load_file(workspace / name / "adapter_model.safetensors") for name in ("adapter", "ddp"))
    assert actual.keys() == expected.keys()
    assert all((actual[key] - expected[key]).abs().max() <= 1e-4 for key in expected)


def test_every_placement_gives_the_same_answers(run_ranks, workspace):
    def answers(command, processes=1):
        flags = f"--quantize int4 --adapter_path {workspace}/adapter --max_new_tokens 12 --batch_size 3"
        paths = f"--model_name_or_path {TINY} --output_path {workspace}/answers --overwrite"
        result = run_ranks(processes, f"{command} {paths} {flags}").check()
        return (workspace / "answers").read_text(), result.out

    plain, _ = answers("chatglm_milti_gpu_inference.py")
    assert len(plain.splitlines()) == 8
    limits = f"--max_memory cpu=2MiB --offload_folder {workspace}/offload"
    offloaded, output = answers(f"chatglm_milti_gpu_inference.py {limits}")
    assert "on disk" in output and offloaded == plain
    replicated, output = answers("chatglm_deepspeed_inference.py", processes=2)
    assert output.count("int4 weights are not sharded") == 1 and replicated == plain


@pytest.mark.parametrize(
    "name", ("chatglm2-6b-tiny", "chatglm3-6b-tiny", "glm-4-9b-chat-tiny", "glm4-9b-0414-tiny", *RELEASED)
)
def test_every_generation_trains_and_answers(run_script, tmp_path, name):
    """Released integers are recognised; full weights are quantised on load."""
    flags = f"--model_name_or_path {GOLDEN / name}" + (" --quantize int8" if name not in RELEASED else "")
    run_script(
        f"tokenize_dataset_rows_belle.py --jsonl_path data/sample.train.json --save_path {tmp_path}/tokens "
        f"--max_seq_length 60 --model_name_or_path {GOLDEN / name}"
    ).check()
    result = run_script(
        f"multi_gpu_fintune_belle.py --dataset_path {tmp_path}/tokens --lora_rank 4 --learning_rate 2e-3 "
        f"--max_steps 2 --output_dir {tmp_path}/adapter {flags}"
    ).check()
    assert f"weights int{4 if 'int4' in name else 8}, computing in float32" in result.words
    run_script(
        f"chatglm_milti_gpu_inference.py --adapter_path {tmp_path}/adapter --output_path {tmp_path}/answers "
        f"--max_new_tokens 4 {flags}"
    ).check()
    assert len((tmp_path / "answers").read_text().splitlines()) == 8


def test_zero3_is_refused(run_ranks, tokens, tmp_path):
    command = f"{TRAIN} --dataset_path {tokens} --output_dir {tmp_path}/none --quantize int8"
    result = run_ranks(1, f"{command} --deepspeed ds_config_zero3.json")
    assert result.code == 2 and "a quantised base cannot be partitioned by ZeRO-3" in result.err
    assert "Traceback" not in result.err


def test_wrong_use():
    with pytest.raises(UsageError, match="quantised to 4 bits already"):
        Checkpoint.open(str(GOLDEN / FULL["int4"]), quantize="int8")
    assert not Checkpoint.open(str(GOLDEN / FULL["int4"]), quantize="int4").quantizes
    with pytest.raises(UsageError, match="a weight has 171 a row: use --quantize int8"):
        load_model(str(GOLDEN / "chatglm2-6b-tiny"), quantize="int4")


def test_a_number_of_bits_that_nobody_released(tmp_path):
    config = json.loads((GOLDEN / FULL["int4"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_bit": 3}))
    with pytest.raises(UsageError, match="quantization_bit is 3, not 4 or 8"):
        Checkpoint.open(str(tmp_path))
