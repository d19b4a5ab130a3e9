"""Losses, gradients and loss scales that go wrong end the run, and the message names the rows at fault."""

import json
import re
import shutil

import datasets
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from conftest import TINY
from safetensors.torch import load_file, save_file

from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.errors import RunError
from utils.data.arrow_reader import FEATURES, trained_rows
from utils.training.nan_guard import SKIPPED_STEPS, GuardedTrainer, OverflowWatch, find_row

TRAIN = "multi_gpu_fintune_belle.py --lora_rank 2 --max_steps 3 --save_strategy no --learning_rate 1e-3"
BAD, GOOD = "猫在哪里?", "老师在图书馆"
EMBEDDING = "transformer.word_embeddings.weight"


@pytest.fixture(scope="module")
def tokens(run_script, tmp_path_factory):
    """Eight rows, one with a token that the others lack."""
    path = tmp_path_factory.mktemp("guards")
    rows = [{"input": BAD if i == 5 else GOOD, "target": f"{i}"} for i in range(8)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_script(
        f"tokenize_dataset_rows_belle.py --jsonl_path {path}/rows.jsonl --save_path {path}/tokens "
        f"--model_name_or_path {TINY}"
    ).check()
    return path / "tokens"


def changed_base(path, change, **values):
    """The embedded checkpoint with other weights and other values in its configuration."""
    shutil.copytree(TINY, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))
    weights = {key: value.float() for key, value in load_file(path / "model.safetensors").items()}
    change(weights)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("packing", ["", "--packing --pack_tokens 32"])
def test_a_loss_that_is_not_finite_names_its_rows(run_script, tokens, tmp_path, packing):
    tokenizer = load_tokenizer(str(TINY))
    only_here = sorted(set(tokenizer.encode(BAD)) - set(tokenizer.encode(GOOD)))

    def overflow(weights):  # finite, and the sum of two is not; the head stays as it is
        weights["lm_head.weight"] = weights[EMBEDDING].clone()
        weights[EMBEDDING][only_here] = 3e38

    base = changed_base(tmp_path / "base", overflow, tie_word_embeddings=False)
    command = (
        f"{TRAIN} --dataset_path {tokens} --model_name_or_path {base} --per_device_train_batch_size 1 "
        f"--gradient_accumulation_steps 2 {packing} --output_dir {tmp_path}"
    )
    result = run_script(f"{command}/out --max_steps 8 --save_strategy steps --save_steps 2")
    assert result.code == 1 and "Traceback" not in result.err
    step = int(
        re.search(r"step (\d), rank 0: the loss is nan; the rows of its batch are in .*rows_at_fault", result.err)[1]
    )
    saved = {int(path.name.removeprefix("checkpoint-")) for path in (tmp_path / "out").glob("checkpoint-*")}
    assert saved == set(range(2, step, 2))
    last = run_script(f"{command}/last --max_steps {step}")  # after which there is no other
    assert last.code == 1 and f"step {step}, rank 0: the loss is nan" in last.err
    assert not (tmp_path / "last" / "adapter_model.safetensors").exists()
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows_at_fault.rank0.jsonl").read_text().splitlines()]
    assert [row["text"].startswith(BAD) for row in rows if row["row"] == 5] == [True]
    assert packing or len(rows) == 1
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_no_optimizer_uses_what_is_wrong(run_script, tokens, tmp_path, monkeypatch):
    """They are checked a step later, and the step was not made."""
    seen = []
    plain = GuardedTrainer._get_grad_norm

    def get_grad_norm(self, model, grad_norm=None):
        if len(seen) == 1:  # of the second step
            grad_norm = grad_norm * torch.nan
        weights = [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]
        seen.append((weights, self.optimizer.optimizer.state_dict()["state"][0]["step"].clone() if seen else 0))
        return plain(self, model, grad_norm)

    monkeypatch.setattr(GuardedTrainer, "_get_grad_norm", get_grad_norm)
    result = run_script(
        f"{TRAIN} --dataset_path {tokens} --model_name_or_path {TINY} --output_dir {tmp_path}/out --logging_steps 50"
    )
    assert result.code == 1 and "step 2, rank 0: the gradients' norm is nan" in result.err
    (start, _), (first, first_count), (second, second_count) = seen
    assert not all(a.equal(b) for a, b in zip(start, first, strict=True))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True)) and first_count == second_count == 1


