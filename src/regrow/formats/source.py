"""A checkpoint folder, read tensor by tensor; nothing in it is run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from regrow.checkpoint.shape import WIDTH_KEYS, check_expressible
from regrow.errors import InputError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""As safetensors names them."""
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


class Source:
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
        check_expressible(self.config)
        self.widths = layer_widths(self.config)
        self._files = {name: file for file in sorted(self.folder.glob("model*.safetensors")) for name in _names(file)}
        if not self._files:
            raise InputError(f"{self.folder} holds no model*.safetensors; give the folder of a checkpoint")

    @property
    def names(self) -> Sequence[str]:
        """The tensors' names, as the files list them."""
        return list(self._files)

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
        with safe_open(self._files[name], "pt") as file:
            piece = file.get_slice(name)
            shape, stored = piece.get_shape(), piece.get_dtype()
        if stored not in DTYPES:
            raise InputError(f"{name} of {self.folder} is stored as {stored}; export the unquantised checkpoint")
        return torch.empty(shape, dtype=DTYPES[stored], device="meta")

    def tensor(self, name: str) -> Tensor:
        """One tensor, in the dtype it is stored in."""
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


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


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged: {error}; get it anew") from error


def model_name(folder: Path) -> str:
    """What to call a checkpoint: its folder's name, or that of the run it lies in."""
    place = folder.resolve()
    return place.parent.name if place.name == "model" else place.name
