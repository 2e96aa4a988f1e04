"""Which widths a family's stock class can have: asked of the class itself, before any work is done.

No family is named here. A config with fewer units is written as a cut model's would be, the model is built from it on
the meta device, and the shapes of its tensors are compared with those that the cut would leave. Some classes refuse a
number of heads that does not divide the hidden size, some compute the size of a head from the number of heads, some
have no key for a width; all of them show here.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from regrow.checkpoint.empty import build_empty
from regrow.checkpoint.save import UNEVEN_MODEL
from regrow.checkpoint.shape import pruned_config
from regrow.errors import InputError, first_sentence
from regrow.structure.depth import check_depth
from regrow.structure.finding import find_groups
from regrow.structure.groups import RESIDUAL, Group, Groups
from regrow.structure.per_layer import rearrange
from regrow.structure.trace import decoder_layers

Shapes = dict[str, tuple[int, ...]]

ALONE = "there is but one, or none can go without the others"


@dataclass(frozen=True)
class Widths:
    """The numbers of units of one kind that every layer may keep, ascending, the whole number among them."""

    counts: Sequence[int]
    refusal: str = ""
    """Why others are not possible; empty if all are."""


def prunable_groups(model: PreTrainedModel) -> Groups:
    """As `find_groups`, of a whole model, with the widths that a stock class can have (`Group.widths`).

    Raises:
        InputError: as `find_groups`.
    """
    groups = find_groups(model)
    groups = with_widths(groups, {kind: widths.counts for kind, widths in stock_widths(model.config, groups).items()})
    if groups.residual is None:
        return groups
    widths = hidden_widths(model.config, groups)
    return replace(groups, residual=replace(groups.residual, widths=widths.counts))


def with_widths(groups: Groups, widths: Mapping[str, Sequence[int]]) -> Groups:
    """The groups with the numbers of units, by kind, that may stay in the uniform shape.

    Those of a kind that are not as wide as the largest number says stay whole.
    """
    return replace(
        groups,
        groups=tuple(
            replace(group, widths=widths[group.kind] if group.units == widths[group.kind][-1] else (group.units,))
            for group in groups
        ),
    )


def stock_widths(config: PretrainedConfig, groups: Groups) -> dict[str, Widths]:
    """By kind of group: how many units each layer may keep, for the whole to be a checkpoint of a stock class.

    Where layers differ in a kind's width (dense ones beside those of experts) it is those that hold most of it.

    Args:
        config: of the whole model, as the groups are.
    """
    every = groups
    config, groups = _few_layers(config, groups)
    try:
        whole = build_empty(config)
    except Exception as error:
        return {group.kind: Widths((group.units,), _first_line(error)) for group in groups}
    found = {}
    for kind in sorted({group.kind for group in groups}):
        found[kind] = _possible(config, groups, whole, _widest(group for group in every if group.kind == kind))
    return found


def _widest(groups: Iterable[Group]) -> Group:
    """One of those that are as wide as most of what they hold."""
    held: dict[int, int] = defaultdict(int)
    one: dict[int, Group] = {}
    for group in groups:
        held[group.units] += group.units * group.cost
        one.setdefault(group.units, group)
    return one[max(held, key=held.__getitem__)]


def hidden_widths(config: PretrainedConfig, groups: Groups) -> Widths:
    """The hidden sizes that a checkpoint of a stock class can have; arguments as for `stock_widths`.

    Asked are one less than the whole, and, if that cannot be, multiples of the number of heads.
    """
    config, groups = _few_layers(config, groups)
    residual = groups.residual
    if residual is None:
        return Widths((), "tracing follows no one stream through all parts of its layers")
    units = residual.units
    heads = getattr(config.get_text_config(), "num_attention_heads", units)  # recurrent models have none
    try:
        whole = build_empty(config)
    except Exception as error:
        return Widths((units,), _first_line(error))
    if not (refusal := _hidden_refusal(config, groups, whole, units - 1)):
        return Widths(range(1, units + 1))
    if units % heads or units == heads:
        return Widths((units,), refusal)
    if coarse := _hidden_refusal(config, groups, whole, units - heads):
        return Widths((units,), coarse)
    return Widths(range(heads, units + 1, heads), refusal)


def _hidden_refusal(config: PretrainedConfig, groups: Groups, whole: PreTrainedModel, units: int) -> str:
    """Why the stock class cannot have so many hidden channels; empty if it can.

    A number that a module has computed from the hidden size (the scale of Gemma's embeddings) would be another one in
    the narrow model than in the one that was cut.
    """
    assert groups.residual is not None
    narrow = replace(groups, residual=replace(groups.residual, units=units))
    try:
        built = build_empty(pruned_config(config, groups, narrow))
    except Exception as error:
        return _first_line(error)
    mismatch = _mismatch(_shapes(built), _cut_shapes(whole, groups, {RESIDUAL: units}))
    if mismatch:
        return mismatch
    number = _other_number(whole, built)
    return number and f"{number} depends on it"


def _other_number(whole: nn.Module, built: nn.Module) -> str:
    """The first number that modules of two models have computed for themselves and that differs; empty if none does."""
    there = dict(built.named_modules())
    for name, module in whole.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, float) and name in there and vars(there[name]).get(key, value) != value:
                return f"{key} of {name}"
    return ""


def check_fewer_layers(config: PretrainedConfig) -> None:
    """Refuse, before any work is done, a model whose layers are no longer themselves under another number.

    Beyond what the config's keys say (`check_depth`) the class is asked: without its first layer, it should build what
    the others are.

    Raises:
        InputError: the message says why.
    """
    check_depth(config)
    total = config.get_text_config().num_hidden_layers
    try:
        _, (_, *wanted) = decoder_layers(build_empty(config))
    except Exception:
        return  # no stock class: there is nobody to ask
    if not wanted:
        return
    fewer = copy.deepcopy(config)
    rearrange(fewer.get_text_config(), range(1, total))
    try:
        # Read anew, as a checkpoint's is: some classes write other numbers than they hold.
        _, built = decoder_layers(build_empty(AutoConfig.for_model(**fewer.to_dict())))
        pairs = list(zip(built, wanted, strict=True))
        refusal = next((told for one, other in pairs if (told := _mismatch(_shapes(one), _shapes(other)))), "")
        number = next((told for one, other in pairs if (told := _other_number(other, one))), "")
    except Exception as error:
        refusal, number = _first_line(error), ""
    if refusal or number:
        raise InputError(
            f"the layers of a {config.model_type!r} model depend on their numbers "
            f"({refusal or f'{number} does'}): none can be removed; take 'layer' out of pruning.kinds"
        )


def _possible(config: PretrainedConfig, groups: Groups, whole: PreTrainedModel, group: Group) -> Widths:
    kind, units = group.kind, group.units
    if kind.startswith("ffn") or kind == "expert":  # if a class takes one number it takes every number
        refusal = ALONE
        for alike in dict.fromkeys([(kind,), _as_wide(groups, group)]):  # or with those beside it, under one key
            multiple = max(each.multiple for each in groups if each.kind in alike and each.units == units)
            fewer = range(-(-group.least // multiple) * multiple, units, multiple)
            if fewer and not (refusal := _refusal(config, groups, whole, alike, units, fewer[-1])):
                return Widths((*fewer, units) if multiple > 1 else range(fewer[0], units + 1))
        return Widths((units,), refusal)
    refusals = {count: _refusal(config, groups, whole, (kind,), units, count) for count in range(1, units)}
    counts = (*(count for count, refusal in refusals.items() if not refusal), units)
    reason = next((refusal for refusal in refusals.values() if refusal), "")
    return Widths(counts, reason or (ALONE if units == 1 else ""))


def _as_wide(groups: Groups, group: Group) -> tuple[str, ...]:
    """A group's kind; of an FFN also the kinds that lie beside one of its kind and are as wide."""
    alike = [each for each in groups if each.base_kind == "ffn" and each.units == group.units]
    beside = {each.layer for each in alike if each.kind == group.kind}
    return tuple(sorted({each.kind for each in alike if each.layer in beside} | {group.kind}))


def _refusal(
    config: PretrainedConfig, groups: Groups, whole: PreTrainedModel, kinds: Sequence[str], before: int, units: int
) -> str:
    """Why the stock class cannot have so many units of some kinds where it had `before`; empty if it can."""
    narrow = tuple(
        replace(group, units=units) if group.kind in kinds and group.units == before else group for group in groups
    )
    try:
        described = pruned_config(config, groups, replace(groups, groups=narrow))
        built = _shapes(build_empty(described))
    except Exception as error:
        return _first_line(error)
    return _mismatch(built, _cut_shapes(whole, groups, {group.name: group.units for group in narrow}))


def check_free(config: PretrainedConfig, groups: Groups) -> None:
    """Refuse a family whose layers cannot each have widths of their own, before any work is done.

    Raises:
        InputError: the message says why.
    """
    config, groups = _few_layers(config, groups, 2)
    left = {group.name: group.units for group in groups}
    seen: dict[tuple[str, int, int], int] = {}
    for group in groups:
        first = seen.setdefault((group.kind, group.units, group.cost), group.layer) == group.layer
        if first and group.kind != "expert" and group.units > group.multiple:
            left[group.name] -= group.multiple
    narrow = tuple(replace(group, units=left[group.name]) for group in groups)
    try:
        whole = build_empty(config)
        described = pruned_config(config, groups, replace(groups, groups=narrow))
        # Where no two layers are of one kind the stock class can say it all.
        built = _shapes(_build_uneven(described) if described.is_heterogeneous else build_empty(described))
        refusal = _mismatch(built, _cut_shapes(whole, groups, left))
    except Exception as error:
        refusal = _first_line(error)
    if refusal:
        raise InputError(
            f"the layers of a {config.model_type!r} model cannot have widths of their own ({refusal}); "
            "use pruning.shape=uniform"
        )


def _build_uneven(config: PretrainedConfig) -> PreTrainedModel:
    """The model that the modeling file of an uneven checkpoint builds, on the meta device."""
    scope: dict[str, type[PreTrainedModel]] = {}
    exec(UNEVEN_MODEL.format(stock=MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]), scope)
    with torch.device("meta"):
        return scope["UnevenForCausalLM"](config)


