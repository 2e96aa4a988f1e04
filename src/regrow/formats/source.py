"""A checkpoint folder, read tensor by tensor; nothing in it is run."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from regrow.checkpoint.tensors import DTYPES, StoredTensors, weight_files
from regrow.errors import InputError

FLOATS = ("F32", "F16", "BF16")
"""As safetensors names them."""
WIDTH_KEYS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""Where the config of every family that is exported has its widths."""
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja", "vocab.json", "merges.txt",
    "generation_config.json",
)  # fmt: skip
"""What lies beside the weights of a checkpoint and holds for them in any format: patterns of file names."""
LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class LayerWidths:
    """How wide one decoder layer is; a half that has been removed has the width 0."""

    heads: int
    kv_heads: int
    channels: int

    @property
    def queries(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads if self.kv_heads else 0


def copy_companions(source: Path, out: Path) -> None:
    """Tokenizer, chat template and settings of generation, as they are."""
    for file in {file for pattern in COMPANIONS for file in source.glob(pattern)}:
        shutil.copyfile(file, out / file.name)


class Checkpoint:
    """Weights, config and widths of a checkpoint, one tensor in memory at a time.

    Raises:
        InputError: if the folder holds no checkpoint of equal heads and one FFN per layer, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = checkpoint_folder(folder)
        try:
            # Uneven layers bring a modeling file, not a config class: this reads JSON and runs nothing of theirs.
            self.config: PretrainedConfig = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:
            raise InputError(f"config.json of {self.folder} cannot be used: {error}; get it anew") from error
        if missing := [key for key in WIDTH_KEYS if key not in self.config.to_dict()]:
            raise InputError(
                f"models of type {self.config.model_type!r} cannot be exported by regrow: their config has no "
                f"{', '.join(missing)}; use transformers' or llama.cpp's own tools"
            )
        self.widths = layer_widths(self.config)
        self._stored = StoredTensors(weight_files(self.folder))

    @property
    def names(self) -> Sequence[str]:
        """The tensors' names, as the files list them."""
        return list(self._stored.entries)

    @property
    def even(self) -> bool:
        """Whether all layers have the same widths."""
        return len(set(self.widths)) == 1

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        described = self.config.to_dict()
        return int(described.get("head_dim") or described["hidden_size"] // described["num_attention_heads"])

    def outline(self, name: str) -> Tensor:
        """A tensor's shape and dtype, on the meta device: nothing of it is read.

        Raises:
            InputError: if it is not stored as floating point.
        """
        entry = self._stored.entries[name]
        if entry.dtype not in FLOATS:
            raise InputError(f"{name} of {self.folder} is stored as {entry.dtype}; export the unquantised checkpoint")
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")

    def tensor(self, name: str) -> Tensor:
        """One tensor, in the dtype it is stored in."""
        return self._stored.read(name)


def checkpoint_folder(folder: Path) -> Path:
    """The checkpoint in a folder: the folder itself, or `model/` of a run.

    Raises:
        InputError: if there is none.
    """
    for place in (folder, folder / "model"):
        if (place / "config.json").is_file():
            return place
    raise InputError(f"{folder} holds no config.json, nor does {folder / 'model'}; give a checkpoint's or run's folder")


def layer_widths(config: PretrainedConfig) -> list[LayerWidths]:
    """Widths of every layer, whether the config has one set for all or `per_layer_config`."""
    return [
        LayerWidths(*(int(getattr(layer, key)) for key in WIDTH_KEYS))
        for layer in (config.per_layer_config[number] for number in range(config.num_hidden_layers))
    ]


def layer_of(name: str) -> int | None:
    """The decoder layer a tensor belongs to."""
    found = LAYER.match(name)
    return int(found[1]) if found else None


def model_name(folder: Path) -> str:
    """What to call a checkpoint: its folder's name, or that of the run it lies in."""
    place = folder.resolve()
    return place.parent.name if place.name == "model" else place.name