def test_gradients_that_are_all_zero(run_script, tokens, tmp_path):
    def cut(weights):  # what the head sees is its bias alone, whatever the layers do
        weights["transformer.final_layernorm.weight"].zero_()

    base = changed_base(tmp_path / "base", cut)
    result = run_script(f"{TRAIN} --dataset_path {tokens} --model_name_or_path {base} --output_dir {tmp_path}/out")
    assert result.code == 1 and "step 1, rank 0: all gradients are zero" in result.err
    assert len((tmp_path / "out" / "rows_at_fault.rank0.jsonl").read_text().splitlines()) == 8


def test_an_adapter_that_did_not_change_is_not_saved(run_script, tokens, tmp_path):
    """The rate is 0 in float32."""
    result = run_script(
        f"{TRAIN} --dataset_path {tokens} --model_name_or_path {TINY} --output_dir {tmp_path}/out --max_steps 1 "
        f"--learning_rate 1e-46"
    )
    assert result.code == 1 and "adapter not saved: it never changed" in result.err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_losses_that_are_all_zero(run_script, tokens, tmp_path, monkeypatch):
    plain = GuardedTrainer.check_last_step

    def without_losses(self):
        plain(self)
        self.saw_a_loss = False  # as if it had been 0

    monkeypatch.setattr(GuardedTrainer, "check_last_step", without_losses)
    result = run_script(f"{TRAIN} --dataset_path {tokens} --model_name_or_path {TINY} --output_dir {tmp_path}/out")
    assert result.code == 1 and "every loss was exactly 0" in result.err


def test_rows_without_a_trained_token_are_left_out(run_script, tokens, tmp_path):
    rows = datasets.load_from_disk(str(tokens)).to_dict()
    blank = {"input_ids": [[5, 6, 7], [8], []], "labels": [[-100] * 3, [8], []]}  # a first token is never predicted
    mixed = {name: blank[name][:1] + rows[name] + blank[name][1:] for name in FEATURES}
    dataset = datasets.Dataset.from_dict(mixed, features=FEATURES)
    dataset.save_to_disk(str(tmp_path / "mixed"))
    assert trained_rows(dataset).tolist() == list(range(1, 9))
    assert trained_rows(dataset.select([0, 9, 3])).tolist() == [2]
    assert find_row(dataset, rows["input_ids"][5]) == 6 and find_row(dataset, [1, 1]) is None
    flags = f"{TRAIN} --model_name_or_path {TINY} --per_device_train_batch_size 2"
    result = run_script(f"{flags} --dataset_path {tmp_path}/mixed --output_dir {tmp_path}/a").check()
    assert (
        "3 rows have no token to train on and are left out, first row 0" in result.out and ": 8 rows, " in result.words
    )
    run_script(f"{flags} --dataset_path {tokens} --output_dir {tmp_path}/b").check()
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert all(a[key].equal(b[key]) for key in b)
    datasets.Dataset.from_dict(blank, features=FEATURES).save_to_disk(str(tmp_path / "blank"))
    result = run_script(f"{flags} --dataset_path {tmp_path}/blank --output_dir {tmp_path}/c")
    assert result.code == 2 and "no row has a token to train on" in result.err


def test_every_step_skipped(run_ranks, tokens, tmp_path):
    """In float16 under DeepSpeed, whose loss scale has not come down far enough yet."""

    def enlarge(weights):
        weights["lm_head.weight"] = weights[EMBEDDING] * 12
        weights["transformer.final_layernorm.weight"] *= 12

    base = changed_base(tmp_path / "base", enlarge, tie_word_embeddings=False)
    result = run_ranks(
        1,
        f"tests/helpers/float16_on_cpu.py {TRAIN} --dataset_path {tokens} --model_name_or_path {base} "
        f"--logging_steps 1 --output_dir {tmp_path}/out --deepspeed ds_config_zero3.json",
    )
    assert result.code == 1 and "all 3 steps were skipped" in result.err
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail).get("grad_norm", 0) for line in lines] == [None] * 3 + [0]
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_loss_scale_that_finds_no_bottom():
    """The scaler that torch and accelerate have on a GPU, here on the CPU: steps are really skipped."""
    weight = torch.nn.Parameter(torch.ones(1))
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AcceleratedOptimizer(torch.optim.SGD([weight], lr=1e-3), device_placement=False, scaler=scaler)
    watch = OverflowWatch()
    state = type("State", (), {"global_step": 3})

    def step(gradient):
        scaler.scale(weight.sum() * 0)  # makes the scale
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        watch.on_optimizer_step(None, state, None, optimizer=optimizer)

    for _ in range(SKIPPED_STEPS - 1):
        step(float("inf"))
    step(1.0)
    for _ in range(SKIPPED_STEPS - 1):
        step(float("inf"))
    with pytest.raises(RunError, match="step 4: the float16 gradients overflowed in 16 steps in a row.*--bf16"):
        step(float("inf"))
