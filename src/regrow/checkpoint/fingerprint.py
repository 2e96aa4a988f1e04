"""Tell one checkpoint from another without reading all of it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from regrow.errors import InputError

SAMPLES, SAMPLE_BYTES = 64, 4096


def checkpoint_sha256(folder: Path) -> str:
    """A hash of `config.json` and, of every safetensors file, name, size, header and samples of the tensors.

    The samples tell a model from its fine-tuned brother, whose headers are the same. A change to fewer bytes than
    training touches may go unseen.

    Raises:
        InputError: if a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        digest.update((folder / "config.json").read_bytes())
        for file in sorted(folder.glob("*.safetensors")):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with open(file, "rb") as handle:
                length = handle.read(8)
                header = handle.read(min(int.from_bytes(length, "little"), size))  # a damaged length may say anything
                digest.update(length + header)
                _add_samples(digest, handle, size)
    except OSError as error:
        raise InputError(f"{error.filename or folder}: {error.strerror}") from error
    return digest.hexdigest()


def folder_sha256(folder: Path, patterns: Sequence[str] = ("*",)) -> str:
    """A hash of the names, sizes and samples of the files in a folder that match one of some patterns.

    Raises:
        InputError: if one cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for file in sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode(errors="surrogatepass"))
            with open(file, "rb") as handle:
                _add_samples(digest, handle, size)
    except OSError as error:
        raise InputError(f"{error.filename or folder}: {error.strerror}") from error
    return digest.hexdigest()


def _add_samples(digest: "hashlib._Hash", handle: BinaryIO, size: int) -> None:
    """Count in what stands at even steps from where a file is read on."""
    start = handle.tell()
    for number in range(SAMPLES):
        handle.seek(start + (size - start) * number // SAMPLES)
        digest.update(handle.read(SAMPLE_BYTES))
