"""LoRA on the decoder blocks: on their linears through peft, on their experts through `expert_lora`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from regrow.errors import InputError
from regrow.structure.expert_lora import (
    ADAPTER,
    LORA,
    ExpertLora,
    ExpertLoras,
    adapted_parameter,
    adapter_name,
    loras_of,
)
from regrow.structure.experts import ADAPTED, is_experts
from regrow.structure.offload import Offloaded
from regrow.structure.quantised import is_quantised, weight_shape
from regrow.structure.trace import decoder_layers

NO_EXPERTS: Mapping[str, int] = MappingProxyType({})


def is_linear(module: nn.Module) -> bool:
    """Whether LoRA can be wrapped around a module, or is."""
    return isinstance(module, nn.Linear | Conv1D | LoraLayer)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """`(outputs, inputs)` of a linear without LoRA; Conv1D keeps its weight as `[in, out]`."""
    first, second = weight_shape(module.get_parameter("weight"))
    return (second, first) if isinstance(module, Conv1D) else (first, second)


def adapted_module(model: nn.Module, adapter: str) -> nn.Module:
    """What an adapter of this name belongs to: a linear, without LoRA around it, or a module of experts."""
    parameter = adapted_parameter(adapter)
    module = model.get_submodule(adapter if parameter is None else parameter.rpartition(".")[0])
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def adapted_shape(model: nn.Module, adapter: str) -> tuple[int, ...]:
    """`(outputs, inputs)` of the weight that an adapter belongs to, before that the experts if it is theirs."""
    module = adapted_module(model, adapter)
    if (parameter := adapted_parameter(adapter)) is None:
        return linear_shape(module)
    count, first, second = model.get_parameter(parameter).shape
    return (count, second, first) if is_turned(module) else (count, first, second)


def is_turned(module: nn.Module) -> bool:
    """Whether a linear, or a module of experts, keeps its weights as `[in, out]`."""
    return bool(module.is_transposed) if is_experts(module) else isinstance(module, Conv1D)


def merged_weight(module: nn.Module, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`W + s B A` in float32, in the shape in which the module keeps W.

    Args:
        module: a linear, or experts; the weights and factors of those have an axis for them before.
        a: `[rank, in]`.
        b: `[out, rank]`.
    """
    delta = (b @ a).mul_(scaling)
    return (delta.mT if is_turned(module) else delta).add_(weight)


def _cast_input_unless_autocast(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Leave the cast to autocast: PEFT's would give each of q, k and v a copy of one input to keep for backward."""
    module.cast_input_dtype_enabled = not torch.is_autocast_enabled(args[0].device.type)  # type: ignore[assignment]


def attach_lora(
    model: PreTrainedModel,
    linears: Sequence[str],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str] = (),
    experts: Mapping[str, int] = NO_EXPERTS,
) -> None:
    """Wrap linears with trainable LoRA factors in float32 and freeze everything else. Names stay as they are.

    Args:
        linears: dotted names of all linears of the blocks.
        rank: columns of B and rows of A, r.
        alpha: the adapter's output is scaled by alpha / r, that of an expert's too.
        targets: last parts of the names to wrap (`q_proj`, …); empty means all of `linears`.
        experts: dotted names of the weights of experts to adapt -> the rank that an expert's factors have.

    Raises:
        InputError: if a target names none of them.
    """
    for target in targets:
        if not any(name.endswith(f".{target}") for name in (*linears, *experts)):
            known = sorted({name.rpartition(".")[2] for name in (*linears, *experts)})
            raise InputError(f"lora.targets: no linear is called {target!r}; this model has {', '.join(known)}")
    chosen = [name for name in linears if not targets or name.rpartition(".")[2] in targets]
    model.requires_grad_(False)
    if chosen:
        # To the layers alone: of a whole mixture PEFT takes linears called as the experts' once were for experts.
        path, layers = decoder_layers(model)
        inside = [name.removeprefix(f"{path}.") for name in chosen]
        turned = all(isinstance(model.get_submodule(name), Conv1D) for name in chosen)  # GPT-2's are `[in, out]`
        config = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=inside, bias="none", fan_in_fan_out=turned  # type: ignore[arg-type]
        )  # fmt: skip
        inject_adapter_in_model(config, layers, adapter_name=ADAPTER)
        del layers.peft_config
        for name in chosen:
            model.get_submodule(name).register_forward_pre_hook(_cast_input_unless_autocast)
    _attach_to_experts(model, experts, alpha / rank, dropout)
    for parameter in adapter_parameters(model):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def _attach_to_experts(model: PreTrainedModel, ranks: Mapping[str, int], scaling: float, dropout: float) -> None:
    """Give experts adapters, and have transformers compute them by ours."""
    former = model.config._experts_implementation if ranks else ""
    for name in dict.fromkeys(name.rpartition(".")[0] for name in ranks):
        made = {}
        for parameter in [last for module, _, last in (each.rpartition(".") for each in ranks) if module == name]:
            whole = f"{name}.{parameter}"
            count, out, into = adapted_shape(model, adapter_name(whole))
            device = model.get_parameter(whole).device
            made[parameter] = ExpertLora(count, out, into, ranks[whole], scaling, dropout, device)
        model.get_submodule(name).add_module(LORA, ExpertLoras(made, former))
    if ranks:
        model.set_experts_implementation(ADAPTED)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All LoRA factors of the model, in the model's order."""
    return [parameter for name, parameter in model.named_parameters() if ".lora_" in name]


