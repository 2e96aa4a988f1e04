"""One process at a time in a folder, or with a file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from regrow.checkpoint.files import LOCK_FILE, check_new
from regrow.errors import InputError


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Have a folder to oneself. It is made where there is none, and gone afterwards if nothing was put into it.

    The lock is the operating system's and ends with the process, however that ends: the file that a killed one leaves
    behind locks nothing.

    Raises:
        InputError: if another process has it, and nothing in it is touched then; or if it is a link that leads nowhere.
    """
    if folder.is_symlink() and not folder.exists():
        raise InputError(f"{folder} is a link to {folder.readlink()}, which is not there; make that, or give another")
    with _alone(folder / LOCK_FILE, f"works in {folder}; wait for its end, or give another folder"):
        yield


@contextmanager
def alone_in_new(folder: Path) -> Iterator[None]:
    """As `alone_in`, of a folder that is still to be written, perhaps by `new_folder`: it takes the lock's file along.

    Raises:
        InputError: if another process has it, or there is something in it already.
    """
    check_new(folder)
    with alone_in(folder):
        check_new(folder)  # whoever has had it until now may have filled it
        yield


@contextmanager
def alone_with(file: Path) -> Iterator[None]:
    """Have a file that is to be written to oneself; a lock's file lies beside it meanwhile.

    Raises:
        InputError: if another process has it.
    """
    with _alone(file.with_name(f".{file.name}{LOCK_FILE}"), f"writes {file}; wait for its end, or give another file"):
        yield


@contextmanager
def _alone(file: Path, told: str) -> Iterator[None]:
    """Hold a lock.

    Args:
        told: what another process does that holds it, and what to do then.
    """
    folder = file.parent
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        pid = file.read_text() if file.is_file() else ""  # empty: it has only just taken the lock
        other = f"another process (pid {pid})" if pid else "another process"
        raise InputError(f"{other} {told}") from error
    try:
        file.write_text(str(os.getpid()))
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is locked: afterwards it could be another process's
        lock.release()
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()
