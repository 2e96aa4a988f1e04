"""Tell one checkpoint from another without reading all of a large one."""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

from regrow.errors import InputError

WHOLE = 100 * 10**6
"""Bytes: files that together have no more are read from end to end, which takes a moment."""
SAMPLES, SAMPLE_BYTES = 64, 4096
"""Of each larger file."""
CONFIGS = ("config.json", "generation_config.json")
"""What goes from a checkpoint into a cut one besides weights and tokenizer."""


def checkpoint_sha256(folder: Path) -> str:
    """A hash of the configs and of every safetensors file: name, size and bytes.

    Of more than `WHOLE`, the header and samples of the tensors stand for the bytes. They tell a model from its
    fine-tuned brother, whose headers are the same; a change to fewer bytes than training touches may go unseen.

    Raises:
        InputError: if a file cannot be read, or there is no config.
    """
    digest = hashlib.sha256()
    try:
        for name in CONFIGS:
            if name == CONFIGS[0] or (folder / name).is_file():
                digest.update((folder / name).read_bytes())
        _add_files(digest, sorted(folder.glob("*.safetensors")), with_headers=True)
    except OSError as error:
        raise InputError(f"{error.filename or folder}: {error.strerror}") from error
    return digest.hexdigest()


def folder_sha256(folder: Path, patterns: Sequence[str] = ("*",)) -> str:
    """A hash of the names, sizes and bytes (of more than `WHOLE`: samples) of a folder's files that match a pattern.

    Raises:
        InputError: if one cannot be read.
    """
    digest = hashlib.sha256()
    try:
        _add_files(digest, sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}))
    except OSError as error:
        raise InputError(f"{error.filename or folder}: {error.strerror}") from error
    return digest.hexdigest()


def _add_files(digest: "hashlib._Hash", files: Collection[Path], with_headers: bool = False) -> None:
    """Count in files, or samples that stand at even steps from their start, or from the end of their header."""
    sizes = {file: file.stat().st_size for file in files}
    whole = sum(sizes.values()) <= WHOLE
    for file, size in sizes.items():
        digest.update(f"{file.name} {size}".encode(errors="surrogatepass"))
        with open(file, "rb") as handle:
            if whole:
                digest.update(handle.read())
                continue
            if with_headers:
                length = handle.read(8)
                header = handle.read(min(int.from_bytes(length, "little"), size))  # a damaged length may say anything
                digest.update(length + header)
            start = handle.tell()
            for number in range(SAMPLES):
                handle.seek(start + (size - start) * number // SAMPLES)
                digest.update(handle.read(SAMPLE_BYTES))
