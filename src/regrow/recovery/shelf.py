"""Tensors put aside in a file without a name."""

import tempfile
from collections.abc import Callable
from mmap import ACCESS_COPY, ALLOCATIONGRANULARITY, mmap
from pathlib import Path

import torch
from torch import Tensor


class Shelf:
    """Holds on disk what would outweigh a model in memory; the file is gone with the process, however that ends."""

    def __init__(self, folder: Path) -> None:
        """Nothing lies there yet.

        Args:
            folder: on the file system where there is room.
        """
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (open as long as something can be read)

    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
        """What reads the same values again, on the CPU.

        Raises:
            OSError: if the disk is full.
        """
        values = tensor.detach().cpu().contiguous()
        start = -(-self._file.seek(0, 2) // ALLOCATIONGRANULARITY) * ALLOCATIONGRANULARITY
        self._file.seek(start)
        self._file.write(values.reshape(-1).view(torch.uint8).numpy().data)
        self._file.flush()
        length, shape, dtype = values.nbytes, values.shape, values.dtype

        def read() -> Tensor:
            if not length:
                return torch.empty(shape, dtype=dtype)
            # in memory as long as the tensor is; writing to it leaves the file alone
            mapped = mmap(self._file.fileno(), length, access=ACCESS_COPY, offset=start)
            return torch.frombuffer(mapped, dtype=dtype).view(shape)

        return read
