"""The config that describes a cut model to stock transformers."""

from collections.abc import Sequence

from transformers import AutoConfig, PretrainedConfig

from regrow.errors import InputError
from regrow.structure.groups import Groups

WIDTH_KEYS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def check_expressible(config: PretrainedConfig) -> None:
    """Refuse, before any work is done, a family whose config cannot say how wide its layers are.

    Raises:
        InputError: if heads, KV heads and FFN width are not in the config under their usual names.
    """
    missing = [key for key in WIDTH_KEYS if key not in config.get_text_config().to_dict()]
    if missing:
        raise InputError(
            f"models of type {config.model_type!r} cannot be saved with fewer heads and channels: "
            f"their config has no {', '.join(missing)}"
        )


def pruned_config(config: PretrainedConfig, original: Groups, now: Groups) -> PretrainedConfig:
    """The config of a cut model: of a stock class if all layers have the same widths, else with `per_layer_config`.

    `head_dim` is always written out. A LLaMA whose number of heads no longer divides its hidden size, or whose
    layers differ, is described as the Mistral that computes the same: LLaMA's config class refuses both.

    Raises:
        InputError: if no class takes these widths.
    """
    widths = layer_widths(config, original, now)
    described = {**config.to_dict(), "head_dim": head_dimension(config, original)}
    if is_even(widths):
        described |= widths[0]
    else:
        described["per_layer_config"] = {str(number): layer for number, layer in enumerate(widths)}
    heads = {layer["num_attention_heads"] for layer in widths}
    refused = not is_even(widths) or any(described["hidden_size"] % count for count in heads)
    if config.model_type == "llama" and refused:
        if described["attention_bias"] or described["mlp_bias"]:
            raise InputError(
                f"a LLaMA with biases needs equal layers and a number of heads that divides "
                f"{described['hidden_size']}, not {sorted(heads)}; choose another sparsity"
            )
        described |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
        for key in ("attention_bias", "mlp_bias", "pretraining_tp"):
            del described[key]
    described.pop("transformers_version", None)
    return AutoConfig.for_model(**described)


def is_even(widths: Sequence[dict[str, int]]) -> bool:
    """Whether all layers have the same widths."""
    return all(layer == widths[0] for layer in widths)


def layer_widths(config: PretrainedConfig, original: Groups, now: Groups) -> list[dict[str, int]]:
    """Heads, KV heads and FFN width of every layer that a cut model has, under the config's own keys."""
    before = config.get_text_config().to_dict()
    assert before["num_hidden_layers"] == len(now.layers), "the cut keeps the config's depth true"
    layers = {layer.number: {key: int(before[key]) for key in WIDTH_KEYS} for layer in now.layers}
    for group in now:
        layer = layers[group.layer]
        if group.kind == "attention":
            share = before["num_key_value_heads"] // original.by_name(group.name).units
            layer["num_key_value_heads"] = group.units * share
            layer["num_attention_heads"] = (
                group.units * before["num_attention_heads"] // original.by_name(group.name).units
            )
        else:
            layer["intermediate_size"] = group.units
    return list(layers.values())


def head_dimension(config: PretrainedConfig, groups: Groups) -> int:
    """Size of a head, read off the graph: columns of o_proj per unit over query heads per unit."""
    group = next(group for group in groups if group.kind == "attention")
    queries: int = config.get_text_config().num_attention_heads // group.units
    return int(group.consumers[0].index.shape[1] // queries)
