"""`load_tokenizer` and `load_model`: a member of the ChatGLM family from a directory or a hub id."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import offload_weight, save_offload_index, set_module_tensor_to_device
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel

from utils.checkpoint.directory import open_directory
from utils.checkpoint.weight_files import find_unusable, model_files, read_weights, weight_files
from utils.common.errors import UsageError
from utils.common.file_hashes import hash_files
from utils.layers.quantization import BITS, SCALE, Quantization, quantize, quantize_modules
from utils.models.architectures import Architecture, architecture_of
from utils.models.family import Generation
from utils.models.modeling_chatglm import derive_position_ids


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose generation is known."""

    directory: Path
    generation: Generation
    config: PretrainedConfig
    quantization: Quantization | None = None
    quantizes: bool = False  # the files hold full weights, which are quantised as they are read

    @classmethod
    def open(cls, path_or_id: str, weights: bool = True, quantize: str | None = None) -> "Checkpoint":
        """
        Args:
            weights: whether the weights are needed, or the tokenizer alone.
            quantize: "int8" or "int4" for a checkpoint in full precision; a quantised one says so itself.

        Raises:
            UsageError: see `open_directory`; values under which the model is another one; or it is quantised
                already, to other bits.
        """
        directory, generation, released = open_directory(path_or_id, weights)
        try:
            config = architecture_of(generation).make_config(released)
            stored = Quantization.of(released)
        except (LookupError, ArithmeticError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"{directory / 'config.json'} is no {generation.name}: {reason}") from None
        if weights:
            weight_files(directory)
        if stored and quantize and BITS[quantize] != stored.bits:
            raise UsageError(f"--quantize {quantize}: {directory} is quantised to {stored.bits} bits already")
        wanted = Quantization(BITS[quantize]) if quantize else None
        return cls(directory, generation, config, stored or wanted, quantizes=bool(wanted and not stored))

    @property
    def architecture(self) -> Architecture:
        """The model class of its generation, its configuration and key map."""
        return architecture_of(self.generation)

    def row_positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(1, T) int64 tokens of one row -> its position_ids: (1, 2, T) for ChatGLM-6B, (1, T) for the others."""
        if self.architecture.has_prefix:
            return derive_position_ids(input_ids, None, self.config)
        return torch.arange(input_ids.shape[1])[None]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """
        Every weight under the name that the model class gives it, mapped from its file, or quantised from there.

        Raises:
            UsageError: a weight that the generation does not have, or of a shape that cannot be split.
        """
        for key, tensor in self._named_weights():
            module, _, kind = key.rpartition(".")
            if self.quantizes and kind == "weight" and module.rpartition(".")[2] in self.generation.linear_layers:
                integers, scale = quantize(tensor, self.quantization.bits)
                yield key, integers
                yield f"{module}.{SCALE}", scale
            else:
                yield key, tensor

    def _named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for key, tensor in read_weights(self.directory):
            if ".prefix_encoder." in key:
                raise UsageError(
                    f"{self.directory}: {key} is a P-tuning prefix, which is not supported: pass the base model, and "
                    "train a LoRA adapter on it"
                )
            if self.architecture.convert is None:
                yield key, tensor
                continue
            try:
                yield from self.architecture.convert(key, tensor, self.config).items()
            except KeyError:
                raise UsageError(f"{self.directory}: {key} is no weight of {self.generation.name}") from None
            except RuntimeError:
                raise UsageError(f"{self.directory}: {key} cannot have the shape {tuple(tensor.shape)}") from None

    def fingerprint(self) -> dict[str, Any]:
        """
        What tells its weights from others', whatever kind of file holds them: a hash of the norms, which quantising
        leaves alone, and one of the ends of every matrix in the blocks. Reads little of the files.
        """
        hashes = {"norms": {}, "matrices": {}}
        for key, tensor in self._named_weights():
            if tensor.ndim == 1 and "norm" in key:
                hashes["norms"][key] = _digest(tensor)
            elif tensor.ndim == 2 and tensor.numel() and "layers." in key:
                hashes["matrices"][key] = _digest(torch.cat((tensor[0, :256], tensor[-1, -256:])))
        bits = self.quantization.bits if self.quantization and not self.quantizes else None
        return {"bits": bits} | {name: _digest_of(found) for name, found in hashes.items()}

    def content_hashes(self) -> dict[str, str]:
        """
        What tells its answers from others': hashes of every byte of the weights, and of the files that say how they
        and the tokens are used. The fingerprint above says which base an adapter fits, which is less: two models of
        one fingerprint may answer differently.
        """
        files = {"weights": weight_files(self.directory), "model_files": model_files(self.directory)}
        return {name: hash_files(paths) for name, paths in files.items()}

    def empty_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model without memory for its weights, in eval mode."""
        with init_empty_weights():
            model = self.architecture.model_class(self.config)
            if self.quantization:
                quantize_modules(model, self.quantization, self.generation.linear_layers)
        model.to(dtype)  # an offloaded weight is brought back in the dtype of its place holder
        model.tie_weights()
        model.config._name_or_path = model.name_or_path = str(self.directory)
        return model.eval()

    def fill(self, model: PreTrainedModel, device_map: dict, offload_folder: str | None = None) -> None:
        """
        Moves each weight from its file to its device, or to a file of its own in `offload_folder`.

        Args:
            model: what `empty_model` made.
            device_map: module -> device or "disk", as accelerate's `infer_auto_device_map` makes it.

        Raises:
            UsageError: see `weights`; or weights are missing, too many or of another shape.
        """
        expected = ExpectedWeights(model, f"{self.directory}", self.generation.name)
        buffers = {name for name, _ in model.named_buffers()}
        offload_index: dict[str, dict] = {}
        for key, tensor in self.weights():
            if not expected.take(key, tensor):
                continue
            device = next(device_map[name] for name in _enclosing(key) if name in device_map)
            if device == "disk" and key not in buffers:
                for name in (key, *expected.copies_of(key)):
                    value = tensor.to(expected.tensors[key].dtype)
                    offload_index = offload_weight(value, name, offload_folder, index=offload_index)
            else:  # accelerate leaves the buffers of an offloaded module in memory
                set_module_tensor_to_device(model, key, "cpu" if device == "disk" else device, value=tensor)
        expected.check_complete()
        if offload_index:
            save_offload_index(offload_index, offload_folder)
        model.tie_weights()


