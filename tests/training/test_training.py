"""multi_gpu_fintune_belle.py under every launcher, with real processes; and the checks before an adapter is saved."""

import json
import shutil

import pytest
import torch
import yaml
from conftest import ROOT, TINY, accelerate_variables
from peft import PeftModel
from safetensors.torch import load_file, save_file

from utils.checkpoint.model import load_model
from utils.data.collators import PaddingCollator
from utils.lora.adapter import LoraSettings, attach_adapter, load_adapter, merge_adapter, save_adapter

OFFLOAD = "accelerate_ds_zero3_cpu_offload_config.yaml"
ZERO3 = "--deepspeed ds_config_zero3.json"
# processes, rows a device, accumulation steps, flags, accelerate's configuration; the global batch is always 4 rows
DISTRIBUTIONS = {
    "one process": (1, 4, 1, "", None),
    "one process accumulating": (1, 1, 4, "", None),
    "ddp accumulating and checkpointing": (2, 1, 2, "--gradient_checkpointing", None),
    "zero3": (2, 1, 2, ZERO3, None),
    "zero3 one process": (1, 2, 2, ZERO3, None),
    "accelerate zero3 offload": (2, 2, 1, "", OFFLOAD),
}


@pytest.fixture(scope="module")
def train(run_ranks, tokens):
    def run(processes, flags, accelerate_config):
        return run_ranks(
            processes,
            f"multi_gpu_fintune_belle.py --dataset_path {tokens} --model_name_or_path {TINY} {flags}",
            **(accelerate_variables(accelerate_config) if accelerate_config else {}),
        )

    return run


@pytest.fixture(scope="module")
def reference(train, tmp_path_factory):
    return run_distribution(train, "one process", tmp_path_factory.mktemp("reference"))


def run_distribution(train, name, output_dir):
    processes, rows, accumulation, extra, accelerate_config = DISTRIBUTIONS[name]
    result = train(
        processes,
        f"--lora_rank 4 --lora_target_modules query_key_value dense_h_to_4h --learning_rate 2e-3 --max_steps 6 "
        f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {accumulation} --fp16 "
        f"--save_steps 4 --save_total_limit 2 --logging_steps 4 --output_dir {output_dir} {extra}",
        accelerate_config,
    ).check()
    summary = json.loads(next(line for line in reversed(result.out.splitlines()) if line.startswith('{"output_dir"')))
    assert summary["steps"] == 6
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [
        1,
        4,
        6,
    ]  # the first and the last, whatever the flag says
    assert {key: rows[-1][key] for key in ("train_loss", "total_flos")}.items() <= summary.items()
    (output_dir / "summary.json").write_text(json.dumps(summary))
    # Printed once, by the main process alone, or the processes did not join.
    assert result.words.count("needs a GPU and there is none") == (0 if torch.cuda.is_available() else 1)
    assert "global batch 4 " in result.words
    return output_dir


