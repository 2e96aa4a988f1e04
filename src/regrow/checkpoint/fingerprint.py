"""Tell one checkpoint from another without reading all of it."""

import hashlib
from pathlib import Path

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
                start = handle.tell()
                for number in range(SAMPLES):
                    handle.seek(start + (size - start) * number // SAMPLES)
                    digest.update(handle.read(SAMPLE_BYTES))
    except OSError as error:
        raise InputError(f"{error.filename or folder}: {error.strerror}") from error
    return digest.hexdigest()
