"""llama.cpp's K types, which it alone can make: a plain GGUF file through its own quantiser.

A row of a K type is whole blocks of 256 weights. llama.cpp gives a tensor whose rows are not another type, of blocks of
32 (or float16), and some tensors of the `_m` and `_l` files a wider one than the file's name says; what came of it is
read off the file.

Needs llama-cpp-python (extra `gguf-check`).
"""

import ctypes
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import gguf
import llama_cpp
import torch

from regrow.checkpoint.files import new_file
from regrow.errors import InputError
from regrow.formats.llamacpp import K_TYPES, Written, write_gguf
from regrow.formats.source import Checkpoint


def write_quantised(source: Checkpoint, out: Path, kind: str, threads: int = 0) -> Written:
    """Write a checkpoint as a GGUF file of a K type, by way of a plain one beside it.

    Args:
        kind: a key of `K_TYPES`.
        threads: for the quantiser; 0: as many as torch has.

    Raises:
        InputError: as `write_gguf`, or if llama.cpp refuses.
    """
    plain = "f16" if source.outline(source.names[0]).dtype == torch.float16 else "f32"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch, new_file(out) as unfinished:
        whole = Path(scratch, "plain.gguf")
        written = write_gguf(source, whole, plain)
        wanted = llama_cpp.llama_model_quantize_default_params()
        wanted.ftype, wanted.nthread = int(K_TYPES[kind]), threads or torch.get_num_threads()
        code = llama_cpp.llama_model_quantize(str(whole).encode(), str(unfinished).encode(), ctypes.byref(wanted))
        if code:
            raise InputError(f"llama.cpp does not make a {kind} file of {source.folder} (its code: {code}); try q8_0")
        held = Counter(tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(unfinished).tensors)
    return replace(written, type=kind, held=dict(sorted(held.items())))
