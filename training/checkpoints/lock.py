"""One run, one writer: a lock on the place that a verb works in for long.

    with working_in(out, "train"):                a run's folder: the lock is out/.lock
    with working_in(out, "quantize", beside=True):  a result that appears in one step: beside it, .NAME.lock

The lock belongs to the process: the system releases it when that ends for any reason, and the next run takes over the
file that a killed one left. The file says who holds the lock, for people. Standard library only.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training.errors import InputError

# None on Windows: what msvcrt locks, others cannot read, and so not say who holds it. Runs are not kept apart there.
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
LOCK = ".lock"
MOST_BYTES = 4096  # of a lock's file that is read
TRIES, PAUSE_S = 5, 0.05  # check_free() holds a lock for a moment, too


@contextlib.contextmanager
def working_in(out: str | os.PathLike[str], verb: str, *, beside: bool = False) -> Iterator[None]:
    """Hold the lock of `out`, whose folder is created; removed at the end if it is empty then.

    Raises InputError where another run, also one in this process, holds it, saying which.
    """
    if fcntl is None:
        yield
        return
    file = lock_file(Path(out), beside)
    missing = [path for path in (file.parent, *file.parent.parents) if not path.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = _taken(file, Path(out))
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot create the folder {file.parent}, or write there: {error.strerror}") from error
    try:
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(_about(verb)).encode())
        yield
    finally:
        file.unlink(missing_ok=True)  # before the lock is released: see _taken
        os.close(handle)
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def check_free(out: str | os.PathLike[str], *, beside: bool = False) -> None:
    """Raise InputError where another run holds the lock of `out`: before the work that the lock is for."""
    try:
        file = lock_file(Path(out), beside)
        handle = os.open(file, os.O_RDONLY)
    except (OSError, RuntimeError):  # no lock, or no place (a loop of links)
        return
    try:
        _lock(handle, file, Path(out))
    finally:
        os.close(handle)


def lock_file(out: Path, beside: bool) -> Path:
    real = out.resolve()
    return real.with_name(f".{real.name}{LOCK}") if beside else real / LOCK


def _taken(file: Path, out: Path) -> int:
    """An open handle of the lock's file, which holds the lock."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(handle, file, out)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(file, follow_symlinks=False)):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder removed the file, in between


def _lock(handle: int, file: Path, out: Path) -> None:
    if fcntl is None:
        return
    for left in reversed(range(TRIES)):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not left:
                raise InputError(
                    f"{out} is in use by {holder(file)}: wait for it, stop it, or give another place"
                ) from None
            time.sleep(PAUSE_S)
        except OSError:  # some network file systems have no locks
            return


def _about(verb: str) -> dict[str, Any]:
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return {"verb": verb, "pid": os.getpid(), "host": socket.gethostname(), "since": since}


def holder(file: Path) -> str:
    """Who holds a lock, in words."""
    try:
        with open(file, "rb") as opened:
            about = json.loads(opened.read(MOST_BYTES))
        return f"`{about['verb']}`, process {about['pid']} on {about['host']}, since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just begun, or is just ending
        return "another run"
