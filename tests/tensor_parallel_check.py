"""Run by a launcher: the sharded model's logits against the whole one's, and that it is sharded at all."""

import sys

from utils.checkpoint import load_model
from utils.distributed import init_process_group, shut_down, world_size
from utils.placement import shard_with_deepspeed

import torch

init_process_group(use_deepspeed=True)
path = sys.argv[1]
whole = load_model(path)
sharded = shard_with_deepspeed(load_model(path), torch.float32)
full, part = whole.transformer.layers[0], sharded.transformer.layers[0]
for module, dimension in (
    ("attention.query_key_value", 0),
    ("attention.dense", 1),
    ("mlp.dense_h_to_4h", 0),
    ("mlp.dense_4h_to_h", 1),
):
    whole_size = full.get_submodule(module).weight.shape[dimension]
    part_size = part.get_submodule(module).weight.shape[dimension]
    assert part_size * world_size() == whole_size, (module, part_size, whole_size)
config = whole.config
input_ids = torch.randint(100, 600, (2, 20), generator=torch.Generator().manual_seed(0))
input_ids[:, 10], input_ids[:, 11] = config.gmask_token_id, config.bos_token_id
with torch.no_grad():
    difference = (sharded(input_ids=input_ids).logits - whole(input_ids=input_ids).logits).abs().max().item()
assert difference <= 1e-4, difference
print("tensor parallel ok")
shut_down()
