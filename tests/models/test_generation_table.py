"""The table of generations: each row is complete, and names what the files of the generation really have."""

import shutil

import pytest
import torch
from conftest import GOLDEN

from utils.checkpoint.model import Checkpoint
from utils.checkpoint.tokenizer import load_tokenizer
from utils.models.architectures import ARCHITECTURES, architecture_of
from utils.models.convert_tokenizer import fast_tokenizer
from utils.models.family import BY_FLAG, CHATGLM_6B, GENERATIONS, GLM4, GLM4_HF, GLM_Z1, MERGED, generation_of
from utils.models.jinja_templates import NATIVE_BODIES

CHECKPOINTS = {
    "ChatGLM-6B": "chatglm-6b-tiny",
    "ChatGLM2-6B": "chatglm2-6b-tiny",
    "ChatGLM3-6B": "chatglm3-6b-tiny",
    "GLM-4-9B": "glm-4-9b-chat-tiny",
    "GLM-4-0414": "glm4-9b-0414-tiny",
    "GLM-Z1-0414": "glm4-9b-0414-tiny",
}


def test_no_two_rows_share_what_names_them():
    assert len({row.name for row in GENERATIONS}) == len(GENERATIONS) == 7
    assert {row.flag for row in GENERATIONS} == set(BY_FLAG)
    assert {row.architecture for row in [*GENERATIONS, *MERGED.values()]} == set(ARCHITECTURES)
    assert {row.name for row in GENERATIONS} - {CHATGLM_6B.name} == set(MERGED)
    assert {row.chat_template for row in MERGED.values() if not row.keeps_tokenizer} == set(NATIVE_BODIES)


@pytest.mark.parametrize("row", BY_FLAG.values(), ids=lambda row: row.flag)
def test_a_row_describes_its_checkpoint(row, tmp_path):
    path = GOLDEN / CHECKPOINTS[row.name]
    if row is GLM_Z1:  # the same files under the other name
        path = shutil.copytree(path, tmp_path / "GLM-Z1-9B-0414")
    checkpoint = Checkpoint.open(str(path))
    assert checkpoint.generation is row and (path / row.vocab_file).is_file()
    assert generation_of(load_tokenizer(str(path))) is row
    model = checkpoint.empty_model(torch.float32)
    assert type(model) is architecture_of(row).model_class
    plan = architecture_of(row).tensor_parallel
    block = model.base_model.layers[0]
    layers = [name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)]
    assert {name.rpartition(".")[2] for name in layers} == set(row.linear_layers)
    hidden = model.config.hidden_size
    sizes = {
        name.rpartition(".")[2]: (m.in_features, m.out_features) for name, m in block.named_modules() if name in layers
    }
    assert all(sizes[name][0] == hidden for name in (*row.layers.qkv, row.layers.mlp_up))
    assert all(sizes[name][1] == hidden for name in (row.layers.attention_output, row.layers.mlp_down))
    split = (*plan.column_parallel, *plan.row_parallel, *plan.packed_column_parallel)
    assert sorted(name.rpartition(".")[2] for name in split) == sorted(row.linear_layers)


def test_a_tokenizer_of_transformers_own_class_is_glm4_hf():
    fast = fast_tokenizer(load_tokenizer(str(GOLDEN / CHECKPOINTS[GLM4.name])))
    assert generation_of(fast) is GLM4_HF and GLM4_HF.chat_template is GLM4.chat_template
