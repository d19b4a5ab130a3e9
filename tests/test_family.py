"""The scripts on ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B in miniature, with 2 processes."""

import json
from pathlib import Path

import pytest
from conftest import GOLDEN, accelerate_variables
from safetensors.torch import load_file

DISTRIBUTIONS = {  # flags, and accelerate's configuration
    "ddp": ("", None),
    "zero3": ("--deepspeed ds_config_zero3.json", None),
    "accelerate zero3 offload": ("", "accelerate_ds_zero3_cpu_offload_config.yaml"),
}
# What half of each model takes in CPU memory: the rest goes to disk.
NAMES = {"chatglm2-6b-tiny": "1MB", "chatglm3-6b-tiny": "1MB", "glm-4-9b-chat-tiny": "1600KB"}
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
    """A tokenised dataset, and the adapter that one process trained on it."""

    def __init__(self, name: str, directory: Path, run_script, run_ranks):
        self.model, self.memory = GOLDEN / name, NAMES[name]
        self.directory = directory
        self.run_script, self.run_ranks = run_script, run_ranks
        run_script(
            f"tokenize_dataset_rows_belle.py --jsonl_path data/sample.train.json --save_path {directory}/tokens "
            f"--model_name_or_path {self.model} --max_seq_length 60"
        ).check()
        (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
        self.adapter = self.train(1, "", None)

    def train(self, processes: int, flags: str, accelerate_config: str | None) -> Path:
        output_dir = self.directory / f"adapter{len(list(self.directory.iterdir()))}"
        result = self.run_ranks(
            processes,
            f"multi_gpu_fintune_belle.py --dataset_path {self.directory}/tokens --lora_rank 4 "
            f"--model_name_or_path {self.model} --learning_rate 2e-3 --max_steps 4 --fp16 --logging_steps 2 "
            f"--per_device_train_batch_size {4 // processes} --output_dir {output_dir} {flags}",
            **(accelerate_variables(accelerate_config) if accelerate_config else {}),
        ).check()
        assert "global batch 4 " in result.out
        return output_dir

    def answers(self, command: str, processes: int = 1) -> list[dict]:
        path = self.directory / "answers.jsonl"
        self.run_ranks(
            processes,
            f"{command} --model_name_or_path {self.model} --input_path {self.directory}/prompts.jsonl "
            f"--output_path {path} --adapter_path {self.adapter} --max_new_tokens 12 --overwrite",
        ).check()
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module", params=NAMES)
def trained(request, tmp_path_factory, run_script, run_ranks) -> Trained:
    return Trained(request.param, tmp_path_factory.mktemp(request.param), run_script, run_ranks)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_two_processes_make_the_same_adapter(trained, distribution):
    expected = load_file(trained.adapter / "adapter_model.safetensors")
    assert len(expected) == 2 * 3 * 3  # A and B of q, k and v in three layers
    assert any(key.endswith("k_proj.lora_B.weight") for key in expected)
    actual = load_file(trained.train(2, *DISTRIBUTIONS[distribution]) / "adapter_model.safetensors")
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert (actual[key] - value).abs().max() <= 1e-4, key


def test_every_placement_gives_the_same_answers(trained):
    dispatched = trained.answers("chatglm_milti_gpu_inference.py")
    assert [row["index"] for row in dispatched] == [0, 1, 2]
    assert all(row["answer_tokens"] for row in dispatched)
    limits = f"--max_memory cpu={trained.memory} --offload_folder {trained.directory}/offload"
    offloaded = trained.answers(f"chatglm_milti_gpu_inference.py {limits}")
    assert list((trained.directory / "offload").glob("*.dat"))
    assert offloaded == dispatched
    assert trained.answers("chatglm_deepspeed_inference.py --tp_size 2", processes=2) == dispatched