def adapter_names(model: nn.Module) -> list[str]:
    """Their names, in the same order."""
    return [name for name, _ in model.named_parameters() if ".lora_" in name]


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The linears that LoRA is wrapped around, by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def expert_loras(model: nn.Module) -> dict[str, ExpertLoras]:
    """The adapters of experts, by the dotted name of the module that holds a layer's."""
    return {name: found for name, module in model.named_modules() if (found := loras_of(module)) is not None}


def adapted(model: nn.Module) -> list[str]:
    """The dotted names of all adapters, as `lora_factors` takes them: linears, and what hangs below experts."""
    inside = [adapter_name(f"{name}.{each}") for name, loras in expert_loras(model).items() for each in loras.adapters]
    return [*lora_layers(model), *inside]


def lora_factors(model: nn.Module, linear: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A `[rank, in]` and B `[out, rank]` of the adapter around a linear; of experts', with an axis for them before."""
    a, b = (model.get_parameter(f"{linear}.lora_{factor}.{ADAPTER}.weight") for factor in "AB")
    return a, b


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes without its adapters."""
    layers, experts = lora_layers(model).values(), expert_loras(model).values()

    def turn(on: bool) -> None:
        for layer in layers:
            layer.enable_adapters(on)
        for loras in experts:
            loras.enabled = on

    turn(False)
    try:
        yield
    finally:
        turn(True)


def take_off(model: PreTrainedModel) -> None:
    """Leave the model without adapters, whatever they have learned."""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.get_base_layer())
    experts = expert_loras(model)
    for name in experts:
        del model.get_submodule(name)._modules[LORA]
    for former in {loras.former for loras in experts.values()}:
        model.set_experts_implementation(former)


@torch.no_grad()
def merge_lora(model: PreTrainedModel) -> None:
    """Add every adapter's `s B A` to its frozen weight, in float32, and take the adapters off.

    To an offloaded weight it is added whenever it is brought.
    """
    assert not is_quantised(model), "adapters are merged into the original weights, never into a quantised base"
    for name, layer in lora_layers(model).items():
        _merge(model, name, layer.get_base_layer().get_parameter("weight"), layer.scaling[ADAPTER])
    for name, loras in expert_loras(model).items():
        for parameter, lora in loras.adapters.items():
            whole = f"{name}.{parameter}"
            _merge(model, adapter_name(whole), model.get_parameter(whole), lora.scaling)
    take_off(model)
    model.requires_grad_(True)


def _merge(model: nn.Module, adapter: str, weight: nn.Parameter, scaling: float) -> None:
    a, b = (factor.detach() for factor in lora_factors(model, adapter))
    merge = partial(merged_weight, adapted_module(model, adapter), a=a, b=b, scaling=scaling)
    if isinstance(weight, Offloaded):
        weight.merge = merge
    else:
        weight.data = merge(weight.data).to(weight.dtype)
