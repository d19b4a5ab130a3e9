"""Files of a training run beside its adapter (metrics, figure, log, run.json), evaluation, and the best checkpoint."""

import json
import math
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

from utils import __version__
from utils.checkpoint.model import load_model
from utils.common.redaction import HIDDEN, hide_secrets
from utils.data.arrow_reader import hold_out, load_examples
from utils.data.collators import PaddingCollator
from utils.training.callbacks import LossCurves
from utils.training.run_log import shown_command

FLAGS = (
    "--lora_rank 4 --learning_rate 2e-3 --lr_scheduler_type constant --per_device_train_batch_size 2 "
    "--logging_steps 1 --save_steps 2"
)
SECRET = "hf_thatNobodyMayRead"


@pytest.fixture(scope="module")
def train(run_script, tokens):
    def run(output_dir, flags="", settings=FLAGS):
        return run_script(
            f"multi_gpu_fintune_belle.py --dataset_path {tokens} --model_name_or_path {TINY} {settings} "
            f"--output_dir {output_dir} {flags}"
        )

    return run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    flags = "--max_steps 4 --eval_fraction 0.1 --eval_on_start --report_to tensorboard"
    train(path, f"{flags} --hub_token={SECRET}").check()
    return path


def test_no_file_of_a_run_holds_a_secret(whole):
    files = [path for path in whole.rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert f"--hub_token={HIDDEN}" in json.loads((whole / "run.json").read_text())["command"]
    assert f"--hub_token={HIDDEN}" in (whole / "train.log").read_text()


def test_secrets_are_told_by_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "--hub_t", "hf_first1", "--db-password=second2", "--seed", "third3"])
    monkeypatch.setenv("WANDB_API_KEY", "fourth4")
    monkeypatch.setenv("PACK_TOKENS", "fifth5")
    assert shown_command() == f"x.py --hub_t '{HIDDEN}' '--db-password={HIDDEN}' --seed third3"
    values = {"text": ["hf_first1 second2 third3 fourth4 fifth5"], "api_key": "sixth", "hub_token": None}
    shown = {"text": [f"{HIDDEN} {HIDDEN} third3 {HIDDEN} fifth5"], "api_key": HIDDEN, "hub_token": None}
    assert hide_secrets(values) == shown


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def curve(directory, name):
    return {row["step"]: row[name] for row in metrics(directory) if name in row}


def test_metrics_and_figure(whole):
    assert list(curve(whole, "loss")) == [1, 2, 3, 4] == list(curve(whole, "learning_rate"))
    assert list(curve(whole, "eval_loss")) == [0, 2, 4] and list(curve(whole, "tokens_per_second"))[:3] == [2, 3, 4]
    for step, loss in curve(whole, "eval_loss").items():
        assert curve(whole, "eval_perplexity")[step] == pytest.approx(math.exp(loss))
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((whole / "tensorboard").glob("events*"))


def test_the_figure_is_drawn_with_checkpoints_and_at_the_end(tmp_path):
    args, figure = SimpleNamespace(output_dir=str(tmp_path)), tmp_path / "loss.png"
    state = SimpleNamespace(is_world_process_zero=True, log_history=[{"step": 1, "loss": 3.0}])
    curves = LossCurves()
    curves.on_log(args, state, None)
    assert (tmp_path / "metrics.jsonl").is_file() and not figure.exists()
    curves.on_save(args, state, None)
    first = figure.read_bytes()
    state.log_history.append({"step": 2, "loss": 2.0})
    curves.on_log(args, state, None)
    assert figure.read_bytes() == first
    state.log_history.append({"step": 2, "train_runtime": 1.0})
    curves.on_log(args, state, None)
    assert figure.read_bytes() != first
    other = SimpleNamespace(is_world_process_zero=False, log_history=[{"step": 3, "loss": 1.0}])
    last = figure.read_bytes()
    curves.on_save(args, other, None)
    assert figure.read_bytes() == last


def test_run_file_and_log(whole, tokens):
    run = json.loads((whole / "run.json").read_text())
    assert torch.__version__.startswith(run["versions"]["torch"].split("+")[0])
    assert run["versions"]["toolkit"] == __version__
    assert run["world_size"] == 1 and run["resumed_from"] is None and "--eval_fraction 0.1" in run["command"]
    assert run["data"]["path"] == str(tokens) and run["data"]["rows"] + run["data"]["eval_rows"] == 300
    assert run["base"]["norms"] and run["arguments"]["lora_rank"] == 4
    assert run["training_arguments"]["learning_rate"] == 2e-3 and run["git"].keys() == {"commit", "changed_files"}
    log = (whole / "train.log").read_text()
    assert "processes      1 (one process" in log and len(re.findall(r"^ +\d/4 ", log, re.MULTILINE)) == 4 + 3
    assert "\x1b" not in log and log.splitlines()[-1].startswith('{"output_dir"')


