"""Linears whose frozen weight bitsandbytes keeps in 8 bits (int8, one scale per row) or 4 (nf4, one per 64 weights).

What the rest of regrow asks of a weight (its shape, its values, a cut of it, a copy) is answered here for those whose
tensor does not say so itself. Nothing is ever written into such a weight: plans and adapters go to the original
checkpoint, for rounding the sum of base and adapter anew would undo much of the training.

bitsandbytes is an optional dependency, so its classes are told by their names, as transformers and peft do.

A trap that `settle` keeps shut: on CPUs with AVX512-BF16 a 4-bit linear that is run in evaluation mode repacks its
weight for a faster kernel. From then on its scales have bfloat16 precision, dequantising it gives garbage without an
error, and no gradient passes through it.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regrow.structure.offload import Offloaded

Quantization = Literal["int8", "nf4"]

CLASSES: dict[str, Quantization] = {"Int8Params": "int8", "Params4bit": "nf4"}


def kept_as(parameter: Tensor) -> Quantization | None:
    """How a weight is quantised; None if it is not."""
    return CLASSES.get(type(parameter).__name__)


def weight_shape(parameter: Any) -> torch.Size:
    """The shape that a parameter stands for, `[out, in]` of a weight; a 4-bit one is stored as `[bytes, 1]`."""
    shape: torch.Size = parameter.quant_state.shape if kept_as(parameter) == "nf4" else parameter.shape
    return shape


def weight_count(parameter: nn.Parameter) -> int:
    """How many numbers a parameter stands for."""
    return math.prod(weight_shape(parameter))


def quantised_linears(model: nn.Module) -> Iterator[Any]:
    """The model's linears with a quantised weight, without any LoRA around them."""
    return (module for module in model.modules() if isinstance(module, nn.Linear) and kept_as(module.weight))


def is_quantised(model: nn.Module) -> bool:
    """Whether any linear of the model is quantised."""
    return any(True for _ in quantised_linears(model))


def settle(model: nn.Module) -> None:
    """Bring freshly loaded quantised linears into the one state that this file knows, and keep them in it."""
    for linear in quantised_linears(model):
        if kept_as(linear.weight) == "int8":
            linear.init_8bit_state()  # else the first forward pass moves weight and scales there
            linear.register_forward_pre_hook(_flatten_input)
            linear.register_forward_hook(_unflatten_output)
        else:
            linear.support_avx512bf16_for_cpu = False
            linear.weight.module = None  # a cycle: the model would outlive its last use
        if linear.bias is not None:
            linear.register_forward_pre_hook(_remember_bias)
            linear.register_forward_hook(_restore_bias)


def _flatten_input(linear: Any, args: tuple[Tensor]) -> tuple[Tensor]:
    """On a CPU bitsandbytes takes no more than three axes; DeepSeek-V3 has four, with one head for all."""
    linear.input_axes = args[0].shape[:-1]
    return (args[0].flatten(0, -2),)


def _unflatten_output(linear: Any, args: Any, output: Tensor) -> Tensor:
    return output.view(*linear.input_axes, -1)


def _remember_bias(linear: Any, args: Any) -> None:
    linear.exact_bias = linear.bias.data


def _restore_bias(linear: Any, args: Any, output: Any) -> None:
    """In the place of a bias bitsandbytes puts one of its input's dtype: under autocast, of fewer digits."""
    linear.bias.data = linear.exact_bias
    del linear.exact_bias


@torch.no_grad()
def dequantised(linear: Any) -> Tensor:
    """The weight `[out, in]` that a quantised linear multiplies with; float32 for int8, the compute dtype for nf4."""
    weight = linear.weight
    if kept_as(weight) == "int8":
        scale_O1: Tensor = linear.state.SCB[:, None] * (1 / 127)
        return linear.state.CB.float().mul_(scale_O1)  # type: ignore[no-any-return]
    from bitsandbytes.functional import dequantize_4bit

    assert not vars(weight.quant_state).get("packing_format_for_cpu"), "a 4-bit weight was repacked: see `settle`"
    return dequantize_4bit(weight.data, weight.quant_state)


def cut_weight(linear: Any, axis: int, positions: Tensor) -> None:
    """Keep some rows (axis 0) or columns (axis 1) of a quantised weight, in place.

    Exact for int8, whose scales belong to rows. The blocks of nf4 belong to neither, and to round what is kept anew
    would move it by some percent: such a weight is let go, and only the shape of the cut is left (on the meta device).
    So an nf4 base is cut last, after its units have been behind closed gates for as long as they are needed.
    """
    weight = linear.weight
    if kept_as(weight) == "int8":
        linear.state.CB = linear.state.CB.index_select(axis, positions)
        weight.data = linear.state.CB
        if axis == 0:
            linear.state.SCB = linear.state.SCB[positions]
        return
    shape = list(weight_shape(weight))
    shape[axis] = len(positions)
    _let_go(linear, shape)


def _let_go(linear: Any, shape: Sequence[int]) -> None:
    """Leave nothing of a quantised weight but a shape."""
    if kept_as(linear.weight) == "int8":
        linear.state.CB = linear.state.SCB = None
    else:
        linear.quant_state = None
    linear.weight = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


def stand_in(linear: Any, dtype: torch.dtype) -> nn.Linear:
    """A plain linear of the same shape without any weights: for tracing."""
    rows, columns = weight_shape(linear.weight)
    return nn.Linear(columns, rows, linear.bias is not None, device="meta", dtype=dtype)


def copy_into(memo: dict[int, Any], linear: Any) -> None:
    """Let `copy.deepcopy` with this memo copy a quantised linear's weight once, and find it where it is referred to.

    Left to themselves an 8-bit linear would be copied with two weights, a 4-bit one with two sets of scales.
    """
    weight = linear.weight
    if kept_as(weight) == "int8":
        fresh = copy.deepcopy(weight)
        memo[id(linear.state.CB)] = fresh.data
    else:
        fresh = copy.copy(weight)
        fresh.data, fresh.quant_state = weight.data.clone(), copy.deepcopy(weight.quant_state)
        memo[id(weight.quant_state)] = fresh.quant_state
    memo[id(weight)] = fresh


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, tied ones once, with the scales of quantised ones; none of offloaded ones."""
    held = sum(parameter.nbytes for parameter in model.parameters() if not isinstance(parameter, Offloaded))
    for linear in quantised_linears(model):
        if kept_as(linear.weight) == "int8":
            held += linear.state.SCB.nbytes
        else:
            scales = [linear.weight.quant_state, linear.weight.quant_state.state2]
            held += sum(scale.absmax.nbytes for scale in scales if scale is not None)
    return held


def release(model: nn.Module) -> None:
    """Give a model's memory back; its shapes are left."""
    for linear in list(quantised_linears(model)):
        _let_go(linear, weight_shape(linear.weight))
    model.to("meta")
