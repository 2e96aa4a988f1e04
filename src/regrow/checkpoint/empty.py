"""The stock model of a config, without weights."""

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


def build_empty(config: PretrainedConfig) -> PreTrainedModel:
    """The stock model of a config, on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def parameter_names(config: PretrainedConfig) -> frozenset[str]:
    """Of the parameters of the stock model of a config."""
    return frozenset(name for name, _ in build_empty(config).named_parameters())