def test_evaluation_is_that_of_all_target_tokens(whole, tokens):
    """Before the first step the adapter adds nothing: it is the loss of the base by its stock forward."""
    dataset = load_examples(str(tokens))
    held_out = dataset.select(hold_out(dataset, 0.1)[1])
    model, total, count = load_model(str(TINY)), 0.0, 0
    for row in held_out:
        batch = PaddingCollator(3)([row])
        targets = len(batch["target_ids"])
        with torch.no_grad():
            total += model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item() * targets
        count += targets
    assert curve(whole, "eval_loss")[0] == pytest.approx(total / count, abs=1e-4)
    assert curve(whole, "eval_tokens")[0] == count


def test_resumed_curves_have_no_step_twice(train, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    flags = "--max_steps 4 --eval_fraction 0.1 --eval_on_start --resume_from_checkpoint latest"
    result = train(tmp_path / "run", flags).check()
    assert f"resuming from {tmp_path}/run/checkpoint-2" in result.words
    assert curve(tmp_path / "run", "train_loss") == pytest.approx(curve(whole, "train_loss"))
    assert curve(whole, "train_loss")[4] == pytest.approx(sum(curve(whole, "loss").values()) / 4)
    for name in ("loss", "learning_rate"):
        assert curve(tmp_path / "run", name) == pytest.approx(curve(whole, name))
        assert sum(name in row for row in metrics(tmp_path / "run")) == 4
    assert json.loads((tmp_path / "run" / "run.json").read_text())["resumed_from"].endswith("checkpoint-2")
    assert (tmp_path / "run" / "train.log").read_text().count("# 2") == 2


def test_packed_evaluation_is_the_same(train, whole, tmp_path):
    train(tmp_path, "--max_steps 1 --eval_fraction 0.1 --eval_on_start --packing --pack_tokens 256").check()
    assert curve(tmp_path, "eval_loss")[0] == pytest.approx(curve(whole, "eval_loss")[0], abs=1e-4)
    assert curve(tmp_path, "eval_tokens")[0] == curve(whole, "eval_tokens")[0]


def test_evaluation_under_zero3_is_the_same(run_ranks, tokens, whole, tmp_path):
    """With another batch size, and one batch more on one process than on the other."""
    result = run_ranks(
        2,
        f"multi_gpu_fintune_belle.py --dataset_path {tokens} --model_name_or_path {TINY} "
        f"{FLAGS} --per_device_train_batch_size 1 --per_device_eval_batch_size 7 --eval_fraction 0.1 --eval_on_start "
        f"--max_steps 2 --load_best_model_at_end --output_dir {tmp_path} --deepspeed ds_config_zero3.json",
    ).check()
    assert curve(tmp_path, "eval_tokens") == {0: curve(whole, "eval_tokens")[0], 2: curve(whole, "eval_tokens")[0]}
    for step in (0, 2):
        assert curve(tmp_path, "eval_loss")[step] == pytest.approx(curve(whole, "eval_loss")[step], abs=1e-4)
    assert result.out.count("evaluation: ") == 2 == (tmp_path / "train.log").read_text().count("evaluation: ")


def test_the_best_checkpoint_is_kept(train, tmp_path):
    wild = FLAGS.replace("2e-3", "0.5").replace("--save_steps 2", "--save_steps 1")
    flags = "--max_steps 2 --save_total_limit 1 --eval_fraction 0.1"
    train(tmp_path, f"{flags} --load_best_model_at_end", wild).check()
    losses = curve(tmp_path, "eval_loss")
    best = min(losses, key=losses.get)
    assert best == 1, losses
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{best}", "checkpoint-2"]
    saved, kept = (
        load_file(path / "adapter_model.safetensors") for path in (tmp_path, tmp_path / f"checkpoint-{best}")
    )
    assert all(saved[name].equal(kept[name]) for name in kept)


def test_rows_of_one_prompt_are_held_out_together(tokens):
    dataset = load_examples(str(tokens))
    kept, held_out = hold_out(dataset, 0.3)
    assert sorted([*kept, *held_out]) == list(range(300)) and 60 < len(held_out) < 120
    fewer = dataset.select(range(100, 200))
    assert [i + 100 for i in hold_out(fewer, 0.3)[1]] == [i for i in held_out if 100 <= i < 200]
    assert set(hold_out(dataset, 0.1)[1]) <= set(held_out)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--eval_strategy steps", "--eval_dataset_path or --eval_fraction"),
        ("--load_best_model_at_end", "--eval_dataset_path or --eval_fraction"),
        ("--eval_dataset_path nowhere", "--eval_dataset_path nowhere does not exist"),
        ("--eval_fraction 1.5", "--eval_fraction 1.5"),
        ("--eval_fraction 0.0000001", "no row is held out"),
        ("--eval_fraction 0.1 --metric_for_best_model bleu", "give loss, eval_loss, perplexity"),
        ("--report_to comet_ml", "pip install comet_ml"),
    ],
)
def test_wrong_use(train, tmp_path, flags, words):
    result = train(tmp_path, flags)
    assert result.code == 2 and words in result.err and "Traceback" not in result.err
