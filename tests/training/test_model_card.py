"""The README.md beside an adapter: what it says, whether the hub reads it, whether its example opens the adapter."""

import os
import re
from dataclasses import replace

import datasets
import pytest
import torch
from conftest import TINY
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState

from tools.random_checkpoint import released_checkpoint
from utils import __version__
from utils.lora.adapter import AdapterOrigin
from utils.models.family import GLM4_HF, GLM_Z1
from utils.training.arguments import FinetuneArguments
from utils.training.model_card import HERE, describe_adapter
from utils.training.preflight import TrainingInputs
from utils.training.resume_key import ResumeKey
from utils.training.run_config import RunConfig


def test_the_card_of_a_run(train_tiny, tokens, tmp_path):
    """Its best step, which is not the last; each checkpoint has a card of its own."""
    flags = "--max_steps 2 --save_steps 1 --logging_steps 1 --eval_fraction 0.1 --load_best_model_at_end"
    umask = os.umask(0o027)
    train_tiny(tmp_path, f"{flags} --learning_rate 0.5 --lr_scheduler_type constant").check()
    os.umask(umask)
    assert {oct(path.stat().st_mode & 0o666) for path in tmp_path.rglob("*")} == {"0o640"}  # of directories 750
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.base_model, card.data.language) == ("peft", None, "zh")
    assert "{" not in card.text and "More Information" not in card.text and str(tokens.parent) not in card.text
    for words in (
        f"Chatglm_lora_multi-gpu {__version__} on 20",
        "The adapter is that of step 1.",
        f"| base model | {TINY.name} |",
        "| data | tokens, 274 rows |",
        "| evaluation data | 26 rows |",
        "| LoRA | rank 4, alpha 32, dropout 0.0 |",
        "| learning rate | 0.5, constant |",
        "| global batch | 2 rows |",
        "| launcher | one process |",
    ):
        assert words in card.text, card.text
    assert re.search(r"training, last logged \| \d+\.\d{4} \(step 2\)", card.text)
    assert re.search(r"evaluation, lowest \| \d+\.\d{4} \(step 1\)", card.text)
    last = ModelCard.load(tmp_path / "checkpoint-2" / "README.md").text
    assert "that of step 2." in last and "(step 1)" in last
    (example,) = re.findall("```python\n(.*?)```", card.text, flags=re.DOTALL)
    scope = {}
    exec(example.replace(HERE, str(tmp_path)).replace(repr(TINY.name), repr(str(TINY))), scope)
    assert isinstance(scope["model"], PeftModel)


@pytest.mark.parametrize(
    "generation, given",
    [
        (GLM4_HF, "THUDM/glm-4-9b-chat-hf"),
        (GLM4_HF, "/home/somebody/models/glm-4-9b-chat-hf"),
        (GLM_Z1, "THUDM/GLM-Z1-9B-0414"),
    ],
)
def test_what_it_says_of_the_base(tmp_path, generation, given):
    """The hub's metadata names a base that the hub has; no directory of this machine is named."""
    flags = FinetuneArguments(dataset_path="rows", lora_target_modules=["q_proj"], model_name_or_path=given)
    checkpoint = replace(released_checkpoint("glm-4-9b"), generation=generation)
    rows = datasets.Dataset.from_dict({"input_ids": [[5]]})
    inputs = TrainingInputs(rows, None, checkpoint, AdapterOrigin("native", {}, given))
    args = TrainingArguments(output_dir=str(tmp_path))
    config = RunConfig(inputs, flags, args, torch.bfloat16, ResumeKey({}, {}))
    card = ModelCard(describe_adapter(config, TrainerState(global_step=3), step=3))
    assert card.data.base_model == (given if given.startswith("THUDM") else None)
    assert f"# LoRA adapter for {generation.name}" in card.text and "/home/" not in card.text
    assert "AutoModelForCausalLM.from_pretrained('" in card.text and "precision | bfloat16" in card.text
