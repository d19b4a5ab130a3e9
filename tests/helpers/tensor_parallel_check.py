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
from utils.inference.engine import Engine
from utils.inference.engine.model_runner import EngineConfig
from utils.inference.engine.scheduler import StopRule, TokenSequence
from utils.inference.placement import load_on_processes, prepare_for_decoding

path, tp_size = sys.argv[1], int(sys.argv[2])
init_process_group(use_deepspeed=False)
checkpoint = Checkpoint.open(path)
sharded, replica = load_on_processes(checkpoint, torch.float32, None, lambda model, shards: model, tp_size)
assert replica.replicas == world_size() // tp_size
whole = load_model(path)
plan, split = checkpoint.architecture.tensor_parallel, 0
shards = dict(sharded.named_modules())
for name, module in whole.named_modules():
    columns = any(name.endswith(column) for column in (*plan.column_parallel, *plan.packed_column_parallel))
    if columns or any(name.endswith(row) for row in plan.row_parallel):
        dimension = 0 if columns else 1
        whole_size, shard_size = module.weight.shape[dimension], shards[name].weight.shape[dimension]
        sizes = torch.tensor(shard_size)
        torch.distributed.all_reduce(sizes)
        heads = getattr(whole.config, "num_key_value_heads", tp_size)
        repeats = math.lcm(heads, tp_size) // heads
        expected = whole_size * (repeats if name.endswith(("k_proj", "v_proj")) else 1)
        assert 0 < shard_size < expected and sizes == replica.replicas * expected, (name, shard_size, whole_size)
        split += 1
assert (
    split
    == (len(plan.column_parallel) + len(plan.packed_column_parallel) + len(plan.row_parallel))
    * whole.config.num_hidden_layers
)
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
