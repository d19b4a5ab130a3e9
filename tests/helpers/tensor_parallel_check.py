"""
torchrun tensor_parallel_check.py CHECKPOINT TP_SIZE [compiled]: what the scripts load is sharded, and its logits are
the whole model's; with `compiled` also the engine's answers, its layers compiled as on a GPU.
"""

import sys

import torch

from utils.checkpoint.model import Checkpoint, load_model
from utils.common.processes import world_size
from utils.distributed.process_group import init_process_group, shut_down
from utils.inference.engine import Engine
from utils.inference.engine.prefill import TokenSequence
from utils.inference.placement import load_on_processes

path, tp_size = sys.argv[1], int(sys.argv[2])
init_process_group(use_deepspeed=False)
sharded, replica = load_on_processes(path, torch.float32, None, lambda model, shards: model, tp_size)
assert replica.replicas == world_size() // tp_size
whole = load_model(path)
plan, split = Checkpoint.open(path).architecture.tensor_parallel, 0
parts = dict(sharded.named_modules())
for name, module in whole.named_modules():
    columns = any(name.endswith(column) for column in (*plan.columns, *plan.packed_columns))
    if columns or any(name.endswith(row) for row in plan.rows):
        dimension = 0 if columns else 1
        whole_size, part_size = module.weight.shape[dimension], parts[name].weight.shape[dimension]
        sizes = torch.tensor(part_size)
        torch.distributed.all_reduce(sizes)
        repeats = max(1, tp_size // getattr(whole.config, "num_key_value_heads", tp_size))
        expected = whole_size * (repeats if name.endswith(("k_proj", "v_proj")) else 1)
        assert 0 < part_size < whole_size and sizes == replica.replicas * expected, (name, part_size, whole_size)
        split += 1
assert split == (len(plan.columns) + len(plan.packed_columns) + len(plan.rows)) * whole.config.num_hidden_layers
config = whole.config
input_ids = torch.randint(100, 600, (2, 20), generator=torch.Generator().manual_seed(0))
if hasattr(config, "gmask_token_id"):
    input_ids[:, 10], input_ids[:, 11] = config.gmask_token_id, config.bos_token_id
with torch.no_grad():
    difference = (sharded(input_ids=input_ids).logits - whole(input_ids=input_ids).logits).abs().max().item()
assert difference <= 1e-4, difference
if "compiled" in sys.argv:
    answers = []
    for model, is_compiled in ((whole.eval(), False), (sharded.eval(), True)):
        engine = Engine(model, slots=2, columns=40, stop_ids=[-1], compile_layers=is_compiled)
        tasks = [TokenSequence(number, ids, 8) for number, ids in enumerate(input_ids[:, :12].tolist())]
        answers.append({task.number: task.answer_ids for task in engine.answer(tasks)})
    assert answers[0] == answers[1] and len(answers[0]) == 2, answers
print("tensor parallel ok")
shut_down()
