"""What every process has measured on its part, put together."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regrow.processes import Processes


def add_up(processes: Processes, moments: Sequence[object]) -> None:
    """Add up over the processes whatever dataclasses of sums and counts hold, in place.

    Args:
        moments: `GateMoments`, `InputMoments`, …: as many of the same kinds in every process.
    """
    if processes.count == 1:
        return
    sums = [vars(each) for each in moments]
    processes.add([value for each in sums for value in each.values() if isinstance(value, Tensor)])
    counts = [(each, name) for each in sums for name, value in each.items() if not isinstance(value, Tensor)]
    totals = processes.sum([each[name] for each, name in counts])
    for (each, name), total in zip(counts, totals, strict=True):
        each[name] = type(each[name])(total)


def add_up_at_main(processes: Processes, moments: Sequence[object]) -> None:
    """As `add_up`; afterwards only the main process holds the sums, the others zeros.

    So a later call does not count them twice, and the main process' state tells all.
    """
    add_up(processes, moments)
    for sums in map(vars, () if processes.is_main else moments):
        for name, value in sums.items():
            if isinstance(value, Tensor):
                value.zero_()
            else:
                sums[name] = type(value)()


def add_gradients(processes: Processes, weights: Sequence[nn.Parameter]) -> None:
    """Add up the gradients of base weights over the processes, one by one: they are large."""
    for weight in weights if processes.count > 1 else ():
        if weight.grad is None:  # none of its experts had a token of this process
            weight.grad = torch.zeros_like(weight)
        processes.add([weight.grad])


def gather_samples(processes: Processes, samples: dict[str, list[Tensor]]) -> None:
    """Let the main process have what was kept of every sequence, in the order of the batches' rows.

    Args:
        samples: name -> for each batch one row for each of its sequences; empty afterwards elsewhere.
    """
    if processes.count == 1:
        return
    found = processes.gather({f"{name}/{n}": own for name, each in samples.items() for n, own in enumerate(each)})
    for name, each in samples.items():
        each[:] = [torch.cat([parts[f"{name}/{n}"] for parts in found]) for n in range(len(each)) if found]
    if not found:
        samples.clear()
