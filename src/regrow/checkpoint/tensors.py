"""safetensors files read and written one tensor at a time, so that no more than that is ever in memory.

Not covered: big-endian machines; the format is little-endian.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from regrow.errors import InputError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """What a file's header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: `F32`, `BF16`, …"""


class StoredTensors:
    """The tensors of some safetensors files by name. Each is read by itself; nothing stays mapped into memory."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Read the headers.

        Raises:
            InputError: if a file is damaged or missing.
        """
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        for path in files:
            try:
                with safe_open(path, "pt") as file:
                    self.metadata |= file.metadata() or {}
                    for name in file.offset_keys():
                        piece = file.get_slice(name)
                        self.entries[name] = Entry(path, tuple(piece.get_shape()), piece.get_dtype())
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path} is damaged or missing: {str(error).splitlines()[0]}; get it anew") from error

    def read(self, name: str) -> Tensor:
        """One tensor, as a view of the file: pages of it that are not used are not read."""
        # Opened for each tensor: what a longer-lived handle has touched would stay in resident memory.
        with safe_open(self.entries[name].file, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def write_tensors(
    path: Path,
    contents: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
    after_each: Callable[[], None] = lambda: None,
) -> None:
    """Write a safetensors file tensor by tensor, byte by byte as `safetensors.torch.save_file` does.

    Args:
        contents: name -> dtype and shape of what is to come.
        tensors: each of them by name, once, in any order, on the CPU; none is held on to.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    begins: dict[str, int] = {}
    for name in sorted(contents, key=lambda name: (-contents[name][0].itemsize, name)):  # aligned throughout
        dtype, shape = contents[name]
        begins[name] = begin = end
        end += dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    described = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    described += b" " * (-len(described) % 8)
    with open(path, "wb") as file:
        file.write(len(described).to_bytes(8, "little") + described)
        data = file.tell()
        for name, tensor in tensors:
            assert (tensor.dtype, tuple(tensor.shape)) == contents[name], f"{name} is not what was announced"
            file.seek(data + begins.pop(name))
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del tensor
            after_each()
    assert not begins, f"{len(begins)} tensors were announced and did not come"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint, as transformers picks them.

    Raises:
        InputError: if there are none, or the index cannot be read or names a file of another folder.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except FileNotFoundError as error:
        if any(folder.glob("*.safetensors")):
            raise InputError(f"{folder} holds no model.safetensors and no index of several such files") from error
        raise InputError(
            f"{folder} holds no weights as safetensors; convert its pytorch_model.bin (never read here, for a pickle "
            "can run code), or give another checkpoint"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} cannot be read; get it anew") from error
    if not names:
        raise InputError(f"{index} names no files; get it anew")
    for name in names:
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.isprintable()
            or "\\" in name
            or not name.endswith(".safetensors")
        ):
            raise InputError(f"{index} names {name!r}, which is no safetensors file of its folder; get it anew")
    return [folder / name for name in sorted(names)]
