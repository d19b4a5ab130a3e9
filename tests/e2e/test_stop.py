"""A tiny model of each generation, overfitted on ten rows, gives their answers and ends them by itself."""

import json

import pytest
from conftest import GOLDEN

from utils.checkpoint.model import Checkpoint
from utils.checkpoint.tokenizer import load_tokenizer
from utils.models.templates import template_for

ROWS = {
    "你好": "你好!",
    "今天天气怎么样?": "晴",
    "苹果是什么?": "水果",
    "hello": "hi",
    "一加一": "二",
    "老师在哪里?": "图书馆",
    "再见": "再见!",
    "猫": "动物",
    "北京": "中国的首都",
    "写诗": "春天来了",
}


@pytest.mark.parametrize("name", ("chatglm-6b-tiny", "chatglm2-6b-tiny", "chatglm3-6b-tiny", "glm-4-9b-chat-tiny"))
def test_answers_end_by_themselves(run_script, tmp_path, name):
    model = f"--model_name_or_path {GOLDEN / name}"
    lines = [json.dumps({"input": prompt, "target": target}) + "\n" for prompt, target in ROWS.items()]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    run_script(
        f"tokenize_dataset_rows_belle.py --jsonl_path {tmp_path}/rows.jsonl --save_path {tmp_path}/tokens {model}"
    ).check()
    layers = " ".join(Checkpoint.open(str(GOLDEN / name)).generation.linear_layers)
    run_script(
        f"multi_gpu_fintune_belle.py {model} --dataset_path {tmp_path}/tokens --output_dir {tmp_path}/adapter "
        f"--lora_rank 16 --lora_target_modules {layers} --learning_rate 1e-2 --lr_scheduler_type cosine "
        f"--per_device_train_batch_size 10 --max_steps 80 --save_strategy no"
    ).check()
    run_script(
        f"chatglm_milti_gpu_inference.py {model} --adapter_path {tmp_path}/adapter --max_new_tokens 40 "
        f"--input_path {tmp_path}/rows.jsonl --output_path {tmp_path}/answers.jsonl"
    ).check()
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["finish_reason"] for row in answers] == ["stop"] * len(ROWS)
    assert [row["answer"] for row in answers] == list(ROWS.values())
    tokenizer = load_tokenizer(str(GOLDEN / name))
    assert template_for(tokenizer).stop_ids(tokenizer)[0] < len(tokenizer)
