"""
README's commands on tiny ChatGLM2-6B, ChatGLM3-6B, GLM-4-9B and GLM-4-0414, end to end.

Each launcher starts one training or inference itself; other commands of the same launcher run in forked processes.
"""

import json
from pathlib import Path

import pytest
from conftest import GOLDEN
from documents import on_a_free_port, readme_commands
from safetensors.torch import load_file

# Model -> CPU memory for half of it; the rest goes to disk.
NAMES = {
    "chatglm2-6b-tiny": "1MB",
    "chatglm3-6b-tiny": "1MB",
    "glm-4-9b-chat-tiny": "1600KB",
    "glm4-9b-0414-tiny": "1MB",
}
TRAINING = [command for command in readme_commands() if "multi_gpu_fintune_belle.py" in command]
TORCHRUN = "torchrun --nproc_per_node=2 "
DDP = next(command for command in TRAINING if command.startswith(TORCHRUN) and "--deepspeed" not in command)
LAUNCHED = "chatglm2-6b-tiny"  # the one model whose ZeRO-3 torchrun itself starts
REPLICAS = "deepspeed --num_gpus 2 chatglm_milti_gpu_inference.py"  # by the launcher that the shards have
INFERENCE = [command for command in readme_commands() if "_inference.py" in command and "--merge" not in command]
PROMPTS = [
    {"prompt": "今天天气怎么样？"},
    {"instruction": "翻译：", "input": "hello"},
    {
        "messages": [
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": "你好，我是人工智能助手。"},
            {"role": "user", "content": "那上海呢？"},
        ]
    },
]


class Trained:
    """A tokenised dataset and the adapter that one process trained on it."""

    def __init__(self, name: str, directory: Path, run_script, run_ranks, run_command):
        self.model, self.memory = GOLDEN / name, NAMES[name]
        self.directory, self.run_ranks, self.run_command = directory, run_ranks, run_command
        run_script(
            f"tokenize_dataset_rows_belle.py --jsonl_path data/sample.train.json --save_path {directory}/tokens "
            f"--model_name_or_path {self.model} --max_seq_length 60"
        ).check()
        (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
        self.adapter = directory / "adapter"
        result = run_ranks(1, f"multi_gpu_fintune_belle.py --per_device_train_batch_size 4 {self.flags(self.adapter)}")
        assert "global batch 4 " in result.check().words

    def flags(self, output_dir: Path) -> str:
        """The flags of every training; they follow those of the README's command, so they win."""
        return (
            f"--model_name_or_path {self.model} --dataset_path {self.directory}/tokens --lora_rank 4 --fp16 "
            f"--learning_rate 2e-3 --max_steps 4 --logging_steps 2 --output_dir {output_dir}"
        )

    def train(self, command: str) -> Path:
        """Runs a training command, with its launcher except for torchrun's after the first: it starts all alike."""
        output_dir = self.directory / f"adapter{len(list(self.directory.iterdir()))}"
        if command == DDP or (command.startswith(TORCHRUN) and self.model.name != LAUNCHED):
            result = self.run_ranks(2, f"{command.removeprefix(TORCHRUN)} {self.flags(output_dir)}").check()
        else:
            result = self.run_command(f"{on_a_free_port(command)} {self.flags(output_dir)}").check()
        assert "global batch 4 " in result.words
        return output_dir

    def answers(self, command: str) -> list[dict]:
        path = self.directory / "answers.jsonl"
        path.unlink(missing_ok=True)
        command += (
            f" --model_name_or_path {self.model} --adapter_path {self.adapter} "
            f"--input_path {self.directory}/prompts.jsonl --output_path {path} --max_new_tokens 12"
        )
        if command.startswith("python "):
            self.run_ranks(1, command.removeprefix("python ")).check()
        elif command.startswith(REPLICAS):
            self.run_ranks(2, command.removeprefix("deepspeed --num_gpus 2 ")).check()
        else:
            self.run_command(on_a_free_port(command)).check()
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module", params=NAMES)
def trained(request, tmp_path_factory, run_script, run_ranks, run_command) -> Trained:
    return Trained(request.param, tmp_path_factory.mktemp(request.param), run_script, run_ranks, run_command)


@pytest.mark.parametrize("command", TRAINING, ids=["zero3", "accelerate zero3 offload", "ddp"])
def test_every_launcher_makes_the_same_adapter(trained, command):
    expected = load_file(trained.adapter / "adapter_model.safetensors")
    assert len(expected) == 2 * 3 * 3  # A and B of q, k and v in three layers
    assert any(key.endswith("k_proj.lora_B.weight") for key in expected)
    actual = load_file(trained.train(command) / "adapter_model.safetensors")
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert (actual[key] - value).abs().max() <= 1e-4, key


def test_every_placement_gives_the_same_answers(trained):
    limits = f"--max_memory cpu={trained.memory} --offload_folder {trained.directory}/offload"
    offloaded = trained.answers(f"python chatglm_milti_gpu_inference.py {limits}")
    assert list((trained.directory / "offload").glob("*.dat"))
    assert [row["index"] for row in offloaded] == [0, 1, 2]
    assert all(row["answer_tokens"] for row in offloaded)
    assert len(INFERENCE) == 3 and sum(command.startswith(REPLICAS) for command in INFERENCE) == 1
    for command in INFERENCE:
        command += " --tp_size 2" if "chatglm_deepspeed_inference.py" in command else ""
        assert trained.answers(command) == offloaded, command
