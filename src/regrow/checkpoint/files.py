"""Files that are either whole or not there: temporary name, fsync, rename."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regrow.errors import InputError

RUN_FILE = "run.json"
"""Marks a folder as a run's."""
LOCK_FILE = ".lock"
"""Is in a folder while a process works in it; see `regrow.checkpoint.lock`."""

PARTIAL = ".partial"
"""The end of the name of what is not yet whole."""


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a write that fails does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON atomically. It has no numbers that are not finite: `null` stands for them."""
    write_text(path, json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(data: Any) -> Any:
    match data:
        case float() if not math.isfinite(data):
            return None
        case dict():
            return {key: _finite(value) for key, value in data.items()}
        case list() | tuple():
            return [_finite(value) for value in data]
        case _:
            return data


def parse_json(text: str, told: str) -> Any:
    """JSON that anybody may have changed.

    Args:
        told: what it is and what to do, for the message.

    Raises:
        InputError: if it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{told}: not valid JSON ({error})") from error


def amount(size: int) -> str:
    """Bytes for a reader."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def check_room(folder: Path, size: int, what: str, otherwise: str) -> None:
    """Refuse to begin what would fill the disk.

    Args:
        folder: where it would be written; it need not be there yet.
        size: bytes.
        what: in the plural.
        otherwise: what to do instead.

    Raises:
        InputError: if it would.
    """
    place = next(each for each in (folder.resolve(), *folder.resolve().parents) if each.is_dir())
    free = shutil.disk_usage(place).free
    if size > free:
        raise InputError(
            f"{what} will take about {amount(size)} of disk, {place} has {amount(free)} free: choose another --out, "
            f"{otherwise}"
        )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path` when everything is in it, and vanishes on an error.

    Where no other can take its place, for it is a mount point or what it lies in is not ours to write to, or should
    not, for somebody stands in it, it is filled in a folder within, and `config.json` is the last to come out of there.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    stays = path.is_dir() and (path.is_mount() or path == Path.cwd() or not os.access(path.parent, os.W_OK))
    temporary = path / PARTIAL if stays else path.with_name(f".{path.name}{PARTIAL}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    readable = temporary.stat().st_mode & 0o666
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(readable)  # safetensors makes files that nobody else can read
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
        if stays:
            for entry in sorted(temporary.iterdir(), key=lambda entry: entry.name == "config.json"):
                os.replace(entry, path / entry.name)
            return
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sweep(folder: Path) -> None:
    """Take away what a process that was killed had not finished writing."""
    for left_over in [*folder.rglob(f".*{PARTIAL}"), *folder.rglob(".*.old")]:
        if left_over.is_dir():
            shutil.rmtree(left_over)
        else:
            left_over.unlink(missing_ok=True)


def check_new(folder: Path) -> None:
    """See that a folder can be written anew, before any work is done for it. A lock in it does not count.

    Raises:
        InputError: if something is there already.
    """
    left_over = (LOCK_FILE, PARTIAL)
    if folder.exists() and (not folder.is_dir() or any(file.name not in left_over for file in folder.iterdir())):
        raise InputError(f"{folder} is there already and not empty; give a new folder")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when it is whole, and vanishes on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(path: Path) -> bool:
    """See whether a folder can be a run's, without touching it.

    Returns:
        Whether an earlier run is there.

    Raises:
        InputError: if it is a file, or holds something that is not a run of ours.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; give a folder for the results")
    earlier = (path / RUN_FILE).is_file()
    left_over = (PARTIAL, LOCK_FILE)  # by a process that was killed before it had begun
    if path.is_dir() and not earlier and any(not file.name.endswith(left_over) for file in path.iterdir()):
        raise InputError(f"{path} is not empty and holds no run of regrow; give another folder")
    return earlier


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn a full disk or a read-only folder into a message for the person."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # The writers of safetensors and tokenizers are Rust: they give the operating system's error as text.
        if told := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(told[1])
        elif number is None and re.fullmatch(r"\d+ requested and \d+ written", str(error)):  # by NumPy's `tofile`
            number = errno.ENOSPC
        name = getattr(error, "filename", None)
        if number in FULL:
            raise InputError(f"no space left to write {name or 'the results'}; free some and run again") from error
        if number in NOT_WRITABLE:
            reason = os.strerror(number)
            raise InputError(f"{name or 'the results'}: {reason}; choose a folder that can be written") from error
        raise
