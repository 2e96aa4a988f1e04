"""Biases of zero, for linears that have none yet."""

import torch
from torch import nn
from transformers import PreTrainedModel

from regrow.structure.adapters import linear_shape


def add_bias(model: PreTrainedModel, linear: str) -> None:
    """Give a linear, by the dotted name of the module that holds its weight, a frozen bias of zero if it has none."""
    module = model.get_submodule(linear)
    if module.bias is None:
        weight = module.get_parameter("weight")
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        zeros = torch.zeros(linear_shape(module)[0], dtype=dtype, device=weight.device)
        module.bias = nn.Parameter(zeros, requires_grad=False)


def bias_names(model: PreTrainedModel) -> frozenset[str]:
    """Names of the biases that a model has, whatever their modules are wrapped in."""
    names = (name for name, _ in model.named_parameters() if name.endswith(".bias"))
    return frozenset(name.replace(".base_layer.", ".") for name in names)


def add_missing_biases(model: PreTrainedModel, parameters: frozenset[str]) -> None:
    """Biases of zero for those names that a model's class has and the model has not."""
    for name in sorted(parameters - dict(model.named_parameters()).keys()):
        linear, _, last = name.rpartition(".")
        assert last == "bias", f"the class has {name}, the model has not"
        add_bias(model, linear)
