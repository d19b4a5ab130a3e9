"""The private methods of transformers' Trainer that ours override exist there, with the parameters that we use."""

import inspect

import pytest
from transformers import Trainer

from utils.training.nan_guard import GuardedTrainer
from utils.training.trainer import TRAINER_HOOKS, AdapterTrainer

OWN = {"_fused_optimizer", "_blame"}  # private methods that are ours alone
PARAMETERS = {
    "_get_train_sampler": ["train_dataset"],
    "_get_grad_norm": ["model", "grad_norm"],
    "_run_epoch": ["model", "trial"],
    "_save_checkpoint": ["model", "trial"],
    "_get_output_dir": ["trial"],
    "save_model": ["output_dir", "_internal_call"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
    "log": ["logs", "start_time"],
}


def methods(kind: type) -> set[str]:
    return {name for name, value in vars(kind).items() if inspect.isfunction(value) and not name.startswith("__")}


def test_every_private_method_that_we_override_is_listed():
    ours = {name for kind in (AdapterTrainer, GuardedTrainer) for name in methods(kind) if name[0] == "_"}
    assert ours - OWN == set(TRAINER_HOOKS)


@pytest.mark.parametrize("name", (*TRAINER_HOOKS, "_prepare_inputs", "create_accelerator_and_postprocess"))
def test_trainer_has_the_method(name):
    assert inspect.isfunction(vars(Trainer).get(name))


@pytest.mark.parametrize("name", PARAMETERS)
def test_trainer_passes_the_parameters(name):
    assert set(PARAMETERS[name]) <= inspect.signature(getattr(Trainer, name)).parameters.keys()
