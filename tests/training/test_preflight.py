"""Wrong use of the training script: every fault at once, one line each with its fix, exit code 2, no traceback."""

import json
import os
import re
import socket

from utils.common.script import take_traceback_flag

import datasets
import pytest
import torch
from conftest import GOLDEN, ROOT, TINY

from utils.common.errors import UsageError
from utils.layers.fp8 import check_device
from utils.training.deepspeed_config import read_deepspeed_config


@pytest.fixture
def faults(run_script, tokens, tmp_path):
    """faults("--flags") -> the error lines of the script."""

    def run(flags):
        result = run_script(
            f"multi_gpu_fintune_belle.py --dataset_path {tokens} --model_name_or_path {TINY} "
            f"--output_dir {tmp_path}/out {flags}"
        )
        assert result.code == 2 and "Traceback" not in result.err, result.err
        start = "multi_gpu_fintune_belle.py: error: "
        lines = [line for line in result.err.splitlines() if line.startswith(start)]
        assert not (tmp_path / "out").exists()
        return [line.removeprefix(start) for line in lines]

    return run


DEEPSPEED = """{
  "train_batch_sise": "auto",
  "fp16": {"enabled": "auto", "min_loss_skale": 1},
  "zero_optimization": {"stage": "three",
    "overlapcomm": true, "reduce_bucket_size": "auto"}
}"""


def test_all_faults_at_once(faults, tmp_path):
    (tmp_path / "ds.json").write_text(DEEPSPEED)
    lines = faults(
        f"--dataset_path nowhere --lora_rnak 0 --warmup_ratio 0.1 --save_steps 1, "
        f"--lora_dropout 1 --learning_rate -1 --fp16 --bf16 --report_to wandb "
        f"--lora_target_modules q_proj dense --eval_strategy steps --eval_steps 1 --label_smoothing_factor 0.1 "
        f"--num_train_epochs 0 --deepspeed {tmp_path}/ds.json --output_dir {GOLDEN}/chatglm-6b-tiny"
    )
    expected = [
        "--lora_rnak is unknown: did you mean --lora_rank?",
        "--warmup_ratio is unknown: give --warmup_steps 0.1",
        "--save_steps 1, is not a number: did you mean 1?",
        "--lora_rank 0 must be at least 1",
        "--label_smoothing_factor 0.1 cannot be used here",
        "--learning_rate -1.0 trains nothing",
        "--lora_dropout 1.0 must be",
        "--num_train_epochs 0.0 trains nothing",
        "--fp16 and --bf16 exclude each other",
        "--eval_strategy steps needs rows to evaluate on",
        "--report_to wandb: not installed; pip install wandb",
        f"--deepspeed {tmp_path}/ds.json line 2 column 3: train_batch_sise is not read; is it train_batch_size?",
        f"--deepspeed {tmp_path}/ds.json line 3 column 31: min_loss_skale in fp16: no such key; is it min_loss_scale?",
        f"--deepspeed {tmp_path}/ds.json line 4 column 25: stage in zero_optimization: Input should be 0, 1, 2",
        f"--deepspeed {tmp_path}/ds.json line 5 column 5: overlapcomm in zero_optimization: no such key",
        "--dataset_path nowhere does not exist; make it with",
        "--lora_target_modules q_proj: the model's linear layers are dense dense_4h_to_h",
        f"--output_dir {GOLDEN}/chatglm-6b-tiny holds a model",
    ]
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    "text, words",
    [
        ("[" * 100_000, "is nested too deeply"),
        ('{\n  "zero_optimization": {"stage": 3,,}\n}', "is not JSON: .* line 2 column 36"),
        ("[]", "holds list, not a JSON object"),
        ('{"zero_optimization": 3}', "line 1 column 2: zero_optimization must be an object"),
    ],
)
def test_a_spoiled_deepspeed_file(faults, tmp_path, text, words):
    (tmp_path / "ds.json").write_text(text)
    (line,) = faults(f"--deepspeed {tmp_path}/ds.json")
    assert re.search(words, line), line


IMPORTS = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": ["planted.X"]}