class ExpectedWeights:
    """
    The weights that a model takes, ticked off as they come from files: before memory is taken for one, its name, its
    shape and its values are known to be right.
    """

    def __init__(self, model: PreTrainedModel, source: str, name: str):
        self.tensors = model.state_dict()
        self.source, self.name = source, name
        self._tied = {source: target for target, source in model.all_tied_weights_keys.items()}
        self._ignored = model._keys_to_ignore_on_load_unexpected or ()
        self._missing = set(self.tensors) - set(self._tied.values())

    def copies_of(self, key: str) -> list[str]:
        return [self._tied[key]] if key in self._tied else []

    def take(self, key: str, tensor: torch.Tensor) -> bool:
        """
        Whether the model needs it; a tied copy gives way to its source.

        Raises:
            UsageError: it belongs to another model, or its values cannot be used.
        """
        if key in self._tied.values() or any(re.search(pattern, key) for pattern in self._ignored):
            return False
        if key not in self._missing:
            raise UsageError(f"{self.source}: {key} is no weight of {self.name}, which its config.json describes")
        expected = self.tensors[key]
        if tensor.shape != expected.shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(expected.shape)} as its config.json says"
            raise UsageError(f"{self.source}: {key} has the shape {shapes}")
        fault = find_unusable(tensor, expected.dtype)
        if fault:
            raise UsageError(f"{self.source}: {key} {fault}")
        self._missing.remove(key)
        return True

    def check_complete(self) -> None:
        """
        Raises:
            UsageError: a weight has not come.
        """
        if self._missing:
            raise UsageError(f"{self.source}: {len(self._missing)} weights are missing, first {min(self._missing)}")


def _digest(tensor: torch.Tensor) -> str:
    values = tensor if tensor.dtype == torch.int8 else tensor.float()  # float32 holds the others exactly
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def _digest_of(hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()[:16]


def _enclosing(key: str) -> Iterator[str]:
    """a.b.c -> a.b.c, a.b, a, and the whole model, which goes by the empty name."""
    while key:
        yield key
        key = key.rpartition(".")[0]
    yield ""


def load_model(path_or_id: str, dtype: torch.dtype = torch.float32, quantize: str | None = None) -> PreTrainedModel:
    """
    The model of a checkpoint (`.bin`, read with weights_only, or safetensors; sharded or not), on the CPU and in eval
    mode, its weights in `dtype`. Under DeepSpeed ZeRO-3 each rank holds its partition.

    ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B become `GlmForCausalLM`. A quantised checkpoint keeps its integers; with
    `quantize`, "int8" or "int4", one in full precision gets them, weight by weight as it is read. Both compute in
    `dtype` with the rounding of the released GPU kernels (utils/layers/quantization.py).

    Raises:
        UsageError: see `Checkpoint.open`; or the checkpoint lacks a file or a weight, or has a weight too many or of
            another shape.
    """
    checkpoint = Checkpoint.open(path_or_id, quantize=quantize)
    if checkpoint.quantization:
        model = checkpoint.empty_model(dtype)
        checkpoint.fill(model, {"": "cpu"})
        return model
    directory, generation = checkpoint.directory, checkpoint.generation
    expected = ExpectedWeights(checkpoint.empty_model(dtype), str(directory), generation.name)
    for key, tensor in checkpoint.weights():
        expected.take(key, tensor)
    expected.check_complete()
    # The weights are handed over, not looked for again: what was checked above is what is loaded.
    model = checkpoint.architecture.model_class.from_pretrained(
        None, config=checkpoint.config, state_dict=dict(checkpoint.weights()), dtype=dtype
    )
    model.config._name_or_path = model.name_or_path = str(directory)
    return model.eval()
