"""Several processes on one run: each holds the whole model and does the same, on its own part of every batch.

What is measured is added up over the processes before anything is decided by it, so that all decide alike, and as one
process would. Files are the main process' alone. `Processes` is a process by itself, for which there is nothing to do;
`Together` is one of several, as accelerate and torch.distributed join them.

Frozen weights may lie in parts, one with each process (`sharding`); the model that each holds then lacks them.

What processes tell one another are numbers, JSON and safetensors, never pickles.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import load, save
from torch import Tensor, nn

from regrow.errors import InputError, LostOther
from regrow.launcher import HOW, Launch, read_launch
from regrow.sharding import Held, Sharding

LOST_AFTER = timedelta(minutes=30)
"""So long may a process be behind the others in the middle of a step."""
WORK_OF_ONE = timedelta(days=7)
"""So long may the main process be at work by itself: while it writes text, or evaluates."""
SMALL = 2**16
"""Tensors of up to so many elements travel together."""
SEED_STEP = 1_000_003

T = TypeVar("T")


class Processes:
    """The only process of a run."""

    count = 1
    rank = 0
    local = 1
    """Of them on this machine."""

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def rows(self, total: int) -> slice:
        """This process' part of `total` rows: all parts in the order of the processes are the whole."""
        return slice(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value, added up over the processes, in float64."""
        return list(values)

    def any(self, flag: bool) -> bool:
        """Whether it is true in one of the processes."""
        return flag

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors up over the processes, in place; all have as many, of the same shapes."""

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add the parameters' gradients up over the processes; None where no process has one."""

    def same(self, value: T) -> T:
        """The main process' value, which JSON can hold; what the others give does not matter."""
        return value

    def same_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The main process' tensors: in it the very same, elsewhere copies on the CPU."""
        return dict(tensors)

    def gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """What every process gives, by their numbers, on the CPU; in all but the main process nothing."""
        return [dict(tensors)]

    def by_main(self, work: Callable[[], T]) -> T:
        """What the main process finds while the others wait; JSON can hold it."""
        return work()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process be the first to do what stands in this context, and to fail in it, or to download."""
        yield

    def begin_alike(self, parameters: Sequence[nn.Parameter], seed: int) -> None:
        """Give all processes the main one's parameters, and each a chance (dropout) of its own."""

    def own_seed(self, seed: int) -> int:
        """Another in every process; the main one's is the one given, as it would be alone."""
        return seed + SEED_STEP * self.rank

    def parts(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """This process' rows of every batch, without batches of which it has none."""
        own = (batch[self.rows(len(batch))] for batch in batches)
        return [part for part in own if len(part)]

    def hold(self, whole: Tensor) -> Held:
        """Keep this process' part of a tensor that is the same in all of them, on the same kind of device."""
        return Held(whole)

    @contextmanager
    def uneven(self) -> Iterator[None]:
        """A stretch of computing in which some processes may run the model less often than others, or not at all.

        Nothing else is told or asked in it. See `sharding`.
        """
        yield


ALONE = Processes()


class Together(Processes):
    """One of several processes."""

    def __init__(self, launch: Launch) -> None:
        """Meet the others; torch.distributed has been started."""
        self.count, self.rank, self.local = dist.get_world_size(), dist.get_rank(), launch.local
        with self._reaching():
            self.host = dist.new_group(backend="gloo", timeout=WORK_OF_ONE)
            """For what lies in main memory, and for waiting: a waiting GPU would be busy."""
        self._sharding: Sharding | None = None

    def sum(self, values: Sequence[float]) -> list[float]:
        """See `Processes`."""
        total = torch.tensor(values, dtype=torch.float64)
        self._all_reduce(total)
        return list(total.tolist())

    def any(self, flag: bool) -> bool:
        """See `Processes`."""
        return self.sum([flag])[0] > 0

    @torch.no_grad()
    def add(self, tensors: Sequence[Tensor]) -> None:
        """See `Processes`."""
        small = [tensor for tensor in tensors if tensor.numel() <= SMALL]
        if small:
            total = torch.cat([tensor.flatten().double().cpu() for tensor in small])
            self._all_reduce(total)
            for tensor, part in zip(small, torch.split(total, [tensor.numel() for tensor in small]), strict=True):
                tensor.copy_(part.view_as(tensor))
        for tensor in tensors:
            if tensor.numel() > SMALL:
                held = tensor.contiguous()
                self._all_reduce(held)
                if held is not tensor:
                    tensor.copy_(held)

    @torch.no_grad()
    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """See `Processes`.

        All in one buffer, after the backward pass. DistributedDataParallel would hide this behind the pass, but is laid
        out for parameters that stay: every cut would need another, and what the gates see is not among them. Adapters
        are small beside the model; what there is to hide is little.
        """
        here = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        grads = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
        total = torch.cat([here, *grads])
        self._all_reduce(total)
        there, *parts = torch.split(total, [len(parameters), *(p.numel() for p in parameters)])
        for parameter, has_one, part in zip(parameters, there.tolist(), parts, strict=True):
            parameter.grad = part.view_as(parameter) if has_one else None

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """See `Processes`."""
        if not self.is_main:
            self.same(None)
        yield
        if self.is_main:
            self.same(None)

    @torch.no_grad()
    def begin_alike(self, parameters: Sequence[nn.Parameter], seed: int) -> None:
        """See `Processes`."""
        told = self.same_tensors({str(number): parameter for number, parameter in enumerate(parameters)})
        if not self.is_main:
            for number, parameter in enumerate(parameters):
                parameter.copy_(told[str(number)])
            torch.manual_seed(self.own_seed(seed))

    def same(self, value: T) -> T:
        """See `Processes`."""
        told = self._broadcast(json.dumps(value).encode() if self.is_main else b"")
        return value if self.is_main else json.loads(told)

    def same_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Processes`."""
        told = self._broadcast(_packed(tensors) if self.is_main else b"")
        return dict(tensors) if self.is_main else load(told)

    def gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """See `Processes`."""
        data = _packed(tensors)
        sizes = [int(size) for size in self.sum([len(data) * (self.rank == n) for n in range(self.count)])]
        padded = torch.frombuffer(bytearray(data.ljust(max(sizes), b"\0")), dtype=torch.uint8)
        found = [torch.empty_like(padded) for _ in sizes] if self.is_main else None
        with self._reaching():
            dist.gather(padded, found, dst=0, group=self.host)
        return [load(_bytes(each)[:size]) for each, size in zip(found or [], sizes if found else [], strict=True)]

    def by_main(self, work: Callable[[], T]) -> T:
        """See `Processes`."""
        found: Any = None
        with self.uneven():
            if self.is_main:
                found = work()
        told: T = self.same(found)
        return told

    def hold(self, whole: Tensor) -> Held:
        """See `Processes`."""
        if self._sharding is None:
            self._sharding = Sharding(whole.device, self.host, self._reaching)
        return self._sharding.hold(whole)

    @contextmanager
    def uneven(self) -> Iterator[None]:
        """See `Processes`."""
        with self._sharding.uneven() if self._sharding else nullcontext():
            yield

    def _all_reduce(self, tensor: Tensor) -> None:
        with self._reaching():
            dist.all_reduce(tensor, group=self.host if tensor.device.type == "cpu" else None)

    def _broadcast(self, data: bytes) -> bytes:
        """The main process' bytes, of which there is one at least."""
        size = torch.tensor([len(data)])
        with self._reaching():
            dist.broadcast(size, 0, group=self.host)
            buffer = torch.empty(int(size), dtype=torch.uint8)
            if self.is_main:
                buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            dist.broadcast(buffer, 0, group=self.host)
        return _bytes(buffer)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's and nccl's word for a connection that is gone
            raise LostOther(
                f"another of the {self.count} processes has ended; see what it or the launcher says"
            ) from error


def join(device: str = "auto", wanted: int | None = None) -> Processes:
    """Meet the processes that a launcher has started beside this one, if it has.

    On GPUs each process has the one of its number on its machine, and is bound to it; on CPUs they talk through gloo.

    Args:
        device: as a recipe names it.
        wanted: how many there have to be, if that matters.

    Raises:
        InputError: if there are others than the launcher says, or than wanted; or they cannot be met.
    """
    launch = read_launch()
    found = ALONE if launch.count == 1 and not _is_started() else _meet(launch, device)
    if found.count != launch.count:
        raise InputError(
            f"{launch.variable} says {launch.count} processes, {found.count} run together; start them with "
            + HOW.format(count=max(found.count, launch.count))
        )
    if wanted is not None and found.count != wanted:
        raise InputError(
            f"--processes {wanted} was asked for, the number that runs is {found.count}; start with "
            + HOW.format(count=wanted)
        )
    return found


def leave() -> None:
    """Part from the other processes, all of which do the same. Only after a success: the failed just end."""
    if _is_started():
        dist.destroy_process_group()


def _meet(launch: Launch, device: str) -> Processes:
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device={device} is one device for {launch.count} processes; choose auto, cuda or cpu")
    on_gpus = device != "cpu" and torch.cuda.is_available()
    if on_gpus and launch.local > torch.cuda.device_count():
        raise InputError(
            f"{launch.local} processes on a machine with {torch.cuda.device_count()} GPUs: each needs one; start fewer"
        )
    try:
        state = PartialState(cpu=not on_gpus, timeout=LOST_AFTER)
    except (ValueError, RuntimeError) as error:
        PartialState._reset_state()  # it takes itself for one that has met the others
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(
            f"{launch.variable} says {launch.count} processes, but they do not meet: {reason}; start them with "
            + HOW.format(count=launch.count)
        ) from error
    return Together(launch) if state.num_processes > 1 else ALONE


def _is_started() -> bool:
    return dist.is_available() and dist.is_initialized()


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _bytes(buffer: Tensor) -> bytes:
    return buffer.numpy().tobytes()