def _few_layers(config: PretrainedConfig, groups: Groups, each: int = 1) -> tuple[PretrainedConfig, Groups]:
    """The first layers of a model, as many as hold `each` of each kind (or all there are), and two if there are two.

    All of them where the class builds no fewer: later layers of Gemma 4 compute with keys and values of earlier ones.
    """
    seen: dict[tuple[tuple[str, int, int], ...], int] = defaultdict(int)
    last = min(1, len(groups.layers) - 1)
    for layer in groups.layers:
        alike = tuple((group.kind, group.units, group.cost) for group in groups if group.layer == layer.number)
        seen[alike] += 1
        if seen[alike] <= each:
            last = max(last, layer.number)
    whole, config = config, copy.deepcopy(config)
    rearrange(config.get_text_config(), range(last + 1))
    try:
        build_empty(config)
    except Exception:  # any: it is the class that refuses
        return whole, groups
    kept = tuple(group for group in groups if group.layer <= last)
    residual = groups.residual
    if residual is not None:
        gone = tuple(f"{layer.name}." for layer in groups.layers[last + 1 :])
        along = tuple(s for s in residual.slices if not gone or not s.parameter.startswith(gone))
        bare = tuple(name for name in residual.bare_norms if not gone or not f"{name}.".startswith(gone))
        residual = replace(residual, slices=along, bare_norms=bare)
    return config, replace(groups, groups=kept, layers=groups.layers[: last + 1], residual=residual)


