"""Apply a plan and adapters to a checkpoint on disk, tensor by tensor: memory for one, whatever the model's size.

The model itself is only ever built on the meta device. There it is traced and cut, which tells the names, shapes and
config of the result; then each tensor is read, sliced, given its adapter's `s B A` in float32, and written. What comes
out is what `save_checkpoint` writes of a model that was cut and merged in memory.

Files that part or name tensors otherwise than the model does (experts kept apart) stay in that format, as they do when
transformers loads a model and saves it. Experts may be spread over the files otherwise: transformers keeps views of one
tensor in one file.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regrow.checkpoint.files import new_folder, write_json
from regrow.checkpoint.save import write_description
from regrow.checkpoint.shape import describe
from regrow.checkpoint.source import Source, first_names, stored_form
from regrow.checkpoint.tensors import StoredTensors, write_tensors
from regrow.errors import InputError
from regrow.planning.plan import Plan
from regrow.progress import Progress
from regrow.structure.adapters import adapted_module, adapted_shape, merged_weight
from regrow.structure.biases import add_missing_biases
from regrow.structure.cut import cut
from regrow.structure.expert_lora import ADAPTER, adapted_parameter, adapter_name
from regrow.structure.finding import find_groups
from regrow.structure.groups import Groups
from regrow.structure.offload import convert
from regrow.structure.positions import IndexMap, index_map

SCALING = "lora_scaling"
"""Key in the metadata of `adapters.safetensors`: what B A is multiplied by, alpha / rank."""


def open_adapters(path: Path) -> StoredTensors:
    """The LoRA factors and refitted parameters that a run has left, not yet read.

    Raises:
        InputError: if the file is damaged, or does not say how the factors are scaled.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}; give a run's adapters.safetensors")
    adapters = StoredTensors([path])
    factors = {name: entry.shape for name, entry in adapters.entries.items() if ".lora_" in name}
    if factors and not _is_scale(adapters.metadata.get(SCALING, "")):
        raise InputError(f"{path} does not say how its factors are scaled ({SCALING} in its metadata, alpha / rank)")
    for name in factors:
        linear = name.partition(".lora_")[0]
        a, b = (factors.get(_factor(linear, factor), ()) for factor in "AB")
        axes = 2 if adapted_parameter(linear) is None else 3  # experts first
        sizes = [len(a), len(b)] == [axes, axes] and a[-2] == b[-1] and a[:-2] == b[:-2]
        if name not in (_factor(linear, "A"), _factor(linear, "B")) or not sizes:
            raise InputError(f"{path}: {name} has no counterpart of the same rank; give a run's adapters.safetensors")
    return adapters


