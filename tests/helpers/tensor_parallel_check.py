"""
torchrun tensor_parallel_check.py CHECKPOINT TP_SIZE [compiled]

Checks that what the inference scripts load is sharded and has the whole model's logits; with `compiled` also that the
engine answers the same with it, its layers compiled as on a GPU.
"""

import math
import sys

import torch

from utils.checkpoint.model import Checkpoint, load_model
from utils.common.processes import world_size
from utils.distributed.process_group import init_process_group, shut_down
from utils.inference.adapters import AttachAdapters
from utils.inference.engine import Engine
from utils.inference.engine.model_runner import EngineConfig
from utils.inference.engine.scheduler import StopRule, TokenSequence
from utils.inference.placement import load_on_processes, prepare_for_decoding
from utils.layers.fused_qkv import QKV_PROJ
from utils.models.family import QKV

path, tp_size = sys.argv[1], int(sys.argv[2])
init_process_group(use_deepspeed=False)
checkpoint = Checkpoint.open(path)
sharded, replica = load_on_processes(checkpoint, torch.float32, None, AttachAdapters(), tp_size)
assert replica.replicas == world_size() // tp_size
whole = load_model(path)
plan = checkpoint.architecture.tensor_parallel


def count_weights(model, names):
    return sum(layer.weight.numel() for name, layer in model.named_modules() if name.endswith(names))


expected = {
    (name,): count_weights(whole, name)
    for name in (*plan.column_parallel, *plan.packed_column_parallel, *plan.row_parallel)
    if name not in QKV
}
if QKV[0] in plan.column_parallel:  # the engine makes one layer of them
    heads = whole.config.num_key_value_heads
    repeats = math.lcm(heads, tp_size) // heads
    expected[(*QKV, QKV_PROJ)] = count_weights(whole, QKV[0]) + repeats * count_weights(whole, QKV[1:])
assert len(expected) == 4
for names, number in expected.items():
    held = count_weights(sharded, names)
    total = torch.tensor(held)
    torch.distributed.all_reduce(total)
    assert 0 < held < number and total == replica.replicas * number, (names, held, number)
config = whole.config
input_ids = torch.randint(100, 600, (2, 20), generator=torch.Generator().manual_seed(0))
if hasattr(config, "gmask_token_id"):
    input_ids[:, 10], input_ids[:, 11] = config.gmask_token_id, config.bos_token_id
with torch.no_grad():
    difference = (sharded(input_ids=input_ids).logits - whole(input_ids=input_ids).logits).abs().max().item()
assert difference <= 1e-4, difference
if "compiled" in sys.argv:
    answers = []
    prepare_for_decoding(whole)
    for model, compiles in ((whole.eval(), False), (sharded.eval(), True)):
        config = EngineConfig(2, 40, StopRule(frozenset({-1})), compile_layers=compiles)
        sequences = [TokenSequence(number, ids, 8) for number, ids in enumerate(input_ids[:, :12].tolist())]
        done = Engine(model, config).answer(sequences)
        answers.append({sequence.sequence_id: sequence.answer_ids for sequence in done})
    assert answers[0] == answers[1] and len(answers[0]) == 2, answers
print("tensor parallel ok")
shut_down()
