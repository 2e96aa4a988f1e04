"""Write a cut and merged model as a plain Hugging Face checkpoint."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from regrow.checkpoint.files import new_folder
from regrow.checkpoint.source import stored_form
from regrow.planning.target import parse_bytes
from regrow.structure.offload import convert
from regrow.structure.per_layer import needs_own_class
from regrow.structure.quantised import weight_count, weight_shape

MODELING_FILE = "modeling_regrow.py"
BYTES_OF_AN_EMPTY_FILE = 64
"""Of safetensors without a tensor: length, metadata, padding; a little more than there are."""

UNEVEN_MODEL = '''"""A {stock} whose layers have widths of their own, as `per_layer_config` in the config says."""

from transformers import {stock}


class UnevenForCausalLM({stock}):
    """Built at one width throughout, then each layer anew at its own."""

    def __init__(self, config):
        super().__init__(even(config))
        config._attn_implementation = self.config._attn_implementation
        config._experts_implementation = self.config._experts_implementation
        self.config = self.model.config = config
        layers = self.model.layers
        for number, layer in enumerate(layers):
            layers[number] = type(layer)(config.per_layer_config[number], number)
            for module in layers[number].modules():
                if "config" in vars(module):
                    module.config = config  # one place says which kernels all layers use
        self.post_init()


def even(config):
    """The config without what differs between layers."""
    described = config.to_dict()
    del described["per_layer_config"]
    return type(config)(**described)
'''
"""Remote code that goes with a checkpoint of uneven layers, which no stock class can describe."""


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype,
    shard_size: str,
    extras: Mapping[str, str],
) -> None:
    """Write weights, config, generation config and tokenizer; the folder appears whole or not at all.

    The parameters are converted to `dtype` in place: what is in memory afterwards is what was saved.

    Args:
        extras: further text files (model card, plan), by name.
    """
    convert(model, dtype)
    model.config.dtype = dtype
    with new_folder(folder) as partial:
        model.save_pretrained(partial, max_shard_size=shard_size)
        write_description(partial, model.config, tokenizer, extras)


def write_description(
    folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, extras: Mapping[str, str]
) -> None:
    """What goes with the weights and the config of a checkpoint: who loads it, the tokenizer, further text files."""
    name_the_class(folder, config)
    tokenizer.save_pretrained(folder)
    for name, text in extras.items():
        (folder / name).write_text(text, encoding="utf-8")


def bytes_besides_parameters(
    model: PreTrainedModel, dtype: torch.dtype, shard_size: str, added: Mapping[str, int] = MappingProxyType({})
) -> int:
    """Most bytes that the saved weights of a model, or of any cut of it, take besides its parameters.

    The buffers that are saved, and the headers of safetensors: a length in eight bytes, then JSON, padded to eight.

    Args:
        added: biases that the model has not yet, and how long each is.
    """
    saved = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    held = sum(int(buffer.nbytes) for buffer in buffers.values())
    count = sum(weight_count(parameter) for parameter in model.parameters()) + sum(added.values())
    total = held + count * dtype.itemsize
    shapes: dict[str, Sequence[int]] = {
        name: weight_shape(p) for name, p in model.named_parameters(remove_duplicate=False)
    }
    shapes |= {name: buffer.shape for name, buffer in buffers.items()}
    shapes |= {name: (length,) for name, length in added.items()}
    entries = stored_form(model, {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()})
    described = {
        name: {"dtype": "BF16", "shape": list(entry.shape), "data_offsets": [total, total]}
        for name, entry in entries.items()
    }
    shards = 1 + 2 * total // parse_bytes(shard_size)
    return held + len(json.dumps(described, separators=(",", ":"))) + shards * BYTES_OF_AN_EMPTY_FILE


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files of a checkpoint."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def name_the_class(folder: Path, config: PretrainedConfig) -> None:
    """Say in the config which class loads the checkpoint; `save_pretrained` names the one in memory."""
    stock = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written["architectures"] = [stock]
    if needs_own_class(config):
        (folder / MODELING_FILE).write_text(UNEVEN_MODEL.format(stock=stock), encoding="utf-8")
        written["architectures"] = ["UnevenForCausalLM"]
        written["auto_map"] = {"AutoModelForCausalLM": f"{MODELING_FILE.removesuffix('.py')}.UnevenForCausalLM"}
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def needs_remote_code(folder: Path) -> bool:
    """Whether a checkpoint of ours brings its own modeling file."""
    return (folder / MODELING_FILE).is_file()
