"""LoRA on the linears of the decoder blocks, through peft."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from regrow.errors import InputError
from regrow.structure.offload import Offloaded
from regrow.structure.quantised import is_quantised, weight_shape

ADAPTER = "default"


def is_linear(module: nn.Module) -> bool:
    """Whether LoRA can be wrapped around a module, or is."""
    return isinstance(module, nn.Linear | Conv1D | LoraLayer)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """`(outputs, inputs)` of a linear without LoRA; Conv1D keeps its weight as `[in, out]`."""
    first, second = weight_shape(module.get_parameter("weight"))
    return (second, first) if isinstance(module, Conv1D) else (first, second)


def merged_weight(module: nn.Module, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`W + s B A` in float32, in the shape in which the linear keeps W.

    Args:
        a: `[rank, in]`.
        b: `[out, rank]`.
    """
    delta = (b @ a).mul_(scaling)
    return (delta.T if isinstance(module, Conv1D) else delta).add_(weight)


def attach_lora(
    model: PreTrainedModel,
    linears: Sequence[str],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str] = (),
) -> None:
    """Wrap linears with trainable LoRA factors in float32 and freeze everything else. Names stay as they are.

    Args:
        linears: dotted names of all linears of the blocks.
        rank: columns of B and rows of A, r.
        alpha: the adapter's output is scaled by alpha / r.
        targets: last parts of the names to wrap (`q_proj`, …); empty means all of `linears`.

    Raises:
        InputError: if a target names none of the linears.
    """
    for target in targets:
        if not any(name.endswith(f".{target}") for name in linears):
            known = sorted({name.rpartition(".")[2] for name in linears})
            raise InputError(f"lora.targets: no linear is called {target!r}; this model has {', '.join(known)}")
    chosen = [name for name in linears if not targets or name.rpartition(".")[2] in targets]
    model.requires_grad_(False)
    turned = all(isinstance(model.get_submodule(name), Conv1D) for name in chosen)  # GPT-2's weights are `[in, out]`
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen, bias="none", fan_in_fan_out=turned  # type: ignore[arg-type]
    )  # fmt: skip
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for parameter in adapter_parameters(model):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All LoRA factors of the model, in the model's order."""
    return [parameter for name, parameter in model.named_parameters() if ".lora_" in name]


def adapter_names(model: nn.Module) -> list[str]:
    """Their names, in the same order."""
    return [name for name, _ in model.named_parameters() if ".lora_" in name]


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The linears that LoRA is wrapped around, by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def lora_factors(model: nn.Module, linear: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A `[rank, in]` and B `[out, rank]` of the adapter around a linear."""
    a, b = (model.get_parameter(f"{linear}.lora_{factor}.{ADAPTER}.weight") for factor in "AB")
    return a, b


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes without its adapters."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merge_lora(model: PreTrainedModel) -> None:
    """Add every adapter's `s B A` to its frozen weight, in float32, and take the adapters off.

    To an offloaded weight it is added whenever it is brought.
    """
    assert not is_quantised(model), "adapters are merged into the original weights, never into a quantised base"
    for name, layer in lora_layers(model).items():
        base = layer.get_base_layer()
        a, b = lora_factors(model, name)
        weight = base.get_parameter("weight")
        merge = partial(merged_weight, base, a=a.detach(), b=b.detach(), scaling=layer.scaling[ADAPTER])
        if isinstance(weight, Offloaded):
            weight.merge = merge
        else:
            weight.data = merge(weight.data).to(weight.dtype)
        model.set_submodule(name, base)
    model.requires_grad_(True)
    del model.peft_config
    model._hf_peft_config_loaded = False
