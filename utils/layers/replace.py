"""
Replace stock layers of a model by ours.

In: a model, and a function that builds the layer to stand in for a stock one. Out: the same model, each new layer set
into its parent, with the stock layer's own tensors. Called by the other modules of this room and by utils/training.
A library's class is never changed on an instance: whoever prints the model reads which forward runs.
"""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)


def replace_layers(
    model: nn.Module, build: Callable[[str, nn.Module], nn.Module | None], parent_path: str = ""
) -> None:
    """
    Replace every submodule for which `build` returns a layer, in place.

    Stock layers are released one by one, so that never two copies of all weights are in memory. The submodules of a
    new layer are not visited, and `model` itself has no parent to be replaced in.

    Args:
        build: called with a submodule's path and the submodule; None keeps it and visits its own submodules.
        parent_path: the path of `model` with a final dot, or "" for a whole model.
    """
    for name, child in list(model.named_children()):
        path = f"{parent_path}{name}"
        layer = build(path, child)
        if layer is not None:
            setattr(model, name, layer)
        else:
            replace_layers(child, build, f"{path}.")


@cache
def subclass_with(methods: type, stock: type[nn.Module]) -> type[nn.Module]:
    """
    Return a subclass of `stock` with the methods of `methods`, and its name.

    For stock layers that several architectures define alike, under a class each.
    """
    return type(methods.__name__, (methods, stock), {"__doc__": methods.__doc__})


def share_state(stock: nn.Module, layer_class: type[Layer]) -> Layer:
    """
    Return a `layer_class` with the tensors, submodules and attributes of `stock`; nothing is copied.

    The new layer has all that other libraries look at: `training`, hooks, `config`, `layer_idx`, `scaling`,
    `is_causal` and what the next release of transformers adds. A later change of its submodules leaves `stock` as it
    is.
    """
    layer = layer_class.__new__(layer_class)  # `layer_class.__init__` would allocate weights
    for name, value in vars(stock).items():
        vars(layer)[name] = value.copy() if isinstance(value, dict) else value
    return layer
