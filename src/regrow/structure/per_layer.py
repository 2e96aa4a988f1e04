"""One decoder layer after another: which are alike, and what a config says of each."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from regrow.structure.quantised import weight_shape

BEFORE_EXPERTS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""Keys that say how many layers come before the first one of experts."""


def distinct_layers(layers: Iterable[nn.Module]) -> list[list[int]]:
    """Layer numbers, grouped by the layers' type, parameter shapes and switches; the first of each stands for it."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for number, layer in enumerate(layers):
        shapes = tuple((name, tuple(weight_shape(p))) for name, p in layer.named_parameters())
        switches = tuple(
            (name, key, value)
            for name, module in layer.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, bool) and key != "training"
        )
        alike[type(layer), shapes, switches].append(number)
    return list(alike.values())


def per_layer_lists(config: PretrainedConfig) -> dict[str, Sequence[object]]:
    """The config's lists that have one entry for each decoder layer (`layer_types`, `no_rope_layers`, …)."""
    count = config.num_hidden_layers
    return {
        key: value
        for key, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == count and not key.endswith("token_id")
    }


def rearrange(config: PretrainedConfig, positions: Sequence[int]) -> None:
    """Let the config describe the layers at these positions, one after another."""
    own = {int(number): keys for number, keys in config.to_dict().get("per_layer_config", {}).items()}
    config.per_layer_config = None
    for key, value in per_layer_lists(config).items():
        setattr(config, key, type(value)([value[position] for position in positions]))  # type: ignore[call-arg]
    for key in BEFORE_EXPERTS:
        if vars(config).get(key):
            setattr(config, key, sum(position < vars(config)[key] for position in positions))
    config.num_hidden_layers = len(positions)
    config.per_layer_config = {new: own[old] for new, old in enumerate(positions) if old in own} or None


def needs_own_class(config: PretrainedConfig) -> bool:
    """Whether layers have widths of their own that the stock class takes no notice of; Gemma 4's reads some."""
    return config.is_heterogeneous and not type(config)().is_heterogeneous
