"""Files that are either whole or not there: temporary name, fsync, rename."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regrow.errors import InputError

RUN_FILE = "run.json"
"""Marks a folder as a run's."""


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path` when everything is in it, and vanishes on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def claim_folder(path: Path) -> bool:
    """Make a folder a run's.

    Returns:
        Whether an earlier run was there.

    Raises:
        InputError: if it is a file, cannot be written, or holds something that is not a run of ours.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; give a folder for the results")
    earlier = (path / RUN_FILE).is_file()
    if path.is_dir() and not earlier and any(path.iterdir()):
        raise InputError(f"{path} is not empty and holds no run of regrow; give another folder")
    path.mkdir(parents=True, exist_ok=True)
    return earlier


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn a full disk or a read-only folder into a message for the person."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"no space left to write {error.filename or 'the results'}; free some and run again"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise InputError(f"{error.filename}: {error.strerror}; choose a folder that can be written") from error
        raise
    except Exception as error:
        # The safetensors writer reports the operating system's error as text.
        if type(error).__name__ == "SafetensorError" and "No space left" in str(error):
            raise InputError("no space left to write the checkpoint; free some and run again") from error
        raise
