"""What a part of a run has to know in order to go on: plain values and tensors, never pickled."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
    """The states of torch's random generators, of the CPU and of every GPU."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_chance(states: dict[str, Tensor]) -> None:
    """Let chance go on from where `chance` saw it."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif int(device.removeprefix("cuda:")) < torch.cuda.device_count():  # perhaps it is another machine
            torch.cuda.set_rng_state(state, device)


@contextmanager
def same_bits() -> Iterator[None]:
    """Within this context CUDA computes the same bits every time, where torch has an algorithm that does.

    cuBLAS reads its part of it when it is first used: another use in this process must not have come before.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    deterministic: Any = torch.utils.deterministic
    former = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = False  # nothing reads what it has not written
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*determinis", UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(former[0], warn_only=former[1])
        deterministic.fill_uninitialized_memory = filled
