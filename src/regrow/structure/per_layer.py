"""What a config says of one decoder layer after another."""

from collections.abc import Sequence

from transformers import PretrainedConfig

BEFORE_EXPERTS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""Keys that say how many layers come before the first one of experts."""


def per_layer_lists(config: PretrainedConfig) -> dict[str, Sequence[object]]:
    """The config's lists that have one entry for each decoder layer (`layer_types`, `no_rope_layers`, …)."""
    count = config.num_hidden_layers
    return {
        key: value
        for key, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == count and not key.endswith("token_id")
    }


def reorder(config: PretrainedConfig, positions: Sequence[int]) -> None:
    """Let the config's lists have the entries of the layers at these positions."""
    for key, value in per_layer_lists(config).items():
        setattr(config, key, type(value)([value[position] for position in positions]))  # type: ignore[call-arg]


def shorten(config: PretrainedConfig, stay: Sequence[int]) -> None:
    """Let the config describe the layers at the positions `stay` only."""
    reorder(config, stay)
    for key in BEFORE_EXPERTS:
        if vars(config).get(key):
            setattr(config, key, sum(position < vars(config)[key] for position in stay))
    config.num_hidden_layers = len(stay)