@pytest.mark.parametrize("name", [name for name in DISTRIBUTIONS if name != "one process"])
def test_every_distribution_makes_the_same_adapter(train, reference, tmp_path, name):
    output_dir = run_distribution(train, name, tmp_path)
    expected = load_file(reference / "adapter_model.safetensors")
    actual = load_file(output_dir / "adapter_model.safetensors")
    assert actual.keys() == expected.keys() and len(actual) == 2 * 2 * 4  # A and B of two targets in four layers
    for key, value in expected.items():
        assert value.dtype == actual[key].dtype == torch.float32
        assert (actual[key] - value).abs().max() <= 1e-4, key
    summaries = [json.loads((path / "summary.json").read_text()) for path in (reference, output_dir)]
    assert abs(summaries[0]["train_loss"] - summaries[1]["train_loss"]) <= 1e-4
    assert summaries[0]["total_flos"] == summaries[1]["total_flos"] > 0
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert (output_dir / "checkpoint-4" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("config", ["ds_config_zero3.json", "configs/deepspeed_zero2.json"])
def test_float16_losses_are_scaled(run_ranks, tokens, tmp_path, config):
    """On a base whose unscaled gradients are 0 in float16; a resumed run scales as before."""
    weights = load_file(TINY / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"] * 1e-2
    weights["transformer.final_layernorm.weight"] *= 1e-3
    shutil.copytree(TINY, tmp_path / "base")
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    settings = json.loads((TINY / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings))

    def train(name, more=""):
        result = run_ranks(
            2,
            f"tests/helpers/float16_on_cpu.py multi_gpu_fintune_belle.py --dataset_path {tokens} --max_steps 2 "
            f"--model_name_or_path {tmp_path}/base --output_dir {tmp_path}/{name} --deepspeed {config} --lora_rank 2 "
            f"--save_steps 1 --logging_steps 1 {more}",
        )
        return result.check().words, load_file(tmp_path / name / "adapter_model.safetensors")

    _, whole = train("whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    output, resumed = train("resumed", "--resume_from_checkpoint latest")
    assert f"resuming from {tmp_path}/resumed/checkpoint-1" in output
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_adapter_is_a_normal_peft_directory(reference):
    config = json.loads((reference / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 32)
    assert set(config["target_modules"]) == {"query_key_value", "dense_h_to_4h"}
    assert config["base_model_name_or_path"] == str(TINY)
    key = "base_model.model.transformer.layers.0.attention.query_key_value.lora_B.weight"
    state = load_file(reference / "adapter_model.safetensors")
    assert state[key].shape == (3 * 256, 4) and state[key].abs().max() > 0
    input_ids = torch.tensor([[50, 60, 70, 5, 8]])
    ours = load_adapter(load_model(str(TINY)), reference)(input_ids=input_ids).logits
    theirs = PeftModel.from_pretrained(load_model(str(TINY)), reference)(input_ids=input_ids).logits
    merged = merge_adapter(load_model(str(TINY)), reference)(input_ids=input_ids).logits
    assert torch.equal(ours, theirs)
    assert torch.allclose(ours, merged, atol=1e-4)
    assert not torch.allclose(ours, load_model(str(TINY))(input_ids=input_ids).logits, atol=1e-2)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--dataset_path nowhere", "nowhere"),
        ("--dataset_path data", "tokenize_dataset_rows_belle.py"),
        ("--fp16 --bf16", "--fp16"),
        ("--lora_rank 0", "--lora_rank"),
        ("--lora_target_modules q_proj", "query_key_value"),
        ("--deepspeed nowhere.json", "nowhere.json"),
        ("--deepspeed README.md", "not JSON"),
        ("--model_name_or_path /nowhere", "--model_name_or_path"),
        ("--lr_scheduler_type sideways", "sideways"),
    ],
)
def test_wrong_use_is_one_line(run_script, tokens, tmp_path, flags, words):
    result = run_script(
        f"multi_gpu_fintune_belle.py --dataset_path {tokens} --model_name_or_path {TINY} "
        f"--output_dir {tmp_path} {flags}"
    )
    assert result.code == 2, result.err
    assert words in result.err.strip().splitlines()[-1]
    assert "Traceback" not in result.err


def make_adapter(target_modules=("query_key_value",)):
    return attach_adapter(load_model(str(TINY)), LoraSettings(4, 32, 0.0, list(target_modules)), seed=0)


def test_adapter_start_depends_on_the_seed_alone():
    torch.manual_seed(5)
    first = make_adapter().state_dict()
    torch.manual_seed(6)
    second = make_adapter().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda weight: torch.nn.Parameter(torch.empty(0)), r"is \(0,\)"),
        (lambda weight: torch.nn.Parameter(weight.detach() * float("nan")), "finite"),
    ],
)
def test_a_spoiled_adapter_is_not_saved(tmp_path, spoil, words):
    model = make_adapter()
    layer = model.base_model.model.transformer.layers[1].attention.query_key_value.lora_A["default"]
    layer.weight = spoil(layer.weight)
    with pytest.raises(RuntimeError, match=words):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adapter_with_a_missing_weight_is_not_saved(tmp_path):
    model = make_adapter()
    layer = model.base_model.model.transformer.layers[1].attention.query_key_value.lora_A["default"]
    layer.weight.requires_grad = False
    with pytest.raises(RuntimeError, match="1 weights are missing"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_collator_pads_on_the_right():
    rows = [{"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}, {"input_ids": [7, 8], "labels": [-100, 8]}]
    batch = PaddingCollator(pad_token_id=3)(rows)
    assert batch["input_ids"].tolist() == [[7, 8, 9], [7, 8, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 8, 9], [-100, 8, -100]]
    assert (batch["target_positions"].tolist(), batch["target_ids"].tolist()) == ([0, 1, 3], [8, 9, 8])
    assert batch.pop("real_tokens") == 5
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_shipped_configurations_are_zero3():
    config = json.loads((ROOT / "ds_config_zero3.json").read_text())
    assert config["zero_optimization"]["stage"] == 3
    assert config["train_batch_size"] == config["fp16"]["enabled"] == "auto"
    config = yaml.safe_load((ROOT / "accelerate_ds_zero3_cpu_offload_config.yaml").read_text())
    assert config["distributed_type"] == "DEEPSPEED"
    deepspeed = config["deepspeed_config"]
    assert deepspeed["zero_stage"] == 3
    assert deepspeed["offload_optimizer_device"] == deepspeed["offload_param_device"] == "cpu"
