"""Packed rows train as padded ones; the loss computed on targets alone is the loss of the whole model."""

import json

import pytest
import torch
from conftest import GOLDEN, ROOT, TINY
from safetensors.torch import load_file

from utils.checkpoint.model import Checkpoint, load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.data.arrow_reader import load_examples, row_lengths
from utils.data.collators import PackingCollator, PaddingCollator
from utils.data.encode import encode_example
from utils.data.packing import best_fit, pack_rows
from utils.data.row_parser import parse_row
from utils.lora.adapter import LoraSettings, attach_adapter
from utils.training.loss import use_target_loss

NAMES = ("chatglm-6b-int4-qe-tiny", "chatglm2-6b-tiny", "glm-4-9b-chat-tiny", "glm4-9b-0414-tiny")
MODELS = [TINY, *(GOLDEN / name for name in NAMES)]
TRAIN = f"multi_gpu_fintune_belle.py --model_name_or_path {TINY} --lora_rank 4 --learning_rate 2e-3 --max_steps 3"


def rows_of(path, count):
    tokenizer = load_tokenizer(str(path))
    lines = (ROOT / "data" / "sample.train.json").read_text(encoding="utf-8").splitlines()[:count]
    examples = [encode_example(tokenizer, parse_row(json.loads(line))) for line in lines]
    return tokenizer, [{"input_ids": e.input_ids, "labels": e.labels} for e in examples]


def loss_and_gradient(path, batch, on_targets):
    checkpoint = Checkpoint.open(str(path))
    model = attach_adapter(
        load_model(str(path)), LoraSettings(4, 32, 0.0, list(checkpoint.generation.lora_target_modules)), seed=0
    )
    if on_targets:
        use_target_loss(model)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(path):
    tokenizer, rows = rows_of(path, 7)
    padded = PaddingCollator(tokenizer.pad_token_id)(rows)
    packed = PackingCollator(Checkpoint.open(str(path)).row_positions, tokenizer.pad_token_id)([rows[:3], rows[3:]])
    assert packed["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in rows))
    plain = {key: padded[key] for key in ("input_ids", "attention_mask", "labels")}
    expected_loss, expected = loss_and_gradient(path, plain, on_targets=False)
    for batch in (padded, packed):
        loss, gradient = loss_and_gradient(path, batch, on_targets=True)
        assert abs(loss - expected_loss) <= 1e-5
        assert expected.norm() > 0 and (gradient - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("path", MODELS[::3], ids=lambda path: path.name)
def test_a_packed_row_sees_no_other(path):
    """Changing one row leaves the hidden states of the others, bit for bit."""
    _, rows = rows_of(path, 3)
    checkpoint, model = Checkpoint.open(str(path)), load_model(str(path))
    collate = PackingCollator(checkpoint.row_positions, pad_token_id=3)
    batch = collate([rows])
    keys = ("input_ids", "position_ids", "cu_seq_lens_q")
    before = model(**{key: batch[key] for key in keys}, use_cache=False).logits
    first, second = batch["cu_seq_lens_q"][1:3].tolist()
    batch["input_ids"][0, first + 2] += 1
    after = model(**{key: batch[key] for key in keys}, use_cache=False).logits
    changed = (before != after).any(-1)[0]
    assert not changed[:first].any() and not changed[second:].any() and changed[first:second].any()


def test_best_fit():
    assert best_fit([6, 3, 5, 4], 10) == [[0, 3], [2, 1]]
    assert best_fit([10, 10], 10) == [[0], [1]]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 1025, (5000,), generator=generator).tolist()
    packs = pack_rows(lengths, 8192, seed=3)
    assert sorted(index for pack in packs for index in pack) == list(range(5000))  # each row once, none split
    used = [sum(lengths[i] for i in pack) for pack in packs]
    assert max(used) <= 8192 and sum(used) / (8192 * len(packs)) > 0.99
    assert packs == pack_rows(lengths, 8192, seed=3) != pack_rows(lengths, 8192, seed=4)


@pytest.fixture(scope="module")
def workspace(run_script, tmp_path_factory):
    """Eight rows with targets of one to five sentences, tokenised, and the adapter of padded batches."""
    path = tmp_path_factory.mktemp("packing")
    lines = (ROOT / "data" / "sample.train.json").read_text(encoding="utf-8").splitlines()[:8]
    rows = [json.loads(line) for line in lines]
    for row, sentences in zip(rows, (1, 3, 1, 2, 5, 1, 1, 2), strict=True):
        row["output"] *= sentences
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_script(
        f"tokenize_dataset_rows_belle.py --jsonl_path {path}/rows.jsonl --save_path {path}/tokens "
        f"--model_name_or_path {TINY}"
    ).check()
    flags = f"--dataset_path {path}/tokens --per_device_train_batch_size 8 --output_dir {path}/padded"
    run_script(f"{TRAIN} {flags}").check()
    return path


def largest_difference(workspace, name):
    expected, actual = (load_file(workspace / n / "adapter_model.safetensors") for n in ("padded", name))
    assert actual.keys() == expected.keys()
    return max((actual[key] - expected[key]).abs().max().item() for key in expected)


def test_packed_training_is_padded_training(run_script, workspace):
    flags = f"--dataset_path {workspace}/tokens --packing --per_device_train_batch_size 1"
    words = run_script(f"{TRAIN} {flags} --output_dir {workspace}/packed").check().words
    assert (
        "8 rows, " in words and "batches 1 pack of at most 8,192 tokens" in words and "global batch 1 pack " in words
    )
    assert largest_difference(workspace, "packed") <= 1e-5


def test_packs_on_two_processes(run_ranks, workspace):
    """Ranks have different numbers of targets however the packs are distributed: the loss is a mean over tokens."""
    dataset = load_examples(str(workspace / "tokens"))
    packs = pack_rows(row_lengths(dataset), 150, seed=42)
    targets = [sum(label >= 0 for i in pack for label in dataset[i]["labels"]) for pack in packs]
    assert len(packs) == 4 and all(2 * (targets[0] + other) != sum(targets) for other in targets[1:])
    command = f"{TRAIN} --dataset_path {workspace}/tokens --packing --pack_tokens 150"
    result = run_ranks(2, f"{command} --per_device_train_batch_size 2 --output_dir {workspace}/ddp").check()
    assert "batches 4 packs of" in result.words and "global batch 4 packs" in result.words
    assert largest_difference(workspace, "ddp") <= 1e-4


def test_a_row_longer_than_a_pack_is_refused(run_script, workspace):
    flags = f"--dataset_path {workspace}/tokens --packing --pack_tokens 8 --output_dir {workspace}/none"
    result = run_script(f"{TRAIN} {flags}")
    assert result.code == 2 and "--pack_tokens 8: the longest row has" in result.err


def test_the_head_takes_no_adapter(run_script, workspace):
    flags = f"--dataset_path {workspace}/tokens --lora_target_modules lm_head --output_dir {workspace}/none"
    result = run_script(f"{TRAIN} {flags}")
    assert result.code == 2 and "--lora_target_modules lm_head: the model's linear layers are dense" in result.err
