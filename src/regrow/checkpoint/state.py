"""What a part of a run has to know in order to go on: plain values and tensors, never pickled."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class State:
    """Values that JSON can hold, and tensors by name; parts of it are states again."""

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, **parts: "State") -> "State":
        """One state of several."""
        whole = cls()
        for name, part in parts.items():
            whole.values[name] = part.values
            whole.tensors |= {f"{name}/{key}": tensor for key, tensor in part.tensors.items()}
        return whole

    def part(self, name: str) -> "State":
        """What `of` was given under a name."""
        return State(self.values[name], self.under(name))

    def under(self, name: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `name/`, by what follows."""
        return {key.removeprefix(f"{name}/"): t for key, t in self.tensors.items() if key.startswith(f"{name}/")}


def named(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under a common name; `State.under` finds them."""
    return {f"{name}/{key}": tensor for key, tensor in tensors.items()}


def chance() -> dict[str, Tensor]:
    """The states of torch's random generators, of the CPU and of every accelerator."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_chance(states: dict[str, Tensor]) -> None:
    """Let chance go on from where `chance` saw it."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif device == "mps":
            torch.mps.set_rng_state(state)
        elif int(device.removeprefix("cuda:")) < torch.cuda.device_count():  # perhaps it is another machine
            torch.cuda.set_rng_state(state, device)
