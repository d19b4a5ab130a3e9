"""What makes training fast computes what PEFT, padding and sdpa compute."""

import copy
import gc
import json
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import varlen_attn_reference
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tools.random_checkpoint import random_model
from utils.data.collators import PackingCollator, RowsByLength
from utils.data.packing import PackShape
from utils.layers import varlen_attention
from utils.layers.fused_qkv import MovedToFusedQKV, ShardedLinear, fuse_lora_qkv
from utils.lora.adapter import LoraSettings, attach_adapter
from utils.models.family import CHATGLM_6B
from utils.models.modeling_chatglm import derive_position_ids
from utils.training.loss import use_target_loss
from utils.training.optimize import Optimizations, configure_zero3, decoder_blocks, optimize_for_training
from utils.training.throughput import Throughput

TARGETS = {
    "tiny": ["query_key_value"],
    "tiny-glm": ["q_proj", "k_proj", "v_proj"],
    "tiny-glm4": ["q_proj", "k_proj", "v_proj"],
}
TRAIN = "multi_gpu_fintune_belle.py"


def rows_of(config, lengths, seed=0):
    """Rows of random tokens, prompts of four; those of ChatGLM-6B end in `[gMASK] <sop>`."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(100, 800, (length,), generator=generator).tolist()
        if hasattr(config, "gmask_token_id"):
            ids[2:4] = [config.gmask_token_id, config.bos_token_id]
        rows.append({"input_ids": ids, "labels": [-100] * 4 + ids[4:]})
    return rows


def positions_of(config):
    if hasattr(config, "gmask_token_id"):
        return lambda ids: derive_position_ids(ids, None, config)
    return lambda ids: torch.arange(ids.shape[1])[None]


def loss_and_gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.grad = None
    ids = torch.tensor([rows_of(model.config, [12])[0]["input_ids"]])
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", TARGETS)
def test_layers_compute_what_peft_computes(shape):
    base = random_model(shape, "cpu", torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, target_modules=TARGETS[shape])
    reference = get_peft_model(copy.deepcopy(base), config)
    model = attach_adapter(base, LoraSettings(8, 32, 0.0, TARGETS[shape]), seed=0)
    fused, sharded = copy.deepcopy(model), copy.deepcopy(model)
    fuse_lora_qkv(fused)
    fuse_lora_qkv(sharded, sharded=True)
    for fused_model, kind in ((fused, MovedToFusedQKV), (sharded, ShardedLinear)):
        assert any(isinstance(module, kind) for module in fused_model.modules()) == (shape != "tiny")
    expected_loss, expected = loss_and_gradients(reference)
    for adapted in (model, fused, sharded):
        loss, gradients = loss_and_gradients(adapted)
        assert gradients.keys() == expected.keys() and (loss - expected_loss).abs() <= 1e-6
        assert all((gradients[name] - value).abs().max() <= 1e-6 for name, value in expected.items())
        assert adapted.get_nb_trainable_parameters() == reference.get_nb_trainable_parameters()
    assert sharded.state_dict().keys() == model.state_dict().keys()


def test_no_fused_weight_waits_for_the_backward_pass():
    """ZeRO-3 frees the parameters that compiled layers kept, and gathers them again; nothing else of their size."""
    layers = [torch.nn.Linear(96, rows).requires_grad_(False) for rows in (96, 32, 32)]
    fused = torch.compile(ShardedLinear(layers), backend="aot_eager_decomp_partition", fullgraph=True)
    inputs, kept = torch.randn(2, 5, 96, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = fused(inputs)
    weights = {layer.weight.data_ptr() for layer in layers}
    assert weights <= {tensor.data_ptr() for tensor in kept}
    assert all(tensor.data_ptr() in weights for tensor in kept if tensor.numel() >= 32 * 96)
    assert (output - torch.cat([layer(inputs) for layer in layers], dim=-1)).abs().max() <= 1e-6
    output.sum().backward()
    assert (inputs.grad - sum(layer.weight.sum(dim=0) for layer in layers)).abs().max() <= 1e-5


def cpu_arguments():
    """What `optimize_for_training` asks of TrainingArguments, on a CPU without DeepSpeed."""
    return SimpleNamespace(use_cpu=True, deepspeed_plugin=None)


@pytest.mark.parametrize("shape", TARGETS)
def test_no_forward_of_an_instance_is_replaced(shape):
    """All that a run changes: classes, names that others look for, and weights that stay the same objects."""
    model = attach_adapter(random_model(shape, "cpu", torch.float32), LoraSettings(8, 32, 0.0, TARGETS[shape]), seed=0)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    block_names = [type(block).__name__ for block in decoder_blocks(model)]
    blocks = [weakref.ref(block) for block in decoder_blocks(model)]
    use_target_loss(model)
    for _ in range(2):
        optimize_for_training(model, CHATGLM_6B, cpu_arguments(), Optimizations(False, False, compile_layers=True))
        assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
        assert [type(block).__name__ for block in decoder_blocks(model)] == block_names and len(block_names) == 2
        after = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        assert [name for name, _ in after] == [name for name, _ in trained]
        assert all(p is before for (_, p), (_, before) in zip(after, trained, strict=True))
    assert type(decoder_blocks(model)[0]) is type(decoder_blocks(model)[1])
    gc.collect()
    assert not [block for block in blocks if block() is not None]  # nor the weights that they had


@pytest.mark.parametrize("shape", TARGETS)
def test_attention_without_a_mask(shape, monkeypatch):
    """The same logits and gradients as with sdpa's mask, in a batch that is filled up."""
    monkeypatch.setattr(varlen_attention, "varlen_attn", varlen_attn_reference)
    model = random_model(shape, "cpu", torch.float32).eval()
    rows, positions = rows_of(model.config, (9, 14, 23, 5)), positions_of(model.config)

    def logits_and_gradients(pack_shape):
        batch = PackingCollator(positions, 3, pack_shape)([rows])
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "real_tokens")}
        assert inputs.pop("target_ids").tolist() == [token for row in rows for token in row["input_ids"][4:]]
        del inputs["target_positions"]
        logits = model(**inputs, use_cache=False).logits
        model.zero_grad()
        (logits[:, :51] * weights).sum().backward()
        return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}

    weights = torch.randn(51, model.config.vocab_size, generator=torch.Generator().manual_seed(1))
    expected, expected_gradients = logits_and_gradients(None)
    model.set_attn_implementation(varlen_attention.VARLEN)
    actual, gradients = logits_and_gradients(PackShape(tokens=80, rows=9, longest=23))
    assert actual.shape[1] == 80 and actual.isfinite().all()
    assert (actual[:, :51] - expected).abs().max() <= 1e-5
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.fixture
def packed_run(run_script, tmp_path):
    """The flags of three steps of a random model on packed rows."""
    base = f"--model_name_or_path {tmp_path}/base"
    run_script(f"tools/random_checkpoint.py --shape tiny-glm --output_dir {tmp_path}/base").check()
    run_script(
        f"tokenize_dataset_rows_belle.py --jsonl_path data/sample.train.json --save_path {tmp_path}/tokens {base}"
    ).check()
    return f"{base} --dataset_path {tmp_path}/tokens --packing --pack_tokens 1024 --max_steps 3 --logging_steps 1"


