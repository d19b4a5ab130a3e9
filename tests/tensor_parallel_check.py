"""Run by a launcher: the sharded model's logits against the whole one's, and that it is sharded at all."""

import sys

from utils.checkpoint import Checkpoint, load_model
from utils.distributed import init_process_group, shut_down, world_size
from utils.placement import shard_with_deepspeed

import torch

init_process_group(use_deepspeed=True)
path = sys.argv[1]
generation = Checkpoint.open(path).generation
whole = load_model(path)
sharded = shard_with_deepspeed(load_model(path), generation, torch.float32, world_size())
plan, split = generation.architecture.tensor_parallel, 0
parts = dict(sharded.named_modules())
for name, module in whole.named_modules():
    columns = any(name.endswith(column) for column in (*plan.columns, *plan.packed_columns))
    if columns or any(name.endswith(row) for row in plan.rows):
        dimension = 0 if columns else 1
        whole_size, part_size = module.weight.shape[dimension], parts[name].weight.shape[dimension]
        sizes = torch.tensor(part_size)
        torch.distributed.all_reduce(sizes)
        repeats = max(1, world_size() // getattr(whole.config, "num_key_value_heads", world_size()))
        expected = whole_size * (repeats if name.endswith(("k_proj", "v_proj")) else 1)
        assert 0 < part_size < whole_size and sizes == expected, (name, part_size, whole_size)
        split += 1
assert split == (len(plan.columns) + len(plan.packed_columns) + len(plan.rows)) * whole.config.num_hidden_layers
config = whole.config
input_ids = torch.randint(100, 600, (2, 20), generator=torch.Generator().manual_seed(0))
if hasattr(config, "gmask_token_id"):
    input_ids[:, 10], input_ids[:, 11] = config.gmask_token_id, config.bos_token_id
with torch.no_grad():
    difference = (sharded(input_ids=input_ids).logits - whole(input_ids=input_ids).logits).abs().max().item()
assert difference <= 1e-4, difference
print("tensor parallel ok")
shut_down()
