"""Depth: taking whole decoder layers out of a model, and out of the config that describes it."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from regrow.errors import InputError
from regrow.structure.groups import Group, Groups, Layer
from regrow.structure.per_layer import per_layer_lists, rearrange
from regrow.structure.trace import decoder_layers

BY_POSITION = re.compile(
    r"pattern|interval|period|_every_n_|(sparse|layer)_step$|_layer_offset$"
    r"|mlp_only_layers|num_kv_shared_layers"
)
"""Keys that make what a layer is depend on its number."""
CARRIED_BY = {
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
}
"""Such a key -> the list, one entry per layer, that the models read in its stead when the config has it."""


def check_depth(config: PretrainedConfig) -> None:
    """Refuse, before any work is done, a model whose layers are no longer themselves under another number.

    Raises:
        InputError: if a key of the config gives layers a kind by their number and no list per layer carries it.
    """
    config = config.get_text_config()
    lists = per_layer_lists(config)
    for key, value in vars(config).items():
        fixed = not value or value == 1 or CARRIED_BY.get(key) in lists or key in lists
        if BY_POSITION.search(key) and not fixed:
            raise InputError(
                f"the layers of a {config.model_type!r} model depend on their numbers ({key} = {value!r}): none can be "
                "removed; take 'layer' out of pruning.kinds"
            )


def remove_layers(
    model: PreTrainedModel,
    groups: Groups,
    numbers: Collection[int],
    optimizer: torch.optim.Optimizer | None = None,
) -> Groups:
    """Take layers out of the model, in place: modules, config, and what an optimizer holds for them.

    Layers that stay move up: their modules' names and `layer_idx` change, their numbers in `groups` do not.

    Args:
        groups: the groups as they are now.
        numbers: the layers that go, by `Layer.number`.

    Returns:
        The groups of the model that is left.
    """
    path, modules = decoder_layers(model)
    stay = [position for position, layer in enumerate(groups.layers) if layer.number not in numbers]
    gone = [position for position in range(len(modules)) if position not in stay]
    assert stay, "at least one layer stays"
    if optimizer is not None:
        _forget(optimizer, [parameter for position in gone for parameter in modules[position].parameters()])
    for position in reversed(gone):
        del modules[position]
    for position, layer in enumerate(modules):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                module.layer_idx = position  # type: ignore[assignment]
    rearrange(model.config.get_text_config(), stay)

    left = tuple(layer for layer in groups.layers if layer.number not in numbers)
    removed = [layer for layer in groups.layers if layer.number in numbers]
    gone_names = tuple(f"{layer.name}." for layer in removed)
    moved = {layer.name: f"{path}.{position}" for position, layer in enumerate(left)}

    def rename(name: str) -> str:
        depth = path.count(".") + 2
        parts = name.split(".")
        return ".".join([moved[".".join(parts[:depth])], *parts[depth:]])

    return replace(
        groups,
        groups=tuple(
            replace(group, slices=tuple(replace(s, parameter=rename(s.parameter)) for s in group.slices))
            for group in groups
            if group.layer not in numbers
        ),
        layers=tuple(replace(layer, name=moved[layer.name]) for layer in left),
        linears=tuple(rename(name) for name in groups.linears if not name.startswith(gone_names)),
        experts={rename(name): chosen for name, chosen in groups.experts.items() if not name.startswith(gone_names)},
        opaque={rename(name): what for name, what in groups.opaque.items() if not name.startswith(gone_names)},
        residual=groups.residual and _without_layers(groups.residual, removed, rename),
        block_parameters=groups.block_parameters - sum(layer.block_parameters for layer in removed),
        total_parameters=groups.total_parameters - sum(layer.parameters for layer in removed),
    )


def _without_layers(residual: Group, removed: Sequence[Layer], rename: Callable[[str], str]) -> Group:
    """The residual stream's group once some layers are no longer along it."""
    gone = tuple(f"{layer.name}." for layer in removed)
    path = removed[0].name.rpartition(".")[0]

    def moved(name: str) -> str:
        return rename(name) if name.startswith(f"{path}.") else name

    return replace(
        residual,
        slices=tuple(
            replace(s, parameter=moved(s.parameter)) for s in residual.slices if not s.parameter.startswith(gone)
        ),
        bare_norms=tuple(moved(name) for name in residual.bare_norms if not name.startswith(gone)),
        cost=residual.cost - sum(layer.hidden for layer in removed),
    )


def _forget(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    gone = {id(parameter) for parameter in parameters}
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