def _is_scale(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def check_plan(plan: Plan, groups: Groups, name: str) -> None:
    """Refuse a plan that was made for another model.

    Raises:
        InputError: naming the first group that differs, or the number of parameters.
    """
    own = Plan.whole(groups)
    parts = own.parts if plan.residual is not None else own.groups
    for group in sorted(parts.keys() | plan.parts.keys()):
        here, there = (each.get(group) for each in (parts, plan.parts))
        if here is None or there is None or here.units != there.units:
            raise InputError(
                f"the plan is of another model than {name}: {group} has "
                f"{'no' if there is None else there.units} units in it, {'none' if here is None else here.units} here"
            )
        if here.cost != there.cost:
            raise InputError(
                f"the plan is of another model than {name}: a unit of {group} has {there.cost:,} parameters in it, "
                f"{here.cost:,} here"
            )
    sizes = [[(layer.parameters, layer.block_parameters) for layer in each.layers] for each in (own, plan)]
    if plan.layers and sizes[0] != sizes[1]:
        raise InputError(f"the plan is of another model than {name}: its layers have other numbers of parameters")
    if plan.total_parameters != groups.total_parameters:
        raise InputError(
            f"the plan is of another model than {name}: of {plan.total_parameters:,} parameters, "
            f"not {groups.total_parameters:,}"
        )


@dataclass(frozen=True)
class _Change:
    """What is to be done to the tensors of a source."""

    source: Source
    map: IndexMap
    adapters: StoredTensors | None
    merge: bool
    model: PreTrainedModel
    """The cut one, on the meta device, in the dtypes that are to be written."""

    def tensor(self, name: str) -> Tensor:
        """A tensor of the cut and merged model, in the dtype it is to be written in."""
        before = self.map.name_before(name)
        refitted = self._stored_name(name)
        if self.adapters is not None and refitted in self.adapters.entries:
            tensor = self.adapters.read(refitted)
        elif before in self.source.at:
            tensor = self.map.gather(before, self.source.read(before))
        else:  # a bias that only the class has whose name the cut model takes
            tensor = torch.zeros(self.model.get_parameter(name).shape)
        for adapter in (name.removesuffix(".weight"), adapter_name(name)):
            if self.adapters is not None and self.merge and (key := _factor(adapter, "A")) in self.adapters.entries:
                a, b = self.adapters.read(key), self.adapters.read(_factor(adapter, "B"))
                scaling = float(self.adapters.metadata[SCALING])
                tensor = merged_weight(adapted_module(self.model, adapter), tensor, a, b, scaling)
        return tensor.to(self.model.get_parameter_or_buffer(name).dtype)

    def _stored_name(self, parameter: str) -> str:
        """A refitted parameter's name in the file: with LoRA around its module there is one more part to it."""
        module, _, last = parameter.rpartition(".")
        wrapped = self.adapters is not None and _factor(module, "A") in self.adapters.entries
        return f"{module}.base_layer.{last}" if wrapped else parameter

    def check(self) -> None:
        """Refuse adapters that do not fit the cut model.

        Raises:
            InputError: naming the first tensor that does not.
        """
        assert self.adapters is not None
        wanted = {self._stored_name(name): tuple(p.shape) for name, p in self.model.named_parameters()}
        for key, entry in self.adapters.entries.items():
            linear, _, factor = key.partition(".lora_")
            shape = wanted.get((adapted_parameter(linear) or f"{linear}.base_layer.weight") if factor else key)
            if shape is not None and factor:
                *experts, out, into = adapted_shape(self.model, linear)
                shape = (
                    (*experts, entry.shape[-2], into) if factor.startswith("A.") else (*experts, out, entry.shape[-1])
                )
            if shape != entry.shape:
                raise InputError(
                    f"the adapters are of another plan: {key} is {list(entry.shape)}, "
                    + (f"the cut model wants {list(shape)}" if shape else "which the cut model does not have")
                )


def _factor(linear: str, factor: str) -> str:
    return f"{linear}.lora_{factor}.{ADAPTER}.weight"


def stream_checkpoint(
    source: Source,
    folder: Path,
    plan: Plan,
    adapters: StoredTensors | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    shard_size: str,
    extras: Mapping[str, str],
    progress: Progress,
    merge: bool = True,
) -> None:
    """Cut a checkpoint on disk to a plan and merge adapters into it; the folder appears whole or not at all.

    Args:
        folder: as `save_checkpoint` leaves it, to the bit where the arithmetic is the same.
        adapters: of the cut model, as `open_adapters` gives them; None: plain cut.
        dtype: of the parameters that are written; sums are always in float32.
        merge: False leaves the factors out and takes only the refitted parameters.

    Raises:
        InputError: if plan or adapters do not fit, or no class takes such widths.
    """
    model = deepcopy(source.model)
    whole = find_groups(model)
    check_plan(plan, whole, source.name)
    keep = plan.positions_within(Plan.whole(whole))
    change = _Change(source, index_map(model, whole, keep), adapters, merge, model)
    left = cut(model, whole, keep)
    if adapters is not None:
        biases = (key.replace(".base_layer.", ".") for key in adapters.entries if key.endswith(".bias"))
        add_missing_biases(model, frozenset(biases))
        change.check()
    convert(model, dtype)
    describe(model, whole, left)
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    with new_folder(folder) as partial:
        model.config.save_pretrained(partial)
        source.generation_config().save_pretrained(partial)
        _write_weights(partial, change, shard_size, progress)
        write_description(partial, model.config, tokenizer, extras)


def _write_weights(folder: Path, change: _Change, shard_size: str, progress: Progress) -> None:
    """The safetensors files, parted as transformers parts them, and their index if there are several."""
    firsts = first_names(change.model)
    state = {name: t for name, t in change.model.state_dict().items() if firsts.get(name, name) == name}
    form = stored_form(change.model, state)
    of = {piece: name for name, tensor in state.items() for piece in stored_form(change.model, {name: tensor})}
    shards = split_torch_state_dict_into_shards(form, max_shard_size=shard_size)
    progress.stage("write checkpoint", len(form))
    for file, names in shards.filename_to_tensors.items():
        contents = {name: (form[name].dtype, tuple(form[name].shape)) for name in names}
        write_tensors(folder / file, contents, _stored(change, of, names), progress.advance)
    if shards.is_sharded:
        metadata = {"total_parameters": change.model.num_parameters(), **shards.metadata}
        files = dict(sorted(shards.tensor_to_filename.items()))
        write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": files})


def _stored(change: _Change, of: Mapping[str, str], names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a file, those that are pieces of one tensor of the model after one another.

    Args:
        of: name in the files -> of the model's tensor that it is, or is a piece of.
    """
    for name in dict.fromkeys(of[piece] for piece in names):
        pieces = stored_form(change.model, {name: change.tensor(name)})
        yield from ((piece, pieces.pop(piece)) for piece in names if of[piece] == name)
        del pieces  # before the next is read
