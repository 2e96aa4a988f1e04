"""What the launcher's variables say of this process; nothing heavy is imported for it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from regrow.errors import InputError

NUMBERS = {
    "WORLD_SIZE": "RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
}
"""How many processes there are -> which of them this is; of torchrun, then of several MPIs."""
LOCAL = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE")
"""How many processes are on this machine, as the same say it."""
HOW = "torchrun --nproc-per-node {count} -m regrow …"


@dataclass(frozen=True)
class Launch:
    """How many processes a launcher says it has started, and which of them this one is."""

    count: int = 1
    rank: int = 0
    local: int = 1
    """How many of them are on this machine."""
    variable: str = "WORLD_SIZE"
    """The one that tells the count."""


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """What the variables say; without any, this process is the only one.

    Raises:
        InputError: if they contradict one another, or say that a launcher has started fewer than it was asked for.
    """
    variable = next((name for name in NUMBERS if name in environment), "WORLD_SIZE")
    count, rank = _number(environment, variable, 1), _number(environment, NUMBERS[variable], 0)
    if not 0 <= rank < count:
        raise InputError(
            f"the launcher's variables do not go together: {NUMBERS[variable]}={rank}, {variable}="
            f"{environment.get(variable, 'not set')}; start with {HOW.format(count='N')}, or unset them"
        )
    if variable not in environment and "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment:
        # accelerate's way of saying "several" when it starts the command by itself, which without a GPU it does once.
        raise InputError(
            "accelerate launch was asked for several processes, but has started one by itself; start them with "
            + HOW.format(count="N")
        )
    local = next((name for name in LOCAL if name in environment), LOCAL[0])
    return Launch(count, rank, _number(environment, local, count), variable)


def rank() -> int:
    """Which process this is, the main one being 0; also 0 if the variables make no sense."""
    try:
        return read_launch().rank
    except InputError:
        return 0


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(environment.get(name, default))
    except ValueError as error:
        raise InputError(f"the launcher's {name}={environment[name]!r} is no number; unset it") from error
