"""Widen layers with zeros, losslessly: uneven layers become equal ones, which a stock class loads.

    legend: K KV heads, R query heads per KV head, D head size, F FFN channels

A zero row of v_proj gives a zero value whatever the attention weights are, a zero column of o_proj or down_proj lets
nothing through: padding changes no logit but for the order in which a sum is taken.
"""

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from regrow.checkpoint.files import check_new, new_folder, write_json
from regrow.checkpoint.source import stored_form
from regrow.errors import InputError
from regrow.formats.source import LAYER, WIDTH_KEYS, Checkpoint, LayerWidths, copy_companions, layer_of

OUTPUT_AXES = {"q_proj": "queries", "k_proj": "keys", "v_proj": "keys", "gate_proj": "channels", "up_proj": "channels"}
"""Linears whose output axis is as wide as the layer, and which of its widths that is."""
INPUT_AXES = {"o_proj": "queries", "down_proj": "channels"}
"""Linears whose input axis is."""
SHARD_SIZE = "5GB"


def pad_checkpoint(source: Checkpoint, out: Path, multiple: int = 1) -> LayerWidths:
    """Write a checkpoint whose layers are all as wide as the widest, of a stock class, one shard in memory at a time.

    Args:
        out: a new or empty folder.
        multiple: the FFN width is rounded up to a multiple of this.

    Returns:
        The widths that every layer now has.

    Raises:
        InputError: if the folder is taken, or padding does not make the layers equal.
    """
    check_new(out)
    wide = widest(source.widths, multiple)
    outlines = {name: widen(name, source.outline(name), source, wide) for name in source.names}
    check_even(source.folder, outlines)
    described = even_config(source, wide)
    check_shapes(source.folder, described, outlines)
    plan = split_torch_state_dict_into_shards(outlines, max_shard_size=SHARD_SIZE)
    with new_folder(out) as partial:
        for shard, names in plan.filename_to_tensors.items():
            tensors = {name: widen(name, source.tensor(name), source, wide) for name in names}
            save_file(tensors, partial / shard, {"format": "pt"})
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            write_json(partial / "model.safetensors.index.json", index)
        write_json(partial / "config.json", described)
        copy_companions(source.folder, partial)
    return wide


def widest(widths: Sequence[LayerWidths], multiple: int = 1) -> LayerWidths:
    """The least widths that every layer fits in: KV heads, queries per KV head and channels each at their most.

    At least one of each, so that there is a layer to describe where a half is gone everywhere.

    Args:
        multiple: the number of channels is rounded up to a multiple of this.
    """
    kv_heads = max(1, *(layer.kv_heads for layer in widths))
    queries = max(1, *(layer.queries for layer in widths))
    channels = max(1, *(layer.channels for layer in widths))
    return LayerWidths(kv_heads * queries, kv_heads, -(-channels // multiple) * multiple)


def widen(name: str, tensor: Tensor, source: Checkpoint, wide: LayerWidths) -> Tensor:
    """A tensor of a layer with zeros added up to the widths `wide`; other tensors as they are.

    Args:
        name: the tensor's, in the checkpoint.
        tensor: weights or biases, on any device.

    Raises:
        InputError: if the tensor is not as wide as the config says, or an expert's that is not as wide as an FFN.
    """
    layer = layer_of(name)
    linear, _, kind = name.rpartition(".")
    linear = linear.rpartition(".")[2]
    if layer is not None and linear in OUTPUT_AXES:
        axis, which = 0, OUTPUT_AXES[linear]
    elif layer is not None and linear in INPUT_AXES and kind == "weight":
        axis, which = 1, INPUT_AXES[linear]
    else:
        return tensor
    before = _sizes(which, source.widths[layer], source.head_dim)
    after = _sizes(which, wide, source.head_dim)
    if tensor.shape[axis] != prod(before) and "expert" in name:
        raise InputError(
            f"{name} of {source.folder} cannot be padded with zeros: experts have a width of their own; a model pruned "
            "with pruning.shape=uniform needs no padding"
        )
    if tensor.shape[axis] != prod(before):
        raise InputError(f"{name} of {source.folder} is {list(tensor.shape)}, its config.json says {prod(before)}")
    filled = tensor.new_zeros(*tensor.shape[:axis], *after, *tensor.shape[axis + 1 :])
    filled[(slice(None),) * axis + tuple(slice(size) for size in before)] = tensor.reshape(
        *tensor.shape[:axis], *before, *tensor.shape[axis + 1 :]
    )
    return filled.flatten(axis, axis + len(after) - 1)


def _sizes(which: str, widths: LayerWidths, head_dim: int) -> tuple[int, ...]:
    """What an axis of a linear consists of: [K, R, D], [K, D] or [F]."""
    return {
        "queries": (widths.kv_heads, widths.queries, head_dim),
        "keys": (widths.kv_heads, head_dim),
        "channels": (widths.channels,),
    }[which]


def check_even(folder: Path, outlines: Mapping[str, Tensor]) -> None:
    """Refuse a model of which a padded tensor still differs between layers: it is not known, or no zeros fit it.

    Raises:
        InputError: if there is one, such as a norm that spans all heads.
    """
    shapes: dict[str, torch.Size] = {}
    for name, outline in outlines.items():
        part = LAYER.sub("", name)
        if shapes.setdefault(part, outline.shape) != outline.shape:
            raise InputError(f"{part} of {folder} differs from layer to layer and cannot be padded with zeros")


def check_shapes(folder: Path, described: Mapping[str, Any], outlines: Mapping[str, Tensor]) -> None:
    """Refuse a model that its stock class would not load, for it has linears that are not known here.

    Raises:
        InputError: if there is a tensor of another shape than the class has.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**described))
    built = stored_form(model, model.state_dict())
    for name, outline in outlines.items():
        if name in built and built[name].shape != outline.shape:
            raise InputError(
                f"{name} of {folder} would be {list(outline.shape)}, where a {described['model_type']} of such layers "
                f"has {list(built[name].shape)}: it cannot be padded with zeros"
            )


def even_config(source: Checkpoint, wide: LayerWidths) -> dict[str, Any]:
    """`config.json` of the padded checkpoint: a stock class, `head_dim` written out, the same widths everywhere.

    Raises:
        InputError: if the stock class does not take these widths.
    """
    described = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    for key in ("per_layer_config", "auto_map"):
        described.pop(key, None)
    described["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[described["model_type"]]]
    described |= {"head_dim": source.head_dim}
    described |= dict(zip(WIDTH_KEYS, (wide.heads, wide.kv_heads, wide.channels), strict=True))
    try:
        AutoConfig.for_model(**described)
    except Exception as error:
        raise InputError(f"{described['model_type']} does not take {wide.heads} heads in every layer") from error
    return described  # type: ignore[no-any-return]
