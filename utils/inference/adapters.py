"""
The adapters of a command, for the model that answers: beside its weights, merged, or read to be merged into shards.

`job.py` makes an `AttachAdapters` of the flags; whoever loads the model calls it: `placement.py` or a script.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from utils.common.errors import UsageError
from utils.inference.arguments import ModelFlags, adapter_names
from utils.inference.engine import can_serve
from utils.layers.quantization import is_quantized
from utils.lora.adapter import merge_adapter
from utils.lora.formats import Adapter, read_adapter
from utils.lora.multi_lora import add_adapters


@dataclass(frozen=True)
class AttachAdapters:
    """Puts the adapters of --adapter_path on a model."""

    paths: tuple[str, ...] = ()
    lora_alpha: int | None = None  # of an adapter that does not record it

    @classmethod
    def of(cls, args: ModelFlags) -> "AttachAdapters":
        """Return that of a command's flags."""
        return cls(tuple(args.adapter_path), args.lora_alpha)

    def __call__(self, model: PreTrainedModel) -> PreTrainedModel:
        """
        Return a loaded model with the adapters.

        One adapter is merged into the weights where that is exact: in float32, whole on a device. Else it stays beside
        them, as several do, where each row chooses.

        Raises:
            UsageError: see `merge_adapter` and `add_adapters`.
        """
        if not self.paths:
            return model
        is_exact = model.dtype == torch.float32 and can_serve(model) and not is_quantized(model)
        if is_exact and len(self.paths) == 1:
            return merge_adapter(model, self.paths[0], self.lora_alpha)
        named = dict(zip(adapter_names(self.paths), self.paths, strict=True))
        add_adapters(model, named, self.lora_alpha)
        return model

    def read(self, model: PreTrainedModel, weight_of: Callable[[str], torch.Tensor]) -> Adapter:
        """
        Return the adapter to merge into shards of a model; without one, an adapter on no layer.

        Args:
            model: whole and empty.
            weight_of: see `read_adapter`.

        Raises:
            UsageError: see `read_adapter`; or there are several adapters.
        """
        if len(self.paths) > 1:
            raise UsageError("several adapters on a sharded model are not supported: give one, or --tp_size 1")
        if not self.paths:
            return Adapter({}, {})
        return read_adapter(self.paths[0], model, self.lora_alpha, weight_of)
