"""Layers that stand in for stock ones: what they take over, and how they get into their parents."""

import torch
from torch import nn

from utils.layers.replace import replace_layers, share_state


class Doubled(nn.Linear):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


def test_a_layer_takes_over_all_that_a_stock_one_has():
    stock = nn.Linear(3, 4).eval()
    stock.layer_idx = 5
    seen = []
    stock.register_forward_hook(lambda module, inputs, output: seen.append(module))
    layer = share_state(stock, Doubled)
    assert layer.weight is stock.weight and layer.bias is stock.bias
    assert not layer.training and layer.layer_idx == 5 and layer.out_features == 4
    inputs = torch.randn(2, 3)
    assert torch.equal(layer(inputs), 2 * stock(inputs)) and seen == [layer, stock]


def test_changes_of_a_layer_leave_the_stock_one_as_it_is():
    stock = nn.Sequential(nn.Linear(2, 2))
    layer = share_state(stock, nn.Sequential)
    del layer[0]
    layer.register_buffer("scale", torch.ones(1))
    assert len(stock) == 1 and len(layer) == 0 and not list(stock.buffers())


def test_layers_are_replaced_by_path():
    model = nn.ModuleDict({"a": nn.ModuleDict({"x": nn.Linear(2, 2), "y": nn.Linear(2, 2)}), "b": nn.Linear(2, 2)})
    names, parameters = list(model.state_dict()), list(model.parameters())
    paths = []

    def build(path, child):
        paths.append(path)
        return share_state(child, Doubled) if path in ("a.y", "b") else None

    replace_layers(model, build)
    assert paths == ["a", "a.x", "a.y", "b"]
    kinds = {path: type(module) for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert kinds == {"a.x": nn.Linear, "a.y": Doubled, "b": Doubled}
    assert list(model.state_dict()) == names
    assert all(after is before for after, before in zip(model.parameters(), parameters, strict=True))


def test_what_is_inside_a_new_layer_is_not_replaced_again():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    replace_layers(model, lambda path, child: nn.Sequential(child) if isinstance(child, nn.Sequential) else None)
    assert type(model[0][0]) is nn.Sequential and type(model[0][0][0]) is nn.Linear
