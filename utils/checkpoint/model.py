"""
`Checkpoint` and `load_model`: a directory or hub id -> a model of the family, its weights checked one by one.

A run opens a checkpoint once, with `Checkpoint.open`, and passes the object on: it loads the model and the tokenizer,
names the base that an adapter fits (`fingerprint`), and fills a model that is spread over devices (`fill`).
transformers' own loading is not used for the check, since it takes memory for weights before it compares them.
"""

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import offload_weight, save_offload_index
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import local_torch_dtype

from utils.checkpoint.directory import OpenedDirectory, open_directory
from utils.checkpoint.expected_weights import ExpectedWeights
from utils.checkpoint.tokenizer import tokenizer_in
from utils.checkpoint.weight_files import find_unusable, model_files, read_weights, weight_files
from utils.checkpoint.zero3 import build_partitioned, set_partition
from utils.common.errors import UsageError
from utils.common.file_hashes import hash_files
from utils.layers.quantization import BITS, SCALE, Quantization, quantize, quantize_modules
from utils.models.architectures import Architecture, architecture_of
from utils.models.family import Generation
from utils.models.modeling_chatglm import derive_position_ids


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its files, their generation and configuration, how weights are quantised."""

    directory: Path
    generation: Generation
    config: PretrainedConfig
    quantization: Quantization | None = None
    quantizes: bool = False  # the files hold full weights, which are quantised as they are read
    released_config: dict[str, Any] = field(default_factory=dict, compare=False)  # config.json as data

    @classmethod
    def open(cls, path_or_id: str, weights: bool = True, quantize: str | None = None) -> "Checkpoint":
        """
        Open a directory, or download a hub repository, without reading weights.

        Args:
            weights: whether the weights are needed, or only the tokenizer.
            quantize: "int8" or "int4" to quantise a checkpoint in full precision; a quantised one says so itself.

        Raises:
            UsageError: see `open_directory` and `weight_files`; config.json describes another model; or the
                checkpoint is quantised already, to other bits.
        """
        directory, generation, released = open_directory(path_or_id, weights)
        try:
            config = architecture_of(generation).make_config(released)
            stored = Quantization.of(released)
        except (LookupError, ArithmeticError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"{directory / 'config.json'} does not describe {generation.name}: {reason}") from None
        if weights:
            weight_files(directory)
        if stored and quantize and BITS[quantize] != stored.bits:
            raise UsageError(f"--quantize {quantize}: {directory} is quantised to {stored.bits} bits already")
        wanted = Quantization(BITS[quantize]) if quantize else None
        return cls(
            directory,
            generation,
            config,
            quantization=stored or wanted,
            quantizes=wanted is not None and stored is None,
            released_config=released,
        )

    @property
    def architecture(self) -> Architecture:
        """The model class of its generation, its configuration and key map."""
        return architecture_of(self.generation)

    def row_positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids (1, T) int64 -> position_ids: (1, 2, T) for ChatGLM-6B, else (1, T)."""
        if self.architecture.has_prefix:
            return derive_position_ids(input_ids, None, self.config)
        return torch.arange(input_ids.shape[1])[None]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """
        Every weight with its name in the model class, mapped or quantised.

        Raises:
            UsageError: see `read_weights`; a weight that the generation does not have, or of a shape that cannot be
                split.
        """
        for key, tensor in self._named_weights():
            module, _, kind = key.rpartition(".")
            if self.quantizes and kind == "weight" and module.rpartition(".")[2] in self.generation.linear_layers:
                integers, scale = quantize(tensor, self.quantization.bits)
                yield key, integers
                yield f"{module}.{SCALE}", scale
            else:  # copied, as a norm that stays mapped would keep the pages of full weights in memory
                yield key, tensor.clone() if self.quantizes else tensor

    def weight(self, key: str) -> torch.Tensor:
        """
        One weight by its name in the model class, mapped.

        Raises:
            UsageError: see `weights`; it is not in the files, or not finite.
        """
        tensor = next((tensor for name, tensor in self.weights() if name == key), None)
        fault = "is not in the files" if tensor is None else find_unusable(tensor, tensor.dtype)
        if fault:
            raise UsageError(f"{self.directory}: {key} {fault}")
        return tensor

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
                raise UsageError(f"{self.directory}: {key} is not a weight of {self.generation.name}") from None
            except RuntimeError:
                raise UsageError(f"{self.directory}: {key} cannot have the shape {tuple(tensor.shape)}") from None

    def fingerprint(self) -> dict[str, Any]:
        """
        Hashes that tell these weights from others', whatever kind of file holds them.

        One is of the norms, which quantising leaves alone, so an adapter trained on int4 fits the full checkpoint; one
        of the ends of every matrix in the blocks, so little of the files is read. Both are hashed as float32, which
        holds 16-bit values exactly. Adapters record the fingerprint of their base.
        """
        hashes = {"norms": {}, "matrices": {}}
        for key, tensor in self._named_weights():
            if tensor.ndim == 1 and "norm" in key:
                hashes["norms"][key] = _tensor_hash(tensor)
            elif tensor.ndim == 2 and tensor.numel() and "layers." in key:
                hashes["matrices"][key] = _tensor_hash(torch.cat((tensor[0, :256], tensor[-1, -256:])))
        bits = self.quantization.bits if self.quantization and not self.quantizes else None
        return {"bits": bits} | {name: _combined_hash(by_key) for name, by_key in hashes.items()}

    def content_hashes(self) -> dict[str, str]:
        """
        Hashes of every byte of the weights and of the files beside them.

        They tell these answers from others'; the files decide how weights and tokens are used. Two models with one
        fingerprint may answer differently.
        """
        files = {"weights": weight_files(self.directory), "model_files": model_files(self.directory)}
        return {name: hash_files(paths) for name, paths in files.items()}

    def empty_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model in eval mode, its weights on the meta device."""
        # Not by `model.to(dtype)`, which would round the rotary frequencies too.
        with init_empty_weights(), local_torch_dtype(dtype):
            model = self.architecture.model_class(copy.deepcopy(self.config))
            if self.quantization:
                quantize_modules(model, self.quantization, self.generation.linear_layers)
        return self._labelled(model, dtype)

    def _labelled(self, model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
        """The model as `from_pretrained` would leave it: tied, in eval mode, with its source and dtype."""
        model.tie_weights()
        model.config.dtype = dtype
        model.config._name_or_path = model.name_or_path = str(self.directory)
        return model.eval()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer; raises as `tokenizer_in`."""
        return tokenizer_in(OpenedDirectory(self.directory, self.generation, self.released_config))

    def load_model(self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> PreTrainedModel:
        """
        The model on `device`; see the function `load_model`.

        Raises:
            UsageError: see `weights`; or a weight is missing, of another model, of another shape or not finite.
        """
        model = self.empty_model(dtype)
        if self.quantization or not is_deepspeed_zero3_enabled():
            self.fill(model, {"": device})
            return model
        expected = self._expected_weights(model)  # before DeepSpeed takes memory for the sizes of config.json
        model = build_partitioned(self.architecture.model_class, copy.deepcopy(self.config), dtype)
        for key, tensor in self._needed_weights(expected):
            set_partition(model.get_parameter(key), tensor)
        return self._labelled(model, dtype)

    def checked_weights(self, model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
        """
        The weights that an empty model needs, each checked before it is yielded.

        Raises:
            UsageError: see `load_model`.
        """
        return self._needed_weights(self._expected_weights(model))

    def _expected_weights(self, model: PreTrainedModel) -> ExpectedWeights:
        """
        The weights of an empty model, the names and shapes in the files compared with them.

        Values are not read yet, so a fault costs no time.
        """
        expected = ExpectedWeights(model, f"{self.directory}", self.generation.name)
        if not self.quantizes:  # else their shapes are not those of the files
            for key, tensor in self.weights():
                expected.take_shape(key, tensor)
            expected.check_complete()
        return ExpectedWeights(model, f"{self.directory}", self.generation.name)

    def _needed_weights(self, expected: ExpectedWeights) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights that the model needs, each checked before it is yielded."""
        for key, tensor in self.weights():
            if expected.take(key, tensor):
                yield key, tensor
        expected.check_complete()

    def fill(self, model: PreTrainedModel, device_map: dict, offload_folder: str | None = None) -> None:
        """
        Move each weight from its file to its device or offload file.

        It is made of the parts of `accelerate.load_checkpoint_and_dispatch`, which reads no checkpoint whose weights
        have other names than the model's, and does not say when one is missing.

        Args:
            model: an `empty_model` of this checkpoint.
            device_map: module -> device or "disk", as accelerate's `infer_auto_device_map` makes it.

        Raises:
            UsageError: see `weights` and `ExpectedWeights`.
        """
        expected = self._expected_weights(model)
        buffers = {name for name, _ in model.named_buffers()}
        offload_index: dict[str, dict] = {}
        for key, tensor in self._needed_weights(expected):
            device = next(device_map[name] for name in _enclosing(key) if name in device_map)
            if device == "disk" and key not in buffers:
                for name in (key, *expected.copies_of(key)):
                    value = tensor.to(expected.tensors[key].dtype)
                    offload_index = offload_weight(value, name, offload_folder, index=offload_index)
            else:  # accelerate leaves the buffers of an offloaded module in memory
                set_tensor(model, key, tensor, "cpu" if device == "disk" else device)
        if offload_index:
            save_offload_index(offload_index, offload_folder)
        model.tie_weights()


def set_tensor(model: PreTrainedModel, key: str, tensor: torch.Tensor, device: int | str | torch.device) -> None:
    """Put a weight or buffer of `model` on `device`, in the dtype that it has in the model."""
    name, _, kind = key.rpartition(".")
    module = model.get_submodule(name)
    placeholder = getattr(module, kind)
    value = tensor.to(device).to(placeholder.dtype)  # in this order the host needs no copy in another dtype
    if isinstance(placeholder, torch.nn.Parameter):
        value = torch.nn.Parameter(value, requires_grad=placeholder.requires_grad)
    setattr(module, kind, value)


def _tensor_hash(tensor: torch.Tensor) -> str:
    values = tensor if tensor.dtype == torch.int8 else tensor.float()  # float32 holds the others exactly
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def _combined_hash(hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()[:16]


def _enclosing(key: str) -> Iterator[str]:
    """The modules around a weight: a.b.c -> a.b.c, a.b, a and "", the model."""
    while key:
        yield key
        key = key.rpartition(".")[0]
    yield ""


def load_model(
    path_or_id: str,
    dtype: torch.dtype = torch.float32,
    quantize: str | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """
    The model of a checkpoint, in eval mode, in `dtype`.

    Under DeepSpeed ZeRO-3 each rank holds its partition, and `device` is DeepSpeed's. ChatGLM2-6B, ChatGLM3-6B and
    GLM-4-9B become `GlmForCausalLM`. A quantised checkpoint keeps its integers; they compute in `dtype` with the
    rounding of the released GPU kernels (utils/layers/quantization.py).

    Args:
        path_or_id: a directory or hub id with `.bin` files, read with weights_only, or safetensors; sharded or not.
        quantize: "int8" or "int4" to quantise a checkpoint in full precision, weight by weight as it is read.
        device: where the weights go one by one.

    Raises:
        UsageError: see `Checkpoint.open` and `Checkpoint.load_model`.
    """
    return Checkpoint.open(path_or_id, quantize=quantize).load_model(dtype, device)
