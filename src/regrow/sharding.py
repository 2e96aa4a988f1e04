"""Tensors of which every process holds some rows, put together whenever one is computed with.

As in fully sharded data parallelism (ZeRO, arXiv 1910.02054, stage 3), but for frozen weights alone: what is trained is
small, and every process has all of it. torch's `fully_shard` lays a module's parameters out once; here every cut makes
others of them, so each tensor is a `DTensor` by itself.

Putting a tensor together takes all processes at once. Where all do the same number of passes, they ask for the same
tensors in the same order by themselves. Where they do not (some have no row of the last batch, or the main one works by
itself), an `uneven` stretch lets those who are done first help the others until all are.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

DONE = -1
"""Asked for by a process that needs nothing more."""


class Held:
    """A tensor that nobody changes; whole, for there is one process only."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    @property
    def nbytes(self) -> int:
        """What this process holds of it."""
        return self._tensor.nbytes

    def read(self) -> Tensor:
        """All of it, on the device that holds it."""
        return self._tensor


class HeldTogether(Held):
    """A tensor of which every process holds some rows."""

    def __init__(self, rows: DTensor, sharding: "Sharding") -> None:
        super().__init__(rows.to_local())
        self._rows = rows
        self._sharding = sharding
        self.number = sharding.register(self)

    def read(self) -> Tensor:
        """See `Held`; all processes ask at once.

        Raises:
            LostOther: if one of them has ended.
        """
        self._sharding.agree(self.number)
        return self.gather()

    @torch.no_grad()
    def gather(self) -> Tensor:
        """All processes' rows."""
        with self._sharding.reaching():
            return self._rows.full_tensor()


class Sharding:
    """What some processes hold together: tensors numbered in the order in which all of them have made them."""

    def __init__(
        self, device: torch.device, host: dist.ProcessGroup, reaching: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Nothing yet.

        Args:
            device: what the rows lie on.
            host: all processes, to agree through on what is asked for; gloo.
            reaching: gives the context to talk to the others in.
        """
        self.reaching = reaching
        self._mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self._host = host
        self._numbers = itertools.count()
        self._held: WeakValueDictionary[int, HeldTogether] = WeakValueDictionary()
        self._is_uneven = False

    def hold(self, whole: Tensor) -> HeldTogether:
        """Keep this process' rows of a tensor that all processes have, as `torch.chunk` would part it."""
        return HeldTogether(distribute_tensor(whole, self._mesh, [Shard(0)], src_data_rank=None), self)

    def register(self, held: HeldTogether) -> int:
        """Its number."""
        number = next(self._numbers)
        self._held[number] = held
        return number

    def agree(self, wanted: int) -> int:
        """In an uneven stretch: which tensor the processes want that want any; else the one that this one wants."""
        if not self._is_uneven:
            return wanted
        largest = torch.tensor(wanted)
        with self.reaching():
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._host)
        agreed = int(largest)
        assert wanted in (DONE, agreed), f"one process wants tensor {agreed}, another {wanted}"
        return agreed

    @contextmanager
    def uneven(self) -> Iterator[None]:
        """A stretch in which some processes may ask for less than others, or for nothing; it ends for all at once."""
        if self._is_uneven:
            yield
            return
        self._is_uneven = True
        try:
            yield
            while (number := self.agree(DONE)) != DONE:
                self._held[number].gather()
        finally:
            self._is_uneven = False
