"""Biases that a model has not but its stock class can have: switches in the config, asked of the class itself.

FLAP's bias needs one on the consumers (o_proj, down_proj). A class has them for all linears of a kind or none, so that
the others' are zero. No family is named here: every key of the config that ends in `_bias` and is off is tried.
"""

import copy
from collections.abc import Collection

from transformers import PretrainedConfig, PreTrainedModel

from regrow.checkpoint.empty import build_empty, parameter_names
from regrow.errors import InputError
from regrow.structure.groups import Groups, Slice


def check_biases(model: PreTrainedModel, groups: Groups) -> None:
    """Refuse to compensate by biases alone where none can be.

    Raises:
        InputError: if no consumer has a bias, nor can have one in a model of this class.
    """
    consumers = lone_consumers(groups)
    has = any(model.get_submodule(c.parameter.rpartition(".")[0]).bias is not None for c in consumers)
    if not has and not possible_biases(model.config, groups):
        raise InputError(
            f"compensation.method=bias: the consumers of {type(model).__name__} have no bias to carry it, nor can they "
            "have one; use least-squares"
        )


def lone_consumers(groups: Groups) -> list[Slice]:
    """The linears that are the one consumer of a group; experts have none of their own."""
    return [group.consumers[0] for group in groups if len(group.consumers) == 1 and group.expert is None]


def possible_biases(config: PretrainedConfig, groups: Groups) -> frozenset[str]:
    """Names of the linears that would be given a bias, of those with one consumer in each group."""
    consumers = frozenset(consumer.module for consumer in lone_consumers(groups))
    return consumers & {name.removesuffix(".bias") for name in added_names(config, consumers)}


def added_biases(config: PretrainedConfig, groups: Groups) -> dict[str, int]:
    """Most biases that compensation adds to a checkpoint, those of zero included, and how long each is."""
    before, switched = parameter_names(config), build_empty(with_biases(config, possible_biases(config, groups)))
    return {name: p.numel() for name, p in switched.named_parameters() if name not in before}


def added_names(config: PretrainedConfig, linears: Collection[str]) -> frozenset[str]:
    """Names of all biases that a class adds once some linears have one."""
    return parameter_names(with_biases(config, linears)) - parameter_names(config)


def with_biases(config: PretrainedConfig, linears: Collection[str]) -> PretrainedConfig:
    """The config with the switches on that give some of these linears a bias."""
    before, wanted = parameter_names(config), {f"{name}.bias" for name in linears}
    found = copy.deepcopy(config)
    for key, value in config.get_text_config().to_dict().items():
        if key.endswith("_bias") and value is False:
            tried = copy.deepcopy(config)
            setattr(tried.get_text_config(), key, True)
            added = parameter_names(tried) - before
            if added & wanted and all(name.endswith(".bias") for name in added):
                setattr(found.get_text_config(), key, True)
    return found
