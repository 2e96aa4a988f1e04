"""The config that describes a cut model to stock transformers."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from regrow.checkpoint.biases import with_biases
from regrow.checkpoint.empty import parameter_names
from regrow.errors import InputError
from regrow.structure.biases import add_missing_biases, bias_names
from regrow.structure.groups import Groups

HEAD_KEYS = ("num_attention_heads", "num_key_value_heads")
FFN_KEYS = (
    "intermediate_size",
    "intermediate_size_mlp",
    "ffn_dim",
    "ffn_hidden_size",
    "n_inner",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "moe_shared_expert_intermediate_size",
)
"""Under which names configs keep an FFN's width; which of them a group's is, its number of channels tells."""

EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Under which names they keep the number of experts."""

HIDDEN_KEYS = ("hidden_size", "word_embed_proj_dim")
"""Under which names configs keep the hidden size."""

WITHOUT = {
    "mistral": ("attention_bias", "mlp_bias", "pretraining_tp"),
    "granite": ("pretraining_tp", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
    "llama": ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
}
"""A model type under whose name another may be saved -> keys of the other that it does not know."""


def pruned_config(config: PretrainedConfig, original: Groups, now: Groups) -> PretrainedConfig:
    """The config of a cut model: of a stock class if all layers have the same widths, else with `per_layer_config`.

    Of a model that also sees or hears it is the part for text that changes. With heads or hidden channels removed
    `head_dim` is written out. Where another class computes the same and loads in more places, the config is of that
    class:

    * A LLaMA whose number of heads no longer divides its hidden size, or whose layers differ, is described as a
      Mistral: LLaMA's config class refuses both. One with biases, which Mistral has not, as a Granite whose multipliers
      change nothing.
    * A Qwen2 with fewer heads, or of another hidden size, is described as a LLaMA with biases on q, k and v, and a zero
      one on o (`describe` adds it): vLLM and llama.cpp take the size of a Qwen2's heads to be `hidden_size / heads`.
      As a Granite, where its number of heads does not divide its hidden size.

    Raises:
        InputError: if no class takes these widths.
    """
    widths = layer_widths(config, original, now)
    changed = _changed(config, widths)
    text = config.get_text_config()
    described = text.to_dict()
    heads_cut = any(g.kind == "attention" and g.units < original.by_name(g.name).units for g in now)
    hidden = _hidden_size(config, original, now)
    narrower = hidden != text.hidden_size
    if narrower:
        described |= {key: hidden for key in _hidden_keys(config)}
    computed = isinstance(vars(type(text)).get("head_dim"), property)
    if (heads_cut or narrower) and described.get("head_dim") is None and not computed:
        described["head_dim"] = head_dimension(config, original)
    even = is_even(changed)
    if even:
        for layer in changed:
            described |= layer
    else:
        described["per_layer_config"] = {
            str(number): _heads(config, text.to_dict()) | layer for number, layer in enumerate(widths)
        }
    key = _native(config, "num_attention_heads")
    divides = all(hidden % layer[key] == 0 for layer in widths if key in layer)
    if config.model_type == "llama" and not (even and divides):
        if described["attention_bias"] or described["mlp_bias"]:
            described = _as_granite(described, head_dimension(config, original))
        else:
            described = _as_type("mistral", described) | {"sliding_window": None}
    elif config.model_type == "qwen2" and even and (heads_cut or narrower) and _sees_everything(config):
        described |= {"attention_bias": True, "mlp_bias": False}
        size = head_dimension(config, original)
        described = _as_type("llama", described) if divides else _as_granite(described, size)
    if text is not config:
        part = next(key for key, value in vars(config).items() if value is text)
        described = {**config.to_dict(), part: described}
    described.pop("transformers_version", None)
    return AutoConfig.for_model(**described)


def _as_type(model_type: str, described: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in described.items() if key not in WITHOUT[model_type]}
    return kept | {"model_type": model_type, "architectures": None}


def _as_granite(described: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """As a Granite whose multipliers change nothing; all but that of attention scores are 1 by default."""
    return _as_type("granite", described) | {"attention_multiplier": head_dim**-0.5}


def _sees_everything(config: PretrainedConfig) -> bool:
    """Whether no layer looks through a sliding window."""
    return set(config.layer_types) == {"full_attention"}


def describe(model: PreTrainedModel, original: Groups, now: Groups) -> None:
    """Give a cut and merged model the config that describes it, and biases of zero where that config's class has some.

    Where compensation has added biases, the config says so, and they count among those that the class has.

    Raises:
        InputError: if no class takes these widths.
    """
    added = bias_names(model) - parameter_names(model.config)
    whole = with_biases(model.config, [name.removesuffix(".bias") for name in added])
    config = pruned_config(whole, original, now)
    # Uneven layers have no stock model to compare with.
    even = is_even(_changed(model.config, layer_widths(model.config, original, now)))
    if added or (even and config.model_type != model.config.model_type):
        add_missing_biases(model, parameter_names(config if even else whole))
    model.config = config


def zero_biases(config: PretrainedConfig, groups: Groups) -> dict[str, int]:
    """Those that `describe` may add, a Qwen2's should it be saved as a LLaMA, and how long each is."""
    if config.model_type != "qwen2" or not _sees_everything(config):
        return {}
    return {f"{group.consumers[0].module}.bias": config.hidden_size for group in groups if group.kind == "attention"}


def is_even(widths: Sequence[dict[str, int]]) -> bool:
    """Whether one config tells all layers' widths; a dense layer's is under another key than one of experts."""
    seen: dict[str, int] = {}
    return all(seen.setdefault(key, width) == width for layer in widths for key, width in layer.items())


def layer_widths(config: PretrainedConfig, original: Groups, now: Groups) -> list[dict[str, int]]:
    """Heads, KV heads, FFN width and experts of every layer that a cut model has, under the config's own keys.

    Of each layer what it has groups of: in some models only some layers have attention.

    Raises:
        InputError: if the config has no key for a width that has changed.
    """
    described = _of_each_layer(config)
    assert len(described) == len(now.layers), "the cut keeps the config's depth true"
    layers: dict[int, dict[str, int]] = {layer.number: {} for layer in now.layers}
    told = dict(zip(layers, described, strict=True))
    for group in now:
        layer, before, units = layers[group.layer], told[group.layer], original.by_name(group.name).units
        if group.kind == "attention":
            layer |= {key: count * group.units // units for key, count in _heads(config, before).items()}
        elif group.kind == "expert":
            layer |= {key: group.units for key in EXPERT_KEYS if before.get(key) == units}
        elif (key := _ffn_key(before, units, group.expert is not None)) is not None:
            layer[key] = group.units
        elif group.units != units:
            raise InputError(f"the config of a {config.model_type!r} model has no key for the width of its FFN")
    return list(layers.values())


def _of_each_layer(config: PretrainedConfig) -> list[dict[str, Any]]:
    """What the config says of each layer: mostly the same, but Gemma 4's has keys of some layers' own."""
    text = config.get_text_config()
    if not text.is_heterogeneous:
        return [text.to_dict()] * text.num_hidden_layers
    return [text.per_layer_config[number].to_dict() for number in range(text.num_hidden_layers)]


def _changed(config: PretrainedConfig, widths: Sequence[dict[str, int]]) -> list[dict[str, int]]:
    """The widths under keys that some layer has not as the config says."""
    pairs = list(zip(_of_each_layer(config), widths, strict=True))
    keys = {key for before, layer in pairs for key, width in layer.items() if before[key] != width}
    return [{key: width for key, width in layer.items() if key in keys} for layer in widths]


def _heads(config: PretrainedConfig, described: Mapping[str, Any]) -> dict[str, int]:
    """Query and KV heads under the config's own keys, as it describes a layer."""
    keys = (_native(config, key) for key in HEAD_KEYS)
    return {key: described[key] for key in keys if isinstance(described.get(key), int)}


def _native(config: PretrainedConfig, key: str) -> str:
    """What a config calls one of transformers' common keys: `n_head`, `num_attention_heads`."""
    return config.get_text_config().attribute_map.get(key, key)


def _ffn_key(described: Mapping[str, Any], units: int, of_experts: bool) -> str | None:
    named = [key for key in FFN_KEYS if described.get(key) == units]
    named.sort(key=lambda key: key.startswith("moe_") != of_experts)
    unset = [key for key in FFN_KEYS if key in described and described[key] is None]  # GPT-2's: a default
    return next(iter(named + unset), None)


def _hidden_size(config: PretrainedConfig, original: Groups, now: Groups) -> int:
    size: int = config.get_text_config().hidden_size
    if original.residual is None or now.residual is None:
        return size
    return size * now.residual.units // original.residual.units


def _hidden_keys(config: PretrainedConfig) -> list[str]:
    """The config's own keys that say how wide the residual stream is."""
    size, described = config.get_text_config().hidden_size, config.get_text_config().to_dict()
    return [key for key in (_native(config, key) for key in HIDDEN_KEYS) if described.get(key) == size]


def head_dimension(config: PretrainedConfig, groups: Groups) -> int:
    """Size of a head, read off the graph: columns of o_proj per unit over query heads per unit."""
    group = next(group for group in groups if group.kind == "attention")
    queries: int = config.get_text_config().num_attention_heads // group.units
    return int(group.consumers[0].index.shape[1] // queries)