@pytest.mark.parametrize(
    "config, words",
    [
        ({"torch_autocast": IMPORTS}, "torch_autocast cannot be used here: give --bf16 or --fp16"),
        ({"wandb": {"enabled": True}}, "wandb cannot be used here: give --report_to"),
        ({"csv_monitor": {"enabled": True, "output_path": "/tmp"}}, "csv_monitor cannot be used here"),
        ({"autotuning": {"enabled": True}}, "autotuning cannot be used here: see --plan"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency cannot be used here: leave it out"),
        ({"checkpoint": {"writer": {"type": "x"}}}, "checkpoint cannot be used here"),
        ({"compile": {"deepcompile": True}}, "compile cannot be used here"),
        ({"unheard_of": 1}, "unheard_of cannot be used here"),
        ({"flops_profiler": {"enabled": True, "output_file": "/tmp/x"}}, "output_file in flops_profiler"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param to nvme"),
        ({"optimizer": {"type": "OneBitAdam"}}, "optimizer OneBitAdam cannot be used here: give adagrad, adam"),
        ({"scheduler": {"type": "os.system"}}, "scheduler os.system cannot be used here: give LRRangeTest"),
        ({"fp16": {"enabled": "perhaps"}}, "enabled in fp16: .*valid boolean"),
        ({"fp16": {"loss_scale": -1}}, "loss_scale in fp16: "),
        ({"bf16": {"unheard_of": 1}}, "unheard_of in bf16: no such key"),
        ({"fp16": {"self": 1}}, "multiple values for argument 'self'"),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "cpu"}}},
            "Cannot provide deprecated parameter 'cpu_offload'",
        ),
        ({"gradient_cliping": 1.0}, "gradient_cliping is not read; is it gradient_clipping"),
        ({"communication_data_type": "fp13"}, "fp13"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "cannot be simultaneously enabled"),
        ({"activation_checkpointing": 7}, "activation_checkpointing must be an object"),
    ],
)
def test_what_a_deepspeed_file_may_not_do(tmp_path, monkeypatch, config, words):
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass X: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ds.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=words) as error:
        read_deepspeed_config(str(tmp_path / "ds.json"))
    assert len(error.value.args) == 1 and not (tmp_path / "ran").exists()


def test_deepspeed_files_that_are_served(tmp_path):
    switched_off = {name: {"enabled": False} for name in ("wandb", "tensorboard", "flops_profiler", "fp16")}
    optimizer = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}}
    config = {**switched_off, "optimizer": optimizer, "scheduler": scheduler, "_comment": "ours"}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    assert read_deepspeed_config(str(tmp_path / "ds.json")) == config
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="is not a file"):
        read_deepspeed_config(str(tmp_path / "fifo"))
    for path in (*(ROOT / "configs").glob("*.json"), ROOT / "ds_config_zero3.json"):
        assert read_deepspeed_config(str(path))["zero_optimization"]["stage"] in (2, 3)


def test_fp8_where_it_cannot_be(faults, monkeypatch):
    def check(flags, *starts):
        lines = faults(f"--quantize fp8 {flags}")
        assert len(lines) == len(starts) and all(map(str.startswith, lines, starts)), lines

    partitioned = "a quantised base cannot be partitioned by ZeRO-3"
    in_float32 = "--quantize fp8 computes in bfloat16: give --bf16 too"
    no_gpu = "--quantize fp8 needs a Hopper GPU or newer (found no GPU)"
    check("--deepspeed ds_config_zero3.json", partitioned, no_gpu, in_float32)
    monkeypatch.setattr("utils.training.preflight.check_device", lambda: None)
    check("--bf16 --deepspeed ds_config_zero3.json", partitioned)
    check("", in_float32)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    integers = f"{GOLDEN}/chatglm-6b-int4-tiny"
    quantised = f"--quantize fp8: {integers} is quantised to integers already"
    check(f"--model_name_or_path {integers}", "--dataset_path", quantised)  # nor is its tokenizer the dataset's


def test_fp8_on_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    with pytest.raises(UsageError, match="found NVIDIA A100"):
        check_device()
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    check_device()


def test_deepspeed_twice_and_over_a_quantised_base(faults, monkeypatch):
    quantised = "--quantize int8 --deepspeed ds_config_zero3.json"
    assert ["a quantised base cannot be partitioned by ZeRO-3" in line for line in faults(quantised)] == [True]
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    (line,) = faults("--deepspeed ds_config_zero3.json")
    assert "drop one of the two" in line
    (line,) = faults("--quantize int8")
    assert "partitioned by ZeRO-3" in line


