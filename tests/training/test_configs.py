"""Every file of configs/ is opened and trains a few steps on two processes; all give the adapter that DDP gives."""

import json
import re
import shlex

import pytest
import yaml
from conftest import ROOT, TINY, accelerate_variables
from safetensors.torch import load_file

from utils.distributed.process_group import free_port
from utils.training.deepspeed_config import read_deepspeed_config

CONFIGS = ROOT / "configs"
ONE_MACHINE = {
    "accelerate_ddp.yaml": "DDP",
    "accelerate_fsdp2.yaml": "FSDP2",
    "deepspeed_zero2.json": "DeepSpeed ZeRO-2",
    "deepspeed_zero3_cpu_offload.json": "DeepSpeed ZeRO-3",
}
# {n}: the number of a machine; {port}: a free port.
ACCELERATE = "accelerate launch --main_process_port {port} --config_file configs/"
ON_LOOPBACK = "--num_processes 2 --machine_rank {n} --main_process_ip 127.0.0.1"
TWO_MACHINES = {
    "accelerate_ddp_2_machines.yaml": (f"{ACCELERATE}accelerate_ddp_2_machines.yaml {ON_LOOPBACK}", "DDP"),
    "accelerate_fsdp2_2_machines.yaml": (f"{ACCELERATE}accelerate_fsdp2_2_machines.yaml {ON_LOOPBACK}", "FSDP2"),
    "hostfile": (
        "deepspeed --hostfile {work}/hostfile --no_ssh --node_rank {n} --master_addr 127.0.0.1 --master_port {port}",
        "DeepSpeed ZeRO-2",
    ),
}
OPENED_ALONE = {"deepspeed_zero3.json"}  # ds_config_zero3.json, which test_training runs


@pytest.fixture(scope="module")
def script(tokens):
    return (
        f"multi_gpu_fintune_belle.py --dataset_path {tokens} --model_name_or_path {TINY} --lora_rank 4 --fp16 "
        "--max_steps 2 --save_steps 1 --save_total_limit 1 --logging_steps 1 --learning_rate 2e-3 "
        "--per_device_train_batch_size 2"
    )


@pytest.fixture(scope="module")
def launch(run_ranks, script):
    def run(name, output_dir, flags=""):
        by_accelerate = name.startswith("accelerate")
        command = f"{script} --output_dir {output_dir} {flags} " + f"--deepspeed configs/{name}" * (not by_accelerate)
        result = run_ranks(2, command, **(accelerate_variables(f"configs/{name}") if by_accelerate else {})).check()
        assert f"processes 2 ({ONE_MACHINE[name]}, " in result.words
        return load_file(output_dir / "adapter_model.safetensors"), result.words

    return run


@pytest.fixture(scope="module")
def expected(launch, tmp_path_factory):
    return launch("accelerate_ddp.yaml", tmp_path_factory.mktemp("ddp"))[0]


def check_same(state, expected):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert (state[name] - value).abs().max() <= 3e-5, name  # DeepSpeed sums in another order


def test_every_file_is_known():
    assert {path.name for path in CONFIGS.iterdir()} == ONE_MACHINE.keys() | TWO_MACHINES.keys() | OPENED_ALONE
    assert len(list(CONFIGS.iterdir())) == 8


def test_deepspeed_files_leave_what_flags_decide_to_the_flags():
    stages = {}
    for path in CONFIGS.glob("deepspeed_*.json"):
        config = read_deepspeed_config(str(path))
        batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        assert all(config[key] == "auto" for key in (*batch, "gradient_clipping"))
        assert config["fp16"]["enabled"] == config["bf16"]["enabled"] == "auto"
        stages[path.name] = config["zero_optimization"]["stage"]
    assert stages == {"deepspeed_zero2.json": 2, "deepspeed_zero3.json": 3, "deepspeed_zero3_cpu_offload.json": 3}
    assert (CONFIGS / "deepspeed_zero3.json").read_text() == (ROOT / "ds_config_zero3.json").read_text()


def test_accelerate_files_differ_in_what_their_names_say():
    for path in CONFIGS.glob("accelerate_*.yaml"):
        config = yaml.safe_load(path.read_text())
        assert config["distributed_type"] == ("FSDP" if "fsdp2" in path.name else "MULTI_GPU")
        assert config.get("fsdp_config", {}).get("fsdp_version") == (2 if "fsdp2" in path.name else None)
        assert config["num_machines"] == (2 if "2_machines" in path.name else 1)


@pytest.mark.parametrize("name", [name for name in ONE_MACHINE if name != "accelerate_ddp.yaml"])
def test_two_processes(launch, expected, tmp_path, name):
    check_same(launch(name, tmp_path)[0], expected)
    if name == "accelerate_fsdp2.yaml":  # it resumes from its checkpoint, which is sharded
        (tmp_path / "adapter_model.safetensors").unlink()
        _, output = launch(name, tmp_path, "--max_steps 3 --resume_from_checkpoint latest")
        assert f"resuming from {tmp_path}/checkpoint-2" in output and '"steps": 3' in output


@pytest.mark.parametrize("name", TWO_MACHINES)
def test_two_machines_on_loopback(run_command, script, expected, tmp_path, name):
    """Both machines' commands on this host, each with one process."""
    hosts = (CONFIGS / "hostfile").read_text()
    hosts = re.sub(r"slots=\d+", "slots=1", hosts.replace("10.0.0.", "127.0.0."))
    (tmp_path / "hostfile").write_text(hosts)
    launcher, kind = TWO_MACHINES[name]
    port = free_port()
    flags = "--deepspeed configs/deepspeed_zero2.json" if name == "hostfile" else ""
    commands = [
        f"{launcher.format(n=n, port=port, work=tmp_path)} {script} --output_dir {tmp_path}/out {flags}"
        for n in (0, 1)
    ]
    both = f"{commands[1]} > {tmp_path}/second.log 2>&1 & {commands[0]}; code=$?; wait; exit $code"
    result = run_command(shlex.join(["bash", "-c", both])).check()
    assert f"processes 2 ({kind}, " in result.words
    check_same(load_file(tmp_path / "out" / "adapter_model.safetensors"), expected)
    assert json.loads((tmp_path / "out" / "checkpoint-2" / "complete.json").read_text())
