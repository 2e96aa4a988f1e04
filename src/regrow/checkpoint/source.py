"""A checkpoint's files beside the skeleton of the model they belong to."""

import re
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from regrow.checkpoint.load import load_skeleton
from regrow.checkpoint.tensors import StoredTensors, weight_files
from regrow.errors import InputError

FLOATS = ("F64", "F32", "F16", "BF16")
PASSED_OVER = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Tensors of old checkpoints that models make for themselves by now; transformers passes over them too."""


class Source:
    """A checkpoint on disk beside the model's skeleton."""

    def __init__(self, name: str, folder: Path, trust_remote_code: bool = False) -> None:
        """Match the tensors of the files with the model's.

        Args:
            name: of the model: a folder, or a repository on the hub.
            folder: where its safetensors files lie.

        Raises:
            InputError: if a tensor has no counterpart on the other side, or is of another shape or quantised.
        """
        self.name = name
        self.model = load_skeleton(name, trust_remote_code)
        self.stored = StoredTensors(weight_files(folder))
        self.at = self._match()

    def generation_config(self) -> GenerationConfig:
        """As transformers finds it: in its own file, else in the model's config."""
        try:
            return GenerationConfig.from_pretrained(self.name)
        except OSError:
            return GenerationConfig.from_pretrained(self.name, config_file_name="config.json", _from_model_config=True)

    def _match(self) -> dict[str, str]:
        """Name of each of the model's tensors -> its name on disk; the two differ where tensors are tied."""
        wanted, stored = self.model.state_dict(), self.stored.entries
        firsts = first_names(self.model)
        passed_over = re.compile("|".join((*PASSED_OVER, *(self.model._keys_to_ignore_on_load_unexpected or ()))))
        at: dict[str, str] = {}
        for name, entry in stored.items():
            if name not in wanted:
                if passed_over.search(name):
                    continue
                raise InputError(
                    f"{self.name}: tensor {name} on disk has no counterpart of that name in "
                    f"{type(self.model).__name__}; save the model anew with transformers and save_original_format=False"
                )
            if entry.shape != tuple(wanted[name].shape):
                raise InputError(f"{self.name}: {name} is {list(entry.shape)} on disk, not {list(wanted[name].shape)}")
            if wanted[name].is_floating_point() and entry.dtype not in FLOATS:
                raise InputError(
                    f"{self.name}: {name} is stored as {entry.dtype}; give the checkpoint before quantising"
                )
            first = firsts.get(name, name)
            if first in at and not torch.equal(self.stored.read(name), self.stored.read(at[first])):
                raise InputError(f"{self.name}: {name} and {first} differ on disk, but config.json ties them")
            at.setdefault(first, name)
        missing = [first for name in wanted if (first := firsts.get(name, name)) not in at]
        if missing:
            raise InputError(f"{self.name}: there is no tensor {missing[0]} on disk; get the files anew")
        return at


def first_names(model: PreTrainedModel) -> dict[str, str]:
    """Of parameters that go by several names (tied embeddings): each name -> the one they are saved under."""
    firsts: dict[int, str] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: firsts.setdefault(id(parameter), name) for name, parameter in parameters}
