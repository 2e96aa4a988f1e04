"""LoRA for the weights of experts, which lie in one tensor for all of a layer: so do each expert's own factors.

PEFT adds the product of such factors to the weights before anything is computed, which costs a tensor of all weights'
shape, and one more for its gradient. Here an expert's tokens go through its factors, as they do at a linear.

Factors hang below the module that they belong to: those of `mlp.experts.down_proj` are
`mlp.experts.lora.down_proj.lora_A.default.weight` and `…lora_B…`.

Shapes: E experts, r rank, I inputs and O outputs of the product.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

ADAPTER = "default"
LORA = "lora"
"""What a module of experts calls its adapters."""


class _Factor(nn.Module):
    """One factor: a parameter under the name that a linear's has."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class ExpertLora(nn.Module):
    """The adapter of one product; A `[E, r, I]`, and B `[E, O, r]`, which is zero at first, as PEFT has them."""

    def __init__(
        self, experts: int, out: int, into: int, rank: int, scaling: float, dropout: float, device: torch.device
    ) -> None:
        """Take E, O, I, r, what the product of the factors is multiplied by, s, and the dropout on inputs."""
        super().__init__()
        a = torch.empty(experts, rank, into)  # drawn on the CPU, as PEFT draws: the same ones on every device
        nn.init.kaiming_uniform_(a.view(experts * rank, into), a=math.sqrt(5))
        self.lora_A = nn.ModuleDict({ADAPTER: _Factor(a.to(device))})
        self.lora_B = nn.ModuleDict({ADAPTER: _Factor(torch.zeros(experts, out, rank, device=device))})
        self.dropout = nn.Dropout(dropout)
        self.scaling = scaling

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B."""
        return self.lora_A.get_parameter(f"{ADAPTER}.weight"), self.lora_B.get_parameter(f"{ADAPTER}.weight")

    def forward(self, x_NI: Tensor, a_rI: Tensor, b_Or: Tensor) -> Tensor:
        """What one expert's factors make of its tokens: `s B A x`."""
        inner = nn.functional.linear(self.dropout(x_NI.to(a_rI.dtype)), a_rI)
        return nn.functional.linear(inner, b_Or) * self.scaling


class ExpertLoras(nn.Module):
    """The adapters of one module of experts."""

    def __init__(self, adapters: Mapping[str, ExpertLora], former: str) -> None:
        """Hold adapters that are on.

        Args:
            adapters: by the product's name.
            former: how transformers computed the module before.
        """
        super().__init__()
        for name, adapter in adapters.items():
            self.add_module(name, adapter)
        self.former, self.enabled = former, True

    @property
    def adapters(self) -> dict[str, ExpertLora]:
        """By the product's name."""
        return {name: lora for name, lora in self.named_children() if isinstance(lora, ExpertLora)}


def loras_of(experts: nn.Module) -> ExpertLoras | None:
    """The adapters of a module of experts, if it has any."""
    found = experts._modules.get(LORA)
    return found if isinstance(found, ExpertLoras) else None


def lora_of(experts: nn.Module, name: str) -> ExpertLora | None:
    """The adapter of one product of a module of experts, if there is one."""
    loras = loras_of(experts)
    return None if loras is None else loras.adapters.get(name)


def adapter_name(parameter: str) -> str:
    """The dotted name of the adapter that belongs to a parameter of experts."""
    module, _, last = parameter.rpartition(".")
    return f"{module}.{LORA}.{last}"


def adapted_parameter(adapter: str) -> str | None:
    """The parameter of experts that an adapter of this name belongs to; None if it is a linear's."""
    module, _, last = adapter.rpartition(".")
    return f"{module.removesuffix(f'.{LORA}')}.{last}" if module.endswith(f".{LORA}") else None
