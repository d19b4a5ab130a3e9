"""
`ExpectedWeights`: the weights of a model, each checked and ticked off as it comes from the files.

In: an empty model; weights with their names in the model class. Out: whether the model needs each, or an error that
names it. Called by utils/checkpoint/model.py.
"""

import re

import torch
from transformers import PreTrainedModel

from utils.checkpoint.weight_files import find_unusable
from utils.common.errors import UsageError


class ExpectedWeights:
    """
    The weights that a model needs, checked off as they come from files.

    Names, shapes and values are checked before a weight takes memory.
    """

    def __init__(self, model: PreTrainedModel, source: str, name: str):
        self.tensors = model.state_dict()
        self.source, self.name = source, name
        self._tied = {source: target for target, source in model.all_tied_weights_keys.items()}
        self._ignored = model._keys_to_ignore_on_load_unexpected or ()
        self._missing = set(self.tensors) - set(self._tied.values())

    def copies_of(self, key: str) -> list[str]:
        """The weights that are tied to this one."""
        return [self._tied[key]] if key in self._tied else []

    def take_shape(self, key: str, tensor: torch.Tensor) -> bool:
        """
        Whether the model needs this weight; the copy of a tied one it does not. Values are not read.

        Raises:
            UsageError: the weight belongs to another model, or has another shape.
        """
        if key in self._tied.values() or any(re.search(pattern, key) for pattern in self._ignored):
            return False
        if key not in self._missing:
            raise UsageError(f"{self.source}: {key} is not a weight of {self.name}, which its config.json describes")
        expected = self.tensors[key]
        if tensor.shape != expected.shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(expected.shape)} as its config.json says"
            raise UsageError(f"{self.source}: {key} has the shape {shapes}")
        self._missing.remove(key)
        return True

    def take(self, key: str, tensor: torch.Tensor) -> bool:
        """
        Whether the model needs this weight, as `take_shape`, once its values are checked.

        Raises:
            UsageError: see `take_shape`; or its values cannot be used.
        """
        if not self.take_shape(key, tensor):
            return False
        fault = find_unusable(tensor, self.tensors[key].dtype)
        if fault:
            raise UsageError(f"{self.source}: {key} {fault}")
        return True

    def check_complete(self) -> None:
        """
        Check that every weight has come.

        Raises:
            UsageError: some have not.
        """
        if self._missing:
            raise UsageError(f"{self.source}: {len(self._missing)} weights are missing, first {min(self._missing)}")
