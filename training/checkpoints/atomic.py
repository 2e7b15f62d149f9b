"""Write results so that a kill at any moment leaves either the old state or the new one.

    with atomic_folder(out, "checkpoint") as tmp:
        (tmp / "config.json").write_text(...)

Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from training.checkpoints.lock import fcntl  # None without POSIX locks: a killed run's leftovers then stay
from training.checkpoints.places import beside, check_replaceable, is_leftover


@contextlib.contextmanager
def atomic_folder(out: str | os.PathLike[str], kind: str) -> Iterator[Path]:
    """Yield a temporary folder beside `out`; on success it becomes `out` in one step, on any error it is deleted.

    An older product of the same `kind` (a key of KINDS) is replaced; anything else at `out` is refused
    (InputError, see check_replaceable). After a kill, `out` is absent, old or complete; the next run removes the
    killed run's leftovers beside it (`.{name}.tmp-*`).
    """
    target = Path(out).resolve()
    recover(target)
    check_replaceable(target, kind)
    with _made_parents(target.parent):
        tmp = beside(target, "tmp")
        tmp.mkdir()
        with locked(tmp):
            try:
                yield tmp
                settle(tmp)
                _swap(tmp, target)
            except BaseException:  # also Ctrl-C: leave nothing half-written
                shutil.rmtree(tmp, ignore_errors=True)
                raise


@contextlib.contextmanager
def atomic_file(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file beside `out`; on success it replaces `out`, on any error it is deleted."""
    target = Path(out).resolve()
    _remove_leftovers(target)
    with _made_parents(target.parent):
        tmp = beside(target, "tmp")
        tmp.touch()
        with locked(tmp):
            try:
                yield tmp
                _sync(tmp)
                os.replace(tmp, target)
                _sync(target.parent)
            except BaseException:
                tmp.unlink(missing_ok=True)
                raise


@contextlib.contextmanager
def scratch_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a folder beside `out` for work on it, deleted at the end; first those of killed runs are."""
    target = Path(out).resolve()
    _remove_leftovers(target, "new")
    with _made_parents(target.parent):
        folder = beside(target, "new")
        folder.mkdir()
        try:
            with locked(folder):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete what killed runs were writing in a folder, whatever it was for."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if is_leftover(path.name):
            _remove_unused(path)


def _swap(tmp: Path, target: Path) -> None:
    """Replace `target` by `tmp` and delete the old content."""
    old = tmp
    if not target.exists() or not os.listdir(target):
        os.replace(tmp, target)
    elif not _exchange(tmp, target):
        old = beside(target, "old")
        _step_aside(tmp, target, old)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step; False where the system (Linux can) or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)


def _step_aside(tmp: Path, target: Path, old: Path) -> None:
    """Two renames instead of an exchange; a kill between them leaves `old`, which the next run puts back."""
    try:
        os.rename(target, old)
        os.replace(tmp, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise


def recover(out: str | os.PathLike[str]) -> None:
    """Clean up after a killed run: restore the old folder if nothing replaced it, remove the rest."""
    target = Path(out).resolve()
    if not _remove_leftovers(target):
        return  # another run is writing this target right now
    for old in target.parent.glob(f".{glob.escape(target.name)}.old-*"):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, target)


def _remove_leftovers(target: Path, what: str = "tmp") -> bool:
    """Delete what killed runs were writing for `target`. False when another run is still writing there."""
    leftovers = list(target.parent.glob(f".{glob.escape(target.name)}.{what}-*"))
    for path in leftovers:
        _remove_unused(path)
    return not any(path.exists() for path in leftovers)


def _remove_unused(path: Path) -> None:
    # an OSError means that a running writer holds the lock, or that we may not delete it
    with contextlib.suppress(OSError), locked(path, insist=True):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def locked(path: Path, insist: bool = False) -> Iterator[None]:
    """Hold an advisory lock on a file or folder, so that another run knows it is in use.

    The system releases it when the process ends for any reason. `insist`: raise OSError when the lock is unavailable.
    """
    if fcntl is None:
        if insist:
            raise OSError("no file locks on this system")
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # some network file systems cannot lock folders
            if insist:
                raise
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _made_parents(folder: Path) -> Iterator[None]:
    """Create `folder` and its parents; remove those created when the body fails."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def settle(folder: Path) -> None:
    """Give every file the usual permissions (some libraries write private files) and flush all to disk, so that a
    rename never publishes empty files."""
    mode = folder.stat().st_mode & 0o666
    for parent, _, names in os.walk(folder):
        for name in names:
            os.chmod(Path(parent) / name, mode)
            _sync(Path(parent) / name)
        _sync(Path(parent))


def _sync(path: Path) -> None:
    if os.name != "posix":  # elsewhere folders cannot be opened, nor files synced through a read-only handle
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
