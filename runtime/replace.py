"""Replace a file in one step: a kill at any moment leaves the old file or the new one. Standard library only."""

from __future__ import annotations

import contextlib
import glob
import importlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

# Without POSIX file locks, what killed runs leave beside the file stays until it is removed by hand.
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
LONGEST_NAME = 255 - len(f"..tmp-{secrets.token_hex(4)}")  # bytes, so that the temporary name still fits


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file beside `path`; on success it becomes `path`, on any error it is deleted.

    Removes what killed runs left there (`.{name}.tmp-*`). Raises OSError.
    """
    target = path.resolve()  # a symbolic link stays, and what it points to is replaced
    for left in target.parent.glob(f".{glob.escape(target.name)}.tmp-*"):
        remove_unused(left)
    temporary = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
    with open(temporary, "xb") as file:
        try:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:  # Windows renames no open files
                file.close()
            os.replace(temporary, target)
            sync_folder(target.parent)
        except BaseException:  # also Ctrl-C
            file.close()
            temporary.unlink(missing_ok=True)
            raise


def lock(file: BinaryIO) -> None:
    """Mark a file as in use, until it is closed or the process ends. Raises OSError where another process uses it."""
    if fcntl is None:
        raise OSError("no file locks on this system")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_unused(path: Path) -> None:
    """Delete a temporary file, unless a running process writes it or it may not be deleted."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        lock(file)
        path.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename outlast a power failure; only POSIX opens folders."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
