"""An earlier result, kept until the one that replaces it piece by piece is complete.

    set_aside(out, names, complete)      what bears these names in `out` moves into out/.earlier
    ...                                  the new result is written
    settle(out)                          complete: the old one goes; not complete: it comes back

A kill in between leaves .earlier, and recover_earlier() decides the same. Standard library only.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from training.checkpoints.atomic import locked
from training.errors import InputError

ASIDE, MOVING = ".earlier", ".earlier-moving"  # complete, and while names are being moved into or out of it
# What a training run has in its folder, but for the model that it publishes, whose files are replaced one by one.
RUN = ("last", "best", "tensorboard", "metrics.jsonl", "phase-*")
SAVED = ("last", "phase-1/last")  # one of them is there once a run can be continued
_ours: dict[Path, ExitStack] = {}  # .earlier of this process, by its path, with its lock


def _present(out: Path, names: Sequence[str]) -> list[str]:
    """What there is, among it what patterns such as phase-* stand for."""
    there = os.listdir(out) if out.is_dir() else []
    return sorted(name for name in there if any(fnmatch.fnmatch(name, pattern) for pattern in names))


def set_aside(out: Path, names: Sequence[str]) -> None:
    """Move what bears one of `names` in `out` into out/.earlier. Raises InputError when another process did."""
    if not (present := _present(out, names)):
        return
    aside, moving = out / ASIDE, out / MOVING
    if aside.exists() or moving.exists():
        raise InputError(f"another run is writing to {out}, for there is {aside}: wait for it or give another OUT")
    moving.mkdir()
    with ExitStack() as stack:
        stack.enter_context(locked(moving))
        for name in present:
            os.rename(out / name, moving / name)
        os.rename(moving, aside)
        _ours[aside.resolve()] = stack.pop_all()


def settle(out: Path, names: Sequence[str], complete: Sequence[str]) -> None:
    """End what set_aside() began in this process, if it did: `complete`: the new result is whole once it has
    one of these."""
    aside = (out / ASIDE).resolve()
    if (lock := _ours.pop(aside, None)) is not None:
        with lock:
            _decide(out, names, complete)


def recover_earlier(out: Path, names: Sequence[str], complete: Sequence[str]) -> None:
    """The same after a kill. Nothing happens while the process that set something aside still runs."""
    for folder in (out / MOVING, out / ASIDE):
        if os.path.isdir(folder):
            # an OSError: the lock is held, or the folder is not ours to change
            with contextlib.suppress(OSError), locked(folder, insist=True):
                _decide(out, names, complete)


def _decide(out: Path, names: Sequence[str], complete: Sequence[str]) -> None:
    moving, aside = out / MOVING, out / ASIDE
    if moving.is_dir():  # there is nothing new yet, or no longer
        _put_back(moving, out)
    elif aside.is_dir() and any(os.path.lexists(out / name) for name in complete):
        shutil.rmtree(aside)
    elif aside.is_dir():
        for name in _present(out, names):
            _remove(out / name)
        os.rename(aside, moving)  # from here on it only comes back
        _put_back(moving, out)


def _put_back(aside: Path, out: Path) -> None:
    for path in list(aside.iterdir()):
        os.rename(path, out / path.name)
    aside.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(out: Path, names: Sequence[str], complete: Sequence[str]) -> Iterator[None]:
    """set_aside(), and settle() at the end of the block, however it ends."""
    recover_earlier(out, names, complete)
    set_aside(out, names)
    try:
        yield
    finally:
        settle(out, names, complete)