def test_datasets_that_cannot_be_trained_on(faults, tmp_path):
    other = f"--model_name_or_path {GOLDEN}/chatglm3-6b-tiny"
    (line,) = faults(other)
    assert "was made with another tokenizer" in line and "tokenise the rows again" in line
    features = datasets.Features(
        {name: datasets.Sequence(datasets.Value("int32")) for name in ("input_ids", "labels")}
    )
    datasets.Dataset.from_dict({"input_ids": [], "labels": []}, features=features).save_to_disk(
        str(tmp_path / "empty")
    )
    (line,) = faults(f"--dataset_path {tmp_path}/empty")
    assert "has no rows" in line
    wrong = {"input_ids": [[5, 6], [5, 6]], "labels": [[-100, 6], [-100, -6]]}
    datasets.Dataset.from_dict(wrong, features=features).save_to_disk(str(tmp_path / "wrong"))
    for flags in ("--dataset_path", "--packing --plan --dataset_path", "--eval_dataset_path"):
        (line,) = faults(f"{flags} {tmp_path}/wrong")
        assert line.startswith(f"{flags.split()[-1]} {tmp_path}/wrong: row 1: labels holds -6")


def test_more_processes_than_cards_and_a_port_in_use(faults, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        for name, value in (("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2), ("MASTER_PORT", other.getsockname()[1])):
            monkeypatch.setenv(name, str(value))
        cards, port = faults("")
    assert cards.startswith("2 processes and 1 GPUs: start 1 at most")
    assert re.match(r"port \d+ is in use", port) and "--master_port" in port


def test_a_directory_of_something_else(run_script, tokens, faults, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in faults(f"--output_dir {tmp_path}/file")[0]
    assert "holds a tokenised dataset" in faults(f"--output_dir {tokens}")[0]
    train = f"multi_gpu_fintune_belle.py --dataset_path {tokens} --model_name_or_path {TINY} --output_dir {tmp_path}/a"
    surprising = "--logging_steps 9 --num_train_epochs 2 --per_device_train_batch_size 301 --warmup_steps 4"
    notes = run_script(f"{train} --max_steps 2 --save_strategy no {surprising}").check().out
    for note in (
        "note: --logging_steps 9 of 2 steps: only the first and the last step are logged",
        "note: --warmup_steps 4 of 2 steps: --learning_rate is never reached",
        "note: --per_device_train_batch_size 301: a step has only the 300 rows that there are",
        "note: --num_train_epochs 2 is not used: --max_steps 2 decides",
    ):
        assert f"{note}\n" in notes
    assert notes.count("note: ") == 4
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    (line,) = faults(f"--output_dir {tmp_path}/a --lora_rank 2 --lora_target_modules dense")
    assert "lora_rank 8 (now 2), lora_target_modules ['query_key_value'] (now ['dense'])" in line
    origin = tmp_path / "a" / "adapter_origin.json"
    other = dict.fromkeys(("bits", "norms", "matrices"))
    origin.write_text(json.dumps(json.loads(origin.read_text()) | {"base": other}))
    assert "(other weights)" in faults(f"--output_dir {tmp_path}/a")[0]
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("flag", ("--traceback", "--debug"))
def test_the_traceback_is_shown_on_demand(run_script, flag):
    with pytest.raises(Exception, match="nowhere"):
        run_script(f"multi_gpu_fintune_belle.py --dataset_path nowhere {flag}")


def test_debug_with_a_value_is_a_flag_of_training():
    argv = ["x", "--debug", "underflow_overflow", "--debug", "--max_steps", "3"]
    assert take_traceback_flag(argv) and argv == ["x", "--debug", "underflow_overflow", "--max_steps", "3"]
    assert not take_traceback_flag(argv)


WRONG_VALUES = {
    "--seed -1": "must be at least 0",
    "--data_seed 4294967296": "must be at most 4294967295",
    "--learning_rate 2e5": "--learning_rate 200000 trains nothing useful",
    "--adam_beta1 1.5": "must be at most 0.999",
    "--adam_beta2 -0.1": "must be at least 0",
    "--adam_epsilon nan": "must be at least 0",
    "--weight_decay -1": "must be at least 0",
    "--max_grad_norm inf": "must be at most",
    "--warmup_steps -2": "must be at least 0",
    "--num_train_epochs nan": "trains nothing",
    "--logging_steps 0": "must be at least",
    "--save_steps nan": "must be at least 0",
    "--eval_steps -1": "must be at least 0",
    "--save_total_limit -1": "must be at least 0",
    "--per_device_eval_batch_size 0": "must be at least 1",
    "--gradient_accumulation_steps 0": "must be at least 1",
    "--neftune_noise_alpha -5": "must be at least 0",
    "--dataloader_num_workers -1": "must be at least 0",
    "--ddp_timeout 0": "must be at least 1",
    "--torch_compile True": "give --compile_layers true",
    "--torch_compile_backend eager": "give --compile_layers true",
    "--torch_compile_mode default": "give --compile_layers true",
    "--use_liger_kernel True": "give --packing, which has kernels of its own",
    "--push_to_hub True": "cannot be used here: nothing leaves this machine",
    "--greater_is_better True": "cannot be used here: a lower loss is better",
    "--fsdp_config x.json": "cannot be used here",
    "--optim galore_adamw": "cannot be used here: it trains whole weights",
    "--report_to nonsense": "is unknown: give none, or some of",
    "--save_strategy best": "needs rows to evaluate on",
}


def test_values_that_cannot_work_all_at_once(faults):
    lines = faults(" ".join(WRONG_VALUES))
    assert len(lines) == len(WRONG_VALUES), lines
    for flags, words in WRONG_VALUES.items():
        name = flags.split()[0]
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert words in line


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--max_steps 0", "--max_steps 0 trains nothing"),
        ("--learning_rate nan", "--learning_rate nan trains nothing"),
        ("--eval_on_start True", "--eval_on_start needs rows to evaluate on"),
        ("--lr_scheduler_type cosine_with_min_lr", "--lr_scheduler_type cosine_with_min_lr: .*min_lr"),
        ("--lr_scheduler_type warmup_stable_decay", "--lr_scheduler_type warmup_stable_decay: "),
        ("""--lr_scheduler_type cosine_with_restarts --lr_scheduler_kwargs '{"cycles": 2}'""", "argument 'cycles'"),
        ("""--lr_scheduler_type cosine --lr_scheduler_kwargs '{"num_cycles": NaN}'""", "multiplied by 0 to 0"),
        ("""--lr_scheduler_type polynomial --lr_scheduler_kwargs '{"lr_end": 9}'""", "lr_end"),
        ("--lr_scheduler_kwargs '{1}'", "the training flags: "),
        ("--lr_scheduler_type reduce_lr_on_plateau", "reduce_lr_on_plateau requires an eval strategy"),
        ("--optim adamw_bnb_8bit", "bitsandbytes"),
        ("--optim adamw_torch_8bit", "--optim adamw_torch_8bit: .*torchao"),
        ("--optim schedule_free_adamw", "schedulefree"),
        ("--optim sgd --optim_args nonsense", "--optim sgd --optim_args nonsense: "),
        ("--optim sgd --optim_args momentum=x", "could not convert string to float"),
        ("--dataloader_drop_last True --per_device_train_batch_size 301", "leaves no batch of 300 rows"),
        (
            "--dataloader_drop_last True --packing --pack_tokens 9000 --per_device_train_batch_size 99",
            "leaves no batch",
        ),
        ("--dataloader_persistent_workers True", "needs --dataloader_num_workers 1 or more"),
        ("--dataloader_prefetch_factor 2", "dataloader_prefetch_factor can only be set"),
        ("--accelerator_config nowhere.json", "the training flags: .*nowhere.json"),
        ("""--accelerator_config '{"batches": 1}'""", "the training flags: .*batches"),
        ("""--gradient_checkpointing_kwargs '{"reentrant": true}'""", "--gradient_checkpointing_kwargs reentrant"),
        ("--tf32 True", "the training flags: --tf32 requires Ampere"),
    ],
)
def test_values_that_libraries_do_not_take(faults, flags, words):
    (line,) = faults(flags)
    assert re.search(words, line), line
