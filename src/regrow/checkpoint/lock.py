"""One process at a time in a folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from regrow.checkpoint.files import LOCK_FILE
from regrow.errors import InputError


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Have a folder to oneself. It is made where there is none, and gone afterwards if nothing was put into it.

    The lock is the operating system's and ends with the process, however that ends: the file that a killed one leaves
    behind locks nothing.

    Raises:
        InputError: if another process has it; nothing in it is touched then.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK_FILE
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        pid = file.read_text() if file.is_file() else ""  # empty: it has only just taken the lock
        other = f"another process (pid {pid})" if pid else "another process"
        raise InputError(f"{other} works in {folder}; wait for its end, or give another folder") from error
    try:
        file.write_text(str(os.getpid()))
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is locked: afterwards it could be another process's
        lock.release()
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()
