"""A checkpoint's files beside the skeleton of the model they belong to.

Files may name and part tensors otherwise than the model does: hub mixtures keep experts apart that transformers fuses
while loading. Its own conversions are followed, one tensor of the model at a time, and taken back on writing.

Not covered: quantised files, and conversions that do not make one tensor of the model out of tensors on disk, or the
reverse of it; all are refused, by the tensor's name.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from regrow.checkpoint.load import load_skeleton, weights_folder
from regrow.checkpoint.tensors import StoredTensors, weight_files
from regrow.errors import InputError

FLOATS = ("F64", "F32", "F16", "BF16")
PASSED_OVER = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Tensors of old checkpoints that models make for themselves by now; transformers passes over them too."""

ANEW = "save the model anew with transformers and save_original_format=False"


@dataclass(frozen=True)
class Origin:
    """What a tensor of the model is on disk."""

    stored: tuple[str, ...]
    """Names there, in the order in which they are put together; one if there is no converter."""
    converter: WeightConverter | None = None
    patterns: tuple[str, ...] = ()
    """For each name the converter's pattern that it goes by."""


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
        conversions = get_model_conversion_mapping(self.model)
        self.at = self._match(self._origins(conversions))
        # as if it had been loaded from these files: `stored_form` takes back the conversions that they call for
        vars(self.model)["_weight_conversions"] = [each for each in conversions if each.was_used()]
        self._check_way_back()

    def read(self, name: str) -> Tensor:
        """One tensor of the model, by its own name; what is put together of several on disk is new memory."""
        return self._make(name, self.at[name], self.stored.read)

    def generation_config(self) -> GenerationConfig:
        """As transformers finds it: in its own file, else in the model's config."""
        try:
            return GenerationConfig.from_pretrained(self.name)
        except OSError:
            return GenerationConfig.from_pretrained(self.name, config_file_name="config.json", _from_model_config=True)

    def _origins(self, conversions: list[WeightTransform]) -> dict[str, Origin]:
        """Name of each tensor that the files tell of, as the model would call it -> what it is on disk."""
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        wanted, prefix = self.model.state_dict(), self.model.base_model_prefix
        parts: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
        for stored in sorted(self.stored.entries, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, wanted)
            if name not in wanted and stored in wanted:
                name, pattern = stored, None
            parts[name].append((stored, pattern))
        origins = {}
        for name, found in parts.items():
            first, pattern = found[0]
            converter = None if pattern is None else by_pattern[pattern]
            patterns = [each for _, each in found if converter is not None and each in converter.source_patterns]
            if len(found) > max(1, len(patterns)):
                raise InputError(f"{self.name}: both {first} and {found[-1][0]} on disk are {name}; get the files anew")
            origins[name] = Origin(tuple(stored for stored, _ in found), converter, tuple(patterns))
        return origins

    def _match(self, origins: dict[str, Origin]) -> dict[str, Origin]:
        """What is on disk of each of the model's tensors; of tied ones under the name they are saved by."""
        wanted, firsts = self.model.state_dict(), first_names(self.model)
        passed_over = re.compile("|".join((*PASSED_OVER, *(self.model._keys_to_ignore_on_load_unexpected or ()))))
        at: dict[str, Origin] = {}
        read = self.stored.read
        for name, origin in origins.items():
            if name not in wanted:
                if passed_over.search(name):
                    continue
                raise InputError(
                    f"{self.name}: tensor {origin.stored[0]} on disk has no counterpart of that name in "
                    f"{type(self.model).__name__}; {ANEW}"
                )
            self._check(name, origin, wanted[name])
            first = firsts.get(name, name)
            if first in at and not torch.equal(self._make(name, origin, read), self._make(first, at[first], read)):
                raise InputError(f"{self.name}: {name} and {first} differ on disk, but config.json ties them")
            at.setdefault(first, origin)
        missing = [first for name in wanted if (first := firsts.get(name, name)) not in at]
        if missing:
            raise InputError(f"{self.name}: there is no tensor {missing[0]} on disk; get the files anew")
        return at

    def _check(self, name: str, origin: Origin, wanted: Tensor) -> None:
        """Refuse what does not make a tensor like `wanted`, without reading it."""
        for stored in origin.stored:
            code = self.stored.entries[stored].dtype
            if wanted.is_floating_point() and code not in FLOATS:
                raise InputError(f"{self.name}: {stored} is stored as {code}; give the checkpoint before quantising")
        shape = self._make(name, origin, lambda stored: torch.empty(self.stored.entries[stored].shape, device="meta"))
        if shape.shape != wanted.shape:
            raise InputError(f"{self.name}: {name} is {list(shape.shape)} on disk, not {list(wanted.shape)}")

    def _make(self, name: str, origin: Origin, read: Callable[[str], Tensor]) -> Tensor:
        """A tensor of the model out of those on disk, as transformers makes it.

        Raises:
            InputError: if the conversion fails, or makes other tensors too.
        """
        if origin.converter is None:
            return read(origin.stored[0])
        converter = deepcopy(origin.converter)  # it gathers tensors
        for stored, pattern in zip(origin.stored, origin.patterns, strict=True):
            converter.add_tensor(name, stored, pattern, partial(read, stored))  # type: ignore[arg-type]  # or a callable
        operations = ", ".join(type(operation).__name__ for operation in converter.operations)
        told = f"{self.name}: {origin.stored[0]} on disk cannot become {name} by itself ({operations}"
        try:
            made = converter.convert(name, model=self.model, config=self.model.config)
        except Exception as error:
            raise InputError(f"{told}: {str(error).splitlines()[0]}); get the files anew") from error
        if made.keys() != {name}:
            raise InputError(f"{told}); {ANEW}")
        tensor: Tensor | list[Tensor] = made[name]
        return tensor[0] if isinstance(tensor, list) else tensor

    def _check_way_back(self) -> None:
        """Refuse conversions that cannot be taken back for one tensor of the model at a time.

        Raises:
            InputError: naming the first tensor of the files that would come out otherwise.
        """
        state = {name: tensor for name, tensor in self.model.state_dict().items() if name in self.at}
        together = stored_form(self.model, state)
        apart = [stored_form(self.model, {name: tensor}) for name, tensor in state.items()]
        shapes = {name: tensor.shape for pieces in apart for name, tensor in pieces.items()}
        for name, tensor in together.items():
            if shapes.get(name) != tensor.shape:
                raise InputError(f"{self.name}: {name} cannot be written one tensor of the model at a time; {ANEW}")


def stored_form(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a source's model, or of a cut of it, in the format of the files, in the order of transformers' own."""
    form: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return form


def reads_by_tensor(name: str) -> bool:
    """Whether the files of a checkpoint, a folder or a repository on the hub, make a `Source`."""
    try:
        Source(name, weights_folder(name))
    except InputError:
        return False
    return True


def first_names(model: PreTrainedModel) -> dict[str, str]:
    """Of parameters that go by several names (tied embeddings): each name -> the one they are saved under."""
    firsts: dict[int, str] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: firsts.setdefault(id(parameter), name) for name, parameter in parameters}