def _shapes(model: nn.Module) -> Shapes:
    """Of parameters, tied ones by their first name, and of the buffers that are saved with them."""
    saved = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(saved.items())}
    return {name: tuple(tensor.shape) for name, tensor in saved.items() if first[id(tensor)] == name}


def _cut_shapes(whole: PreTrainedModel, groups: Groups, left: Mapping[str, int]) -> Shapes:
    shapes = _shapes(whole)
    turned = {name for name, module in whole.named_modules() if isinstance(module, Conv1D)}
    every = (*groups, *([groups.residual] if groups.residual else []))
    for group in (group for group in every if group.name in left):
        for piece in group.slices if group.expert in (None, 0) else ():  # all experts are as wide as the first
            if not piece.is_adapter:
                name = f"{piece.module}.{piece.parameter.rpartition('.')[2]}"
                sizes = list(shapes[name])
                # Quantised, a Conv1D is a linear, whose weight lies the other way round.
                axis = 1 - piece.is_input if piece.module in turned and len(sizes) > 1 else piece.axis
                sizes[axis] -= (group.units - left[group.name]) * piece.index.shape[1]
                shapes[name] = tuple(sizes)
    return shapes


def _mismatch(built: Shapes, wanted: Shapes) -> str:
    """The first tensor that differs, in words; a bias that is only in `built` can be zero."""
    for name, shape in wanted.items():
        if built.get(name) != shape:
            has = f"has {list(built[name])}" if name in built else "has none"
            return f"{name} would be {list(shape)}, the stock class {has}"
    extra = [name for name in built if name not in wanted and not name.endswith(".bias")]
    return f"the stock class also has {extra[0]}" if extra else ""


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return first_sentence(lines[-1].removeprefix("ValueError: ")) if lines else type(error).__name__
