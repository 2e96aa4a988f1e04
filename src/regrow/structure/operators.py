"""What each aten operator does to channels.

Nearly all are made of the two steps of `ties.py`; the others say which elements they move, or choose.

An operator is looked up here only if one of its inputs carries a facet: positions, masks and rotary tables
may be computed by any operator whatever.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from regrow.structure.channels import Facet, Value, align, reshape
from regrow.structure.ties import UnknownOperator, Walk

Rule = Callable[[Walk, Sequence[Any], dict[str, Any], Any], Any]
"""`(walk, positional arguments, keyword arguments, output shape or shapes) -> Value or list of Value`."""


def _values(arguments: Any) -> list[Value]:
    if isinstance(arguments, Value):
        return [arguments]
    if isinstance(arguments, list | tuple):
        return [value for argument in arguments for value in _values(argument)]
    return []


def _elementwise(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Value:
    return walk.elementwise(_values(args), shape)


def _like(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Value:
    return walk.elementwise(args[:1], shape)  # of what else there may be only the dtype counts


def _rearranged(change: Callable[[Facet, tuple[int, ...], Sequence[Any], dict[str, Any], Any], Facet]) -> Rule:
    """A rule that moves the elements of its first argument without changing them: a weight stays a weight."""

    def rule(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Value:
        value: Value = args[0]
        facets = tuple(change(facet, value.shape, args[1:], kwargs, shape) for facet in value.facets)
        return Value(shape, facets, value.is_weight)

    return rule


def _reshape(facet: Facet, old: tuple[int, ...], args: Sequence[Any], kwargs: dict[str, Any], new: Any) -> Facet:
    return reshape(facet, old, new)


def _transpose(facet: Facet, old: Any, args: Sequence[Any], kwargs: dict[str, Any], new: Any) -> Facet:
    first, second = args if args else (0, facet.ndim - 1)
    return facet.swapaxes(first, second)


def _permute(facet: Facet, old: Any, args: Sequence[Any], kwargs: dict[str, Any], new: Any) -> Facet:
    return facet.transpose(args[0])


def _expand(facet: Facet, old: Any, args: Sequence[Any], kwargs: dict[str, Any], new: Any) -> Facet:
    return align(facet, len(new))


def _slice(facet: Facet, old: Any, args: Sequence[Any], kwargs: dict[str, Any], new: Any) -> Facet:
    defaults: list[Any] = [0, None, None, 1]
    axis, start, stop, step = list(args) + defaults[len(args) :]
    if facet.shape[axis] == 1:
        return facet
    whole = (slice(None),) * (axis % facet.ndim)
    return np.asarray(facet[(*whole, slice(start, stop, step))])


def _select(facet: Facet, old: Any, args: Sequence[Any], kwargs: dict[str, Any], new: Any) -> Facet:
    axis, position = args
    return np.asarray(facet.take(0 if facet.shape[axis] == 1 else position, axis))


def _repeat_interleave(facet: Facet, old: Any, args: Sequence[Any], kwargs: dict[str, Any], new: Any) -> Facet:
    times = args[0]
    axis = args[1] if len(args) > 1 else kwargs["dim"]
    return facet if facet.shape[axis] == 1 else facet.repeat(times, axis)


def _repeat(facet: Facet, old: Any, args: Sequence[Any], kwargs: dict[str, Any], new: Any) -> Facet:
    facet = align(facet, len(new))
    return np.tile(facet, [times if size > 1 else 1 for times, size in zip(args[0], facet.shape, strict=True)])


def _reduce(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Value:
    value: Value = args[0]
    axes = args[1] if len(args) > 1 else range(len(value.shape))
    axes = [axes] if isinstance(axes, int) else list(axes)
    walk.average(value, axes)
    return walk.reduce(value, axes, shape)


def _layer_norm(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Value:
    walk.average(args[0], range(-len(args[1]), 0))
    return walk.elementwise(_values([args[0], *args[2:4]]), shape)


def _rms_norm(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Value:
    walk.average(args[0], range(-len(args[1]), 0))
    return walk.elementwise(_values([args[0], *args[2:3]]), shape)


def _softmax(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Value:
    walk.average(args[0], [args[1]])
    return walk.elementwise(args[:1], shape)


def _embedding(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Value:
    weight: Value = args[0]
    columns = [facet for facet in weight.facets if facet.shape[0] == 1]
    return Value(shape, tuple(align(facet, len(shape)) for facet in columns))


def _transposed(value: Value) -> Value:
    shape = (*value.shape[:-2], value.shape[-1], value.shape[-2])
    return Value(shape, tuple(facet.swapaxes(-1, -2) for facet in value.facets), value.is_weight)


def _linear(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Value:
    inputs, weight, *bias = args
    product = walk.contract(inputs, _transposed(weight), shape)
    return walk.elementwise([product, *_values(bias)], shape)


def _matmul(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Value:
    return walk.contract(args[0], args[1], shape)


def _addmm(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Value:
    return walk.elementwise([args[0], walk.contract(args[1], args[2], shape)], shape)


def _attention(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Value:
    query, key, value = args[:3]
    if kwargs.get("enable_gqa"):
        times = query.shape[1] // key.shape[1]
        key, value = (
            Value(query.shape, tuple(_repeat_interleave(facet, None, (times, 1), {}, None) for facet in item.facets))
            for item in (key, value)
        )
    scores = walk.contract(query, _transposed(key), (*query.shape[:-1], key.shape[-2]))
    return walk.contract(scores, value, shape)


def _split(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shapes: Any) -> list[Value]:
    value: Value = args[0]
    axis = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    parts, start = [], 0
    for shape in shapes:
        stop = start + shape[axis]
        facets = tuple(_slice(facet, None, (axis, start, stop), {}, None) for facet in value.facets)
        parts.append(Value(shape, facets, value.is_weight))
        start = stop
    return parts


def _cat(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Value:
    values: list[Value] = list(args[0])
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(shape)
    if any(len(value.facets) > 1 for value in values):
        raise UnknownOperator("aten.cat of tensors with several independent axes")
    pieces = []
    for value in values:
        facet = value.facets[0] if value.facets else _fresh(walk, value, axis)
        sizes = list(facet.shape)
        sizes[axis] = value.shape[axis]
        pieces.append(np.broadcast_to(facet, sizes))
    wide = [max(piece.shape[d] for piece in pieces) for d in range(len(shape))]
    spread = [np.broadcast_to(p, [*wide[:axis], p.shape[axis], *wide[axis + 1 :]]) for p in pieces]
    return Value(shape, (np.concatenate(spread, axis),))


def _stack(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Value:
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(shape)
    thick = [(*value.shape[:axis], 1, *value.shape[axis:]) for value in args[0]]
    pieces = [
        Value(size, tuple(np.expand_dims(facet, axis) for facet in value.facets), value.is_weight)
        for size, value in zip(thick, args[0], strict=True)
    ]
    return _cat(walk, [pieces, axis], {}, shape)


def _as_complex(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Value:
    """Pairs along the last axis become one number each."""
    value: Value = args[0]
    firsts = [facet.take([0], -1) for facet in value.facets]
    for facet, first in zip(value.facets, firsts, strict=True):
        walk.channels.tie(facet, first)
    return Value(shape, tuple(first[..., 0] for first in firsts))


def _as_real(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Value:
    return Value(shape, tuple(np.expand_dims(facet, -1) for facet in args[0].facets))


def _index(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Value:
    value, indices = args
    (axis, index), *more = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    chosen = [value.is_weight and _is_chosen(facet, axis, index) for facet in value.facets]
    if more or (len(index.shape) != 1 and not all(chosen)):
        raise UnknownOperator("aten.index with more than one row of positions")
    facets = []
    for facet, is_chosen in zip(value.facets, chosen, strict=True):
        if is_chosen:
            walk.route(facet, index.among)
            continue
        first = facet.take([0], axis)
        walk.channels.tie(facet, first)  # which positions are meant is not known here: all go together
        facets.append(first)
    return Value(shape, tuple(facets), value.is_weight)


def _top(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shapes: Any) -> list[Value]:
    value, count = args[:2]
    axis = (args[2] if len(args) > 2 else kwargs.get("dim", -1)) % len(value.shape)
    return _chosen(walk, value, axis, lambda facet: count, shapes)


def _chosen(walk: Walk, value: Value, axis: int, count: Callable[[Facet], int], shapes: Any) -> list[Value]:
    """The highest along an axis and their positions."""
    whole = [facet.reshape(-1) for facet in value.facets if facet.size == facet.shape[axis] > 1]
    walk.offered += [(facet, count(facet)) for facet in whole]
    return [walk.reduce(value, [axis], shapes[0]), Value(shapes[1], among=next(iter(whole), None))]


def _gather(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Value:
    value = args[0]
    axis = (args[1] if len(args) > 1 else kwargs["dim"]) % len(value.shape)
    index = args[2] if len(args) > 2 else kwargs["index"]
    facets = []
    for facet in value.facets:
        if _is_chosen(facet, axis, index):
            continue  # what those that were chosen have, as of `topk`
        first = facet.take([0], axis)
        walk.channels.tie(facet, first)  # which positions are meant is not known here: all go together
        facets.append(first)
    return Value(shape, tuple(facets))


def _scatter(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Value:
    value, axis, index = args[:3]
    for facet in value.facets:
        if not _is_chosen(facet, axis, index):
            walk.channels.tie(facet, facet.take([0], axis))  # which positions are meant is not known here, as above
    return Value(shape, value.facets)


def _max(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shapes: Any) -> Any:
    if len(args) == 1:
        return _reduce(walk, args, kwargs, shapes)
    if isinstance(args[1], Value):  # the larger of two
        return _elementwise(walk, args, kwargs, shapes)
    value, axis = args[:2]

    def one_more(facet: Facet) -> int:  # of what had been marked as taken before, say
        return 1 + max((count for other, count in walk.offered if np.array_equal(other, facet)), default=0)

    return _chosen(walk, value, axis % len(value.shape), one_more, shapes)


def _is_chosen(facet: Facet, axis: int, positions: Value) -> bool:
    """Whether a facet names the channels that the positions were chosen among."""
    return positions.among is not None and facet.size == facet.shape[axis] == positions.among.size


def _grouped_mm(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Value:
    inputs, weight, ends = args  # every row of the inputs meets one of the weight's matrices
    for facet in weight.facets:
        if _is_chosen(facet, 0, ends):
            walk.route(facet, ends.among)
    matrix = tuple(facet[0] for facet in weight.facets if facet.shape[0] == 1)
    return walk.contract(inputs, Value(weight.shape[1:], matrix, weight.is_weight), shape)


def _fresh(walk: Walk, value: Value, axis: int) -> Facet:
    sizes = [1] * len(value.shape)
    sizes[axis] = value.shape[axis]
    return walk.channels.new(value.shape[axis]).reshape(sizes)


def _pick(walk: Walk, args: Sequence[Any], kwargs: dict[str, Any], shape: Any) -> Any:
    return args[0][args[1]]


def _names(text: str) -> list[str]:
    return [f"aten.{name}" for name in text.split()]


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        _names(
            "add sub mul div pow neg abs exp log sqrt rsqrt reciprocal square sigmoid tanh silu gelu relu mish "
            "softplus erf sin cos expm1 clamp clamp_min clamp_max maximum minimum where masked_fill to float gt ge lt "
            "le eq ne _to_copy clone contiguous detach alias lift_fresh_copy dropout "
            "hardswish hardsigmoid hardtanh leaky_relu elu celu selu relu6 log_sigmoid log1p log2 exp2 floor "
            "ceil round sign rsub multiply subtract divide true_divide bitwise_not bitwise_and bitwise_or logical_not "
            "logical_and logical_or nan_to_num add_ mul_ sub_ div_ relu_ silu_ clamp_ "
            "clamp_min_ clamp_max_ masked_fill_ copy"
        ),
        _elementwise,
    ),
    **dict.fromkeys(_names("type_as zeros_like ones_like empty_like full_like"), _like),
    **dict.fromkeys(_names("view reshape _unsafe_view flatten unflatten unsqueeze squeeze"), _rearranged(_reshape)),
    **dict.fromkeys(_names("transpose t swapaxes numpy_T"), _rearranged(_transpose)),
    "aten.permute": _rearranged(_permute),
    **dict.fromkeys(_names("expand expand_as broadcast_to"), _rearranged(_expand)),
    "aten.slice": _rearranged(_slice),
    "aten.select": _rearranged(_select),
    "aten.repeat_interleave": _rearranged(_repeat_interleave),
    "aten.repeat": _rearranged(_repeat),
    **dict.fromkeys(_names("mean sum amax amin var logsumexp"), _reduce),
    "aten.layer_norm": _layer_norm,
    "aten.rms_norm": _rms_norm,
    **dict.fromkeys(_names("softmax _softmax log_softmax"), _softmax),
    "aten.embedding": _embedding,
    "aten.linear": _linear,
    **dict.fromkeys(_names("matmul bmm mm"), _matmul),
    **dict.fromkeys(_names("addmm baddbmm"), _addmm),
    "aten.scaled_dot_product_attention": _attention,
    **dict.fromkeys(_names("split split_with_sizes chunk"), _split),
    **dict.fromkeys(_names("cat concat concatenate"), _cat),
    "aten.stack": _stack,
    "aten.index": _index,
    "aten.view_as_complex": _as_complex,
    "aten.view_as_real": _as_real,
    "aten.topk": _top,
    "aten.gather": _gather,
    **dict.fromkeys(_names("scatter scatter_"), _scatter),
    **dict.fromkeys(_names("max min"), _max),
    **dict.fromkeys(("transformers.grouped_mm_fallback", "aten._grouped_mm"), _grouped_mm),
    "_operator.getitem": _pick,
}