def test_compiled_layers_train_the_same_adapter(run_script, run_ranks, packed_run, tmp_path):
    """
    With batches that are filled up to one shape, as compiled layers need them, made by a process beside; and where
    ZeRO-3 gathers and releases their weights.
    """
    zero3 = f"--deepspeed ds_config_zero3.json --compile_layers true --output_dir {tmp_path}/zero3"
    run_ranks(2, f"{TRAIN} {packed_run} --per_device_train_batch_size 1 {zero3}").check()
    for compiled, workers in (("true", 1), ("false", 0)):
        how = f"--compile_layers {compiled} --dataloader_num_workers {workers} --per_device_train_batch_size 2"
        out = f"{how} --output_dir {tmp_path}/{compiled}"
        output = run_script(f"{TRAIN} {packed_run} {out}").check().out
        assert "tokens/s  time left" in output and '"first_step_seconds"' in output
    plain, *compiled = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("false", "true", "zero3")
    )
    assert all((state[name] - plain[name]).abs().max() <= 1e-6 for state in compiled for name in plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: on a CPU the gradients are right either way")
def test_gradients_of_zero3_on_a_gpu(run_command, packed_run, tmp_path):
    """If DeepSpeed's linear function is inside compiled layers, gradients are a sixth too small."""
    norms = {}
    for name, zero3 in (("plain", ""), ("zero3", "--deepspeed ds_config_zero3.json")):
        output = f"--output_dir {tmp_path}/{name}"
        run_command(f"{sys.executable} {TRAIN} {packed_run} --bf16 {zero3} {output}").check()
        lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        norms[name] = [values["grad_norm"] for values in map(json.loads, lines) if "grad_norm" in values]
    assert len(norms["plain"]) == 3 and norms["zero3"] == pytest.approx(norms["plain"], rel=0.01)


def test_compiled_layers_have_torchs_own_product():
    """With DeepSpeed's, gradients were wrong on a GPU; on a CPU they are right with either."""
    zero = {"stage": 3, "memory_efficient_linear": True}
    plugin = SimpleNamespace(zero_stage=3, hf_ds_config=SimpleNamespace(config={"zero_optimization": zero}))
    configure_zero3(SimpleNamespace(deepspeed_plugin=plugin), compile_layers=False)
    assert zero["memory_efficient_linear"]
    configure_zero3(SimpleNamespace(deepspeed_plugin=plugin), compile_layers=True)
    assert zero["memory_efficient_linear"] is False


def test_rows_of_a_batch_are_of_similar_length():
    lengths = torch.randint(1, 200, (803,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = RowsByLength(lengths, global_batch=8, seed=3)
    first = list(rows)
    assert sorted(first) == list(range(803)) and list(rows) == first == list(RowsByLength(lengths, 8, 3))
    batches = [[lengths[row] for row in first[start : start + 8]] for start in range(0, 800, 8)]
    assert sum(8 * max(batch) for batch in batches) < 1.1 * sum(map(sum, batches))
    rows.set_epoch(1)
    assert list(rows) != first


def test_the_benchmark(run_script):
    flags = "--packing false --per_device_train_batch_size 4 --pack_tokens 1024"
    command = f"benchmarks/train_throughput.py --shape tiny --rows 100 --plan -- {flags}"
    result = json.loads(run_script(command).check().out.splitlines()[-1])
    assert result["ours"]["tokens_per_second"] > 0 and result["baseline"]["tokens_per_second"] > 0
    assert 0 < result["ours"]["padding"] < 1 and result["flags"].endswith(flags) and result["speedup"] > 0
    assert result["plan"]["seconds"] > 0


def test_throughput_counts_since_the_first_step(monkeypatch):
    clock = iter((0.0, 5.0, 5.0, 7.0, 9.0, 9.0))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    model = random_model("tiny-glm", "cpu", torch.float32)
    throughput = Throughput.of(model, list(model.model.layers))
    # q, k, v, o, gate_up and down of two layers
    assert throughput.token_flops == 4 * 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128)
    assert throughput.target_flops == 4 * 64 * 1024
    throughput.count(100, 100, 50)
    throughput.end_step()
    assert throughput.first_step_seconds == 5.0 and throughput.seconds_left(3) is None
    throughput.count(30, 40, 20)
    throughput.end_step()
    measured = throughput.measure()
    assert measured["tokens_per_second"] == 15.0 and measured["padding"] == 0.25
    assert throughput.seconds_left(3) == 12
    assert throughput.measure() == {}
